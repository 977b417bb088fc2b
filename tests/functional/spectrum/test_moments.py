import pytest
import torch

from lightning_feat.functional.spectrum import add_moment_sums_, covariance, covariance_spectrum, moment_sums


def drawn(size=200, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(size, width, generator=generator, dtype=torch.float64) @ mixing + 2.0


def test_the_covariance_is_the_slow_one():
    h = drawn()
    centred = h - h.mean(0)
    slow = sum(torch.outer(row, row) for row in centred) / len(h)
    assert torch.allclose(covariance(moment_sums(h)), slow, rtol=0, atol=1e-11)
    raw = sum(torch.outer(row, row) for row in h) / len(h)
    assert torch.allclose(covariance(moment_sums(h), centered=False), raw, rtol=0, atol=1e-11)


def test_two_unequal_parts_are_the_whole():
    h = drawn()
    whole = moment_sums(h)
    parts = add_moment_sums_(moment_sums(h[:31]), h[31:])
    assert all(torch.allclose(a, b, rtol=1e-13) for a, b in zip(whole, parts, strict=True))


def test_samples_of_weight_zero_do_not_count():
    h = drawn()
    keep = torch.arange(len(h)) % 3 > 0
    assert torch.allclose(covariance(moment_sums(h, keep)), covariance(moment_sums(h[keep])), rtol=1e-12)


def test_the_spectrum_is_that_of_an_svd():
    h = drawn()
    singular = torch.linalg.svdvals(h - h.mean(0))
    assert torch.allclose(covariance_spectrum(moment_sums(h)), singular.square() / len(h), rtol=1e-11)
    around_origin = torch.linalg.svdvals(h).square() / len(h)
    assert torch.allclose(covariance_spectrum(moment_sums(h), centered=False), around_origin, rtol=1e-11)


def test_a_known_spectrum_far_from_the_origin():
    axes = torch.linalg.qr(drawn(8, 8))[0]
    spread = torch.arange(8, 0, -1, dtype=torch.float64)
    h = torch.cat([axes * spread[:, None], -axes * spread[:, None]]) + 100.0
    expected = spread.square() / 8  # two samples of 16 in each direction
    assert torch.allclose(covariance_spectrum(moment_sums(h)), expected, rtol=1e-9)


def test_empty_directions_are_zero():
    h = drawn(50, 3) @ torch.linalg.qr(drawn(9, 3))[0].T
    spectrum = covariance_spectrum(moment_sums(h))
    assert (spectrum[:3] > 0).all()
    assert (spectrum[3:] == 0).all()
    same = covariance_spectrum(moment_sums(torch.full((7, 4), 3.3)))
    assert (same == 0).all()


def test_half_precision_is_summed_in_float64():
    h = drawn().to(torch.bfloat16)
    assert covariance(moment_sums(h)).equal(covariance(moment_sums(h.double())))


def test_no_samples_and_no_numbers_are_nan():
    assert covariance_spectrum(moment_sums(torch.zeros(0, 3))).isnan().all()
    assert covariance_spectrum(moment_sums(torch.tensor([[1.0, torch.nan]]))).isnan().all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"features must be \(N, D\)"):
        moment_sums(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"sums must be \(D,\) with D = 2, got \(3,\)"):
        add_moment_sums_(moment_sums(torch.zeros(1, 3)), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="weights must be"):
        moment_sums(torch.zeros(2, 3), torch.ones(3))
