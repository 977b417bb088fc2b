import pytest
import torch

from lightning_feat.functional.simplicity_bias import adaptive_scales, sharpness_step


def drawn(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def test_no_step_of_this_length_raises_a_linear_loss_more():
    gradients = drawn((3, 4), (5,))
    steps = sharpness_step(gradients, rho=0.3)
    flat, slope = (torch.cat([t.flatten() for t in some]) for some in (steps, gradients))
    assert flat.norm() == pytest.approx(0.3, rel=1e-12)
    others = torch.randn(1000, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    others = 0.3 * others / others.norm(dim=1, keepdim=True)
    assert (others @ slope).max() < flat @ slope
    assert flat @ slope == pytest.approx(0.3 * float(slope.norm()), rel=1e-12)


def test_the_adaptive_step_is_the_worst_in_its_own_metric_and_does_not_see_how_layers_are_scaled():
    weights, gradients = drawn((3, 4), (5,)), drawn((3, 4), (5,))[::1]
    scales = adaptive_scales(weights, eta=0.0)
    steps = sharpness_step(gradients, 0.5, scales)
    inner = torch.cat([(e / t).flatten() for e, t in zip(steps, scales, strict=True)])
    assert inner.norm() == pytest.approx(0.5, rel=1e-12)
    # A layer times a, the next divided by it: gradients change the other way, relative steps stay.
    factors = (4.0, 0.25)
    moved = [w * a for w, a in zip(weights, factors, strict=True)]
    turned = [g / a for g, a in zip(gradients, factors, strict=True)]
    again = sharpness_step(turned, 0.5, adaptive_scales(moved, eta=0.0))
    for e, other, a in zip(steps, again, factors, strict=True):
        torch.testing.assert_close(other, e * a, rtol=1e-12, atol=0)


def test_a_factor_of_a_gradient_scaler_does_not_matter():
    gradients = drawn((3, 4), (5,), dtype=torch.float16)
    steps = sharpness_step(gradients)
    for a, b in zip(steps, sharpness_step([g * 64 for g in gradients]), strict=True):
        torch.testing.assert_close(a, b)
        assert a.dtype == torch.float16


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_where_there_is_no_direction_the_weights_stay(bad):
    gradients = [torch.full((3,), bad), torch.zeros(2)]
    assert all(torch.equal(e, torch.zeros_like(e)) for e in sharpness_step(gradients))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda g: sharpness_step(g, rho=0.0), "rho=0.0: give a length above zero"),
        (lambda g: sharpness_step(g, scales=[None]), "2 gradients and 1 scales"),
        (lambda g: adaptive_scales(g, eta=-1.0), "eta=-1.0 must not be negative"),
    ],
)
def test_bad_arguments(call, said):
    with pytest.raises(ValueError, match=said):
        call(drawn((2,), (3,)))
