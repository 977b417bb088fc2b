"""The metrics and the manifold in worlds drawn at random: what the functions give, and no NaN from one row."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lightning_feat.functional.neural_collapse import collapse_measures, second_moment
from lightning_feat.functional.transfer.class_separation import class_separation_r2, direction_sums
from lightning_feat.manifolds import Grassmann
from lightning_feat.metrics.neural_collapse import ClassDistanceNormalizedVariance, NeuralCollapse
from lightning_feat.metrics.transfer import ClassSeparation, WithinClassVariability
from tests.fuzz.comparing import assert_close, leaves
from tests.fuzz.worlds import any_worlds, regular_worlds

few = settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@few
@given(any_worlds)
def test_rows_that_are_not_finite_are_left_out(world):
    features, targets = world.features().detach(), world.targets()
    keep = features.double().norm(dim=1).isfinite()
    assume(world.num_features > 0)
    for make in (ClassDistanceNormalizedVariance, NeuralCollapse, ClassSeparation):
        whole, rest = (make(world.num_classes, world.num_features) for _ in range(2))
        whole.update(features, targets)
        rest.update(features[keep], targets[keep])
        sums, expected = ({**metric.metric_state} for metric in (whole, rest))
        assert float(sums.pop("nonfinite")) == (~keep).sum()
        assert float(expected.pop("nonfinite")) == 0
        assert len(sums) >= 5  # counts, sums, squares, outside, roundings
        assert_close(sums, expected, 1e-12)
    angles = WithinClassVariability(world.num_classes)
    angles.update(features, targets)
    assert angles.angles.isfinite().all()


@few
@given(regular_worlds, st.integers(0, 6))
def test_two_batches_are_the_functions_of_all_samples(world, cut):
    features, targets = world.features(), world.targets()
    collapse = NeuralCollapse(world.num_classes, world.num_features, second_moment=True)
    separation = ClassSeparation(world.num_classes, world.num_features)
    for metric in (collapse, separation):
        metric.update(features[:cut], targets[:cut])
        metric.update(features[cut:], targets[cut:])
    found = {name: value for name, value in collapse.compute().items() if name != "nonfinite_samples"}
    expected = collapse_measures(world.totals(), moment=second_moment(features))
    assert found.keys() == expected.keys()
    assert_close(found, expected, 1e-7, [0] * len(leaves(found)))
    assert_close(separation.compute(), class_separation_r2(direction_sums(features, targets, world.num_classes)), 1e-9)


@few
@given(regular_worlds, st.sampled_from([1e-12, 1e-6, 1e-2, 1.0, 30.0]))
def test_a_step_and_its_logarithm(world, length):
    manifold = Grassmann()
    x = world.basis().detach().mT.contiguous()
    direction = manifold.proju(x, world.basis("direction").detach().mT)
    y = manifold.expmap(x, length * direction)
    ok, reason = manifold._check_point_on_manifold(y, atol=1e-9)  # rounding grows with the square of the turn
    assert ok, reason
    back = manifold.expmap(x, manifold.logmap(x, y))
    torch.testing.assert_close(back @ back.mT, y @ y.mT, rtol=0, atol=1e-9)
    if length <= 1e-2:  # short of a right angle the logarithm is the step
        torch.testing.assert_close(manifold.logmap(x, y), length * direction, rtol=1e-5, atol=1e-13)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_point_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or inf"):
        Grassmann().projx(torch.full((3, 2), bad))
