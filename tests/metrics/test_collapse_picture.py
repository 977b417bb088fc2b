"""The picture that the metric of neural collapse gives of everything it has seen."""

import pytest
import torch

from lightning_feat.functional import neural_collapse as nc
from lightning_feat.metrics import NeuralCollapse

C, D = 4, 6
PARTS = (slice(0, 7), slice(7, 30), slice(30, 40))


def batch():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(40) % C
    features = torch.randn(C, D, generator=generator)[targets] + torch.randn(40, D, generator=generator)
    return features, targets


def seen(second_pass, **kwargs):
    features, targets = batch()
    metric = NeuralCollapse(C, D, **kwargs)
    for part in PARTS:
        metric.update(features[part], targets[part])
    for _ in range(second_pass):
        metric.start_second_pass()
        for part in PARTS:
            metric.update_second_pass(features[part], targets[part])
    return metric


@pytest.mark.parametrize(
    "arguments",
    [
        {"second_pass": 1, "within_scatter": True},
        {"second_pass": 2, "within_scatter": True},  # the second time anew
        {"second_pass": 0, "second_moment": True},
    ],
    ids=str,
)
def test_picture_over_unequal_batches_is_that_of_all_samples(arguments):
    features, targets = batch()
    totals = nc.class_sums(features, targets, C)
    scatter = nc.within_class_scatter(features, targets, nc.class_centers(totals))
    expected = nc.collapse_picture(totals, scatter / 40)
    for value, other in zip(seen(**arguments).picture(), expected, strict=True):
        torch.testing.assert_close(value, other)


def test_spectrum_within_classes_is_not_made_up():
    assert seen(second_pass=1).picture().within is None
    assert seen(second_pass=0, within_scatter=True).picture().within is None  # the second pass has not been
