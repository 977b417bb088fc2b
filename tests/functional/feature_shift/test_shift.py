import pytest
import torch
from torch.autograd import gradcheck

from lightning_feat.functional.feature_shift import (
    ShiftSums,
    cosine_shift,
    feature_distillation,
    l2_sp,
    relative_shift,
    relative_shift_by_sample,
    shift_consistency_loss,
    shift_discrepancy,
    shift_measures,
    shift_sums,
)

PENALTIES = [relative_shift, cosine_shift, feature_distillation]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens():
    """Features, reference and mask of 4 samples with 5 tokens, 3 of which do not count."""
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 3:] = mask[2, 4] = False
    return drawn(4, 5, 6), drawn(4, 5, 6, seed=1), mask


def slow(features, reference, mask):
    """Distances, lengths and cosines of the tokens that count, one by one."""
    rows = [(features[i], reference[i]) for i in torch.nonzero(mask).tolist() for i in [tuple(i)]]
    distances = [sum((a - b) ** 2 for a, b in zip(z, r, strict=True)) ** 0.5 for z, r in rows]
    lengths = [sum(b**2 for b in r) ** 0.5 for _, r in rows]
    cosines = [1 - z @ r / (z.norm() * r.norm()) for z, r in rows]
    return [torch.stack(column) for column in (distances, lengths, cosines)]


def test_penalties_are_their_definitions_over_the_tokens_that_count():
    z, reference, mask = tokens()
    distances, lengths, cosines = slow(z, reference, mask)
    near = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums in another order
    torch.testing.assert_close(relative_shift(z, reference, mask), distances.mean() / lengths.mean(), **near)
    torch.testing.assert_close(cosine_shift(z, reference, mask), cosines.mean(), **near)
    torch.testing.assert_close(feature_distillation(z, reference, mask), distances.square().mean(), **near)


def test_what_stands_in_padding_does_not_matter_not_even_nan():
    z, reference, mask = tokens()
    spoilt = z.clone().requires_grad_()
    with torch.no_grad():
        spoilt[~mask] = torch.nan
    for penalty in PENALTIES:
        assert torch.equal(penalty(spoilt, reference, mask), penalty(z, reference, mask))


def test_a_reference_without_prompts_is_compared_token_by_token():
    """Two prompts at the end of the features, none in the reference; and padding in both."""
    z, reference, mask = tokens()
    longer = torch.cat([z, drawn(4, 2, 6, seed=2)], 1)
    kept = torch.cat([mask, torch.zeros(4, 2, dtype=torch.bool)], 1)
    for penalty in PENALTIES:
        torch.testing.assert_close(penalty(longer, reference, kept, mask), penalty(z, reference, mask))


def test_shift_of_each_sample_is_that_of_the_sample_alone():
    z, reference, mask = tokens()
    alone = torch.stack([relative_shift(z[i : i + 1], reference[i : i + 1], mask[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(relative_shift_by_sample(z, reference, mask), alone)
    flat = torch.stack([relative_shift(z[i : i + 1, 0], reference[i : i + 1, 0]) for i in range(4)])
    torch.testing.assert_close(relative_shift_by_sample(z[:, 0], reference[:, 0]), flat)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_relative_shift_knows_neither_scale_nor_width(scale):
    z, reference, _ = tokens()
    expected = relative_shift(z, reference)
    torch.testing.assert_close(relative_shift(scale * z, scale * reference), expected)
    twice = [torch.cat([h, h], -1) for h in (z, reference)]
    torch.testing.assert_close(relative_shift(*twice), expected)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_without_a_shift_the_value_is_zero_and_the_gradient_finite(penalty):
    z = drawn(7, 5).requires_grad_()
    value = penalty(z, z.detach().clone())
    value.backward()
    assert value == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("shift", [1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_near_zero_the_gradient_is_bounded(penalty, shift):
    """Squares underflow below 1e-19 in float32."""
    reference = torch.zeros(3, 4)
    reference[:, 0] = 1.0
    z = reference.clone()
    z[:, 1] = shift
    z.requires_grad_()
    penalty(z, reference).backward()
    assert z.grad.isfinite().all()
    assert z.grad.norm() <= 1.0


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradients_are_those_of_finite_differences(penalty):
    z, reference = drawn(3, 4, dtype=torch.float64).requires_grad_(), drawn(3, 4, seed=1, dtype=torch.float64)
    assert gradcheck(lambda h: penalty(h, reference), z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_inside_autocast_too(dtype):
    z, reference, mask = tokens()
    z, reference = ((300 * h).to(dtype) for h in (z, reference))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for penalty in PENALTIES:
            value = penalty(z, reference, mask)  # squares of 300 overflow float16
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, penalty(z.float(), reference.float(), mask))


def test_sums_of_two_parts_are_those_of_the_whole():
    z, reference, mask = tokens()
    whole = shift_sums(z, reference, mask)
    parts = [shift_sums(z[part], reference[part], mask[part]) for part in (slice(0, 1), slice(1, 4))]
    added = ShiftSums(*(a + b for a, b in zip(*parts, strict=True)))
    assert whole.counts == 17
    torch.testing.assert_close(torch.stack(added), torch.stack(whole), rtol=1e-12, atol=0)  # float64 sums
    measures = shift_measures(whole)
    torch.testing.assert_close(measures["relative"].float(), relative_shift(z, reference, mask))
    torch.testing.assert_close(measures["cosine"].float(), cosine_shift(z, reference, mask))


def test_small_angles_are_exact_where_one_minus_cosine_is_rounding():
    reference = torch.tensor([[1.0, 0.0]])
    angle = 1e-4
    z = torch.tensor([[1.0, angle]])
    assert float(cosine_shift(z, reference)) == pytest.approx(angle**2 / 2, rel=1e-3)
    assert 1 - torch.cosine_similarity(z, reference) == pytest.approx(0, abs=1e-9)  # all digits lost


def test_l2_sp_is_half_the_squared_distance_and_of_new_weights_half_the_square():
    weights = [drawn(2, 3).requires_grad_(), drawn(4, seed=1).requires_grad_()]
    start = [drawn(2, 3, seed=2), None]
    value = l2_sp(weights, start)
    value.backward()
    expected = (weights[0] - start[0]).square().sum() / 2 + weights[1].square().sum() / 2
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(weights[0].grad, (weights[0] - start[0]).detach())
    torch.testing.assert_close(weights[1].grad, weights[1].detach())


def test_consistency_is_the_sum_of_squared_discrepancies_with_gradients_on_both_sides():
    text, image = torch.tensor([0.5, 0.1, 0.3]).requires_grad_(), torch.tensor([0.2, 0.1, 0.7]).requires_grad_()
    loss = shift_consistency_loss(text, image)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.09 + 0.16))
    torch.testing.assert_close(shift_discrepancy(text, image), torch.tensor([0.3, 0.0, 0.4]))
    torch.testing.assert_close(text.grad, torch.tensor([0.6, 0.0, -0.8]))
    torch.testing.assert_close(image.grad, -text.grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relative_shift(drawn(2, 3), drawn(2, 4)), "of one shape"),
        (lambda: relative_shift(drawn(3), drawn(3)), "of one shape"),
        (lambda: relative_shift(drawn(2, 3), drawn(2, 3), torch.ones(3, dtype=torch.bool)), "one entry for each token"),
        (
            lambda: relative_shift(drawn(2, 3), drawn(2, 3), None, torch.ones(3, dtype=torch.bool)),
            "does not fit a reference",
        ),
        (lambda: l2_sp([drawn(2)], []), "1 weights, but 0 starts"),
        (lambda: shift_consistency_loss(drawn(2), drawn(3)), "as many text blocks as image blocks"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
