import pytest
import torch

from lightning_feat.functional.feature_shift.prompt_gram import (
    gram_consistency_loss,
    gram_discrepancy,
    gram_norm,
    gram_ratio,
)


def prompts(*shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_norm_is_that_of_the_large_gram_matrix_too():
    p = prompts(8, 2, 512)
    slow = [torch.linalg.matrix_norm(q.double().T @ q.double()) for q in p]
    torch.testing.assert_close(gram_norm(p), torch.stack(slow).float(), rtol=1e-7, atol=0)  # one rounding, to float32


def test_the_norm_does_not_change_under_rotation_and_grows_with_the_square():
    p = prompts(3, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    torch.testing.assert_close(gram_norm(p @ rotation), gram_norm(p), rtol=1e-5, atol=0)  # float32 rotation
    assert gram_norm(2 * p) == 4 * gram_norm(p)


def test_autocast_changes_nothing():
    p = prompts(4, 2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gram_norm(p)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, gram_norm(p))


def test_the_loss_is_the_sum_of_squared_differences_of_the_ratios():
    text, image = prompts(5, 2, 16), prompts(5, 2, 24, seed=1)
    starts = gram_norm(prompts(5, 2, 16, seed=2)), gram_norm(prompts(5, 2, 24, seed=3))
    norms = gram_norm(text), gram_norm(image)
    slow = 0.0
    for j in range(5):
        slow += ((norms[0][j] / starts[0][j]).item() - (norms[1][j] / starts[1][j]).item()) ** 2
    assert gram_consistency_loss(*norms, *starts).item() == pytest.approx(slow, rel=1e-6)
    assert gram_discrepancy(*norms, *starts).square().sum().item() == pytest.approx(slow, rel=1e-6)


def test_the_loss_is_zero_at_the_start_and_where_both_grow_alike():
    norms = gram_norm(prompts(5, 2, 16)), gram_norm(prompts(5, 2, 24))
    assert gram_consistency_loss(*norms, *norms) == 0
    assert gram_consistency_loss(2 * norms[0], 2 * norms[1], *norms) == 0


def test_both_towers_are_pulled_towards_one_another():
    text, image = prompts(1, 2, 16).requires_grad_(), prompts(1, 2, 24).requires_grad_()
    starts = gram_norm(text).detach() / 2, gram_norm(image).detach()  # the text has grown, the image has not
    gram_consistency_loss(gram_norm(text), gram_norm(image), *starts).backward()
    assert (text.grad * text.detach()).sum() > 0  # a step against the gradient shortens the text prompts
    assert (image.grad * image.detach()).sum() < 0


def test_the_norms_at_the_start_get_no_gradient():
    norms = gram_norm(prompts(3, 2, 16)).requires_grad_()
    assert not gram_ratio(norms.detach(), norms).requires_grad


def test_prompts_of_zero_have_a_gradient_of_zero():
    p = torch.zeros(2, 16, requires_grad=True)
    gram_norm(p).backward()
    assert torch.equal(p.grad, torch.zeros(2, 16))


@pytest.mark.parametrize("wrong", [torch.ones(4), torch.ones(2, 4, dtype=torch.long)])
def test_what_are_no_prompts_is_refused(wrong):
    with pytest.raises(ValueError, match=r"prompts \(\.\.\., n, D\) are needed"):
        gram_norm(wrong)


def test_norms_of_other_blocks_are_refused():
    with pytest.raises(ValueError, match="must match"):
        gram_ratio(torch.ones(3), torch.ones(1))
