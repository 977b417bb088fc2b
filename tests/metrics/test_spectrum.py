import pytest
import torch

from lightning_feat.functional.spectrum import rankme, spectral_decay, wasserstein_uniformity
from lightning_feat.metrics import EffectiveRank, RankMe, SpectrumDecay, WassersteinUniformity


def drawn(size=40, width=5):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(size, width, generator=generator) @ mixing + 0.5


def filled(metric, h=None):
    for part in (drawn() if h is None else h).split([7, 1, 20, 12]):
        metric.update(part)
    return metric


def test_they_are_the_functions_of_all_samples():
    h = drawn().double()
    assert float(filled(RankMe(5)).compute()) == pytest.approx(float(rankme(h)), rel=1e-10)
    assert float(filled(EffectiveRank(5)).compute()) == pytest.approx(float(rankme(h - h.mean(0))), rel=1e-10)
    uniformity = filled(WassersteinUniformity(5)).compute()
    assert float(uniformity) == pytest.approx(float(wasserstein_uniformity(h)), rel=1e-9)
    spectrum = torch.linalg.svdvals(h - h.mean(0)).square() / len(h)
    decay = filled(SpectrumDecay(5, 2, 4))
    assert float(decay.compute()) == pytest.approx(float(spectral_decay(spectrum, 2, 4).exponent), rel=1e-9)
    assert torch.allclose(decay.spectrum(), spectrum, rtol=1e-9)


def test_repeated_samples_and_those_that_are_not_finite_are_left_out():
    h = drawn()
    bad = torch.cat([h, h[:3], torch.full((1, 5), torch.inf)])
    metric = RankMe(5)
    metric.update(bad, torch.tensor([False] * 40 + [True] * 3 + [False]))
    assert metric.compute() == RankMe(5)(h)
    assert metric.nonfinite == 1


def test_no_samples_are_nan():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert EffectiveRank(3).compute().isnan()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"num_features=5 but features are \(2, 3\)"):
        RankMe(5).update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="repeated must be"):
        RankMe(3).update(torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="first=0"):
        SpectrumDecay(5, first=0)
    for first, last in ((4, None), (1, 2), (300, 500)):
        with pytest.raises(ValueError, match="of 5 eigenvalues: fewer than three"):
            SpectrumDecay(5, first, last)
    with pytest.raises(ValueError, match="num_features=0"):
        EffectiveRank(0)
