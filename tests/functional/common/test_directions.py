"""Directions of class means: right beside those that hold nothing but rounding."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from lightning_feat.functional.common.class_sums import class_sums
from lightning_feat.functional.common.directions import between_class_directions, rounding_of, thin_svd

FLOAT64 = rounding_of(torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rank(features, targets, rounding=None):
    sums = class_sums(features, targets, int(targets.max()) + 1)
    rounding = rounding_of(features.dtype) if rounding is None else rounding
    return len(between_class_directions(sums, rounding=rounding)[0])


@pytest.mark.parametrize(("size", "width"), [(50, 20), (20, 50), (30, 30)])
@pytest.mark.parametrize("decay", [0, -3, -9])
def test_a_thin_svd_by_gram_matrices_is_as_right_as_an_svd(size, width, decay):
    least = min(size, width)
    left, right = (torch.linalg.qr(normal(length, least, seed=length)).Q for length in (size, width + 1))
    exact = torch.logspace(0, decay, least, dtype=torch.float64)
    matrix = left * exact @ right[:width].T
    expected = torch.linalg.svdvals(matrix)
    value, direction = thin_svd(matrix)
    # rounding of 1e-16 of the largest, relative to the smallest
    torch.testing.assert_close(value, expected, rtol=1e-13 * 10**-decay, atol=0)
    torch.testing.assert_close(direction @ direction.T, torch.eye(least).double(), rtol=0, atol=1e-11)
    torch.testing.assert_close(matrix @ direction.T @ direction, matrix, rtol=0, atol=1e-13)


def test_a_thin_svd_leaves_out_what_a_matrix_does_not_span():
    matrix = normal(9, 3) @ normal(3, 7, seed=1)
    assert len(thin_svd(matrix)[0]) == len(thin_svd(matrix.T)[0]) == 3
    assert len(thin_svd(torch.zeros(4, 3).double())[0]) == len(thin_svd(torch.zeros(0, 3).double())[0]) == 0


NORMS = {
    "layer norm": (layer_norm, 1),
    "affine layer norm": (
        lambda h, shape: layer_norm(
            h, shape, 0.5 + torch.rand(shape, generator=torch.Generator()), normal(*shape).to(h)
        ),
        1,
    ),
    "rms norm": (rms_norm, 0),  # leaves no direction empty
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("spread", [0.3, 1e-4, 1e-7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_normalisation_leaves_empty_is_no_direction_where_classes_outnumber_features(name, spread, dtype):
    norm, empty = NORMS[name]
    targets = torch.arange(60).repeat_interleave(5)
    h = normal(60, 40)[targets] + spread * normal(300, 40, seed=1)
    assert rank(norm(h.float(), (40,)).to(dtype), targets) == 40 - empty


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.3, 1e-4, 0.0])
@pytest.mark.parametrize("width", [24, 400])  # fewer and more features than classes
def test_a_bottleneck_leaves_as_many_directions_as_it_is_wide(dtype, spread, width):
    targets = torch.arange(60).repeat_interleave(5)
    z = (normal(60, 8)[targets] + spread * normal(300, 8, seed=1)).to(dtype)
    assert rank(z @ (normal(8, width, seed=2) / math.sqrt(8)).to(dtype) + 3, targets) == 8


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_two_classes_that_are_nearly_one_still_span_a_direction(dtype, apart):
    means = normal(4, 8)
    means[3] = means[2] + apart * means[2].norm() * torch.nn.functional.normalize(normal(8, seed=5), dim=0)
    targets = torch.arange(4).repeat_interleave(6)
    assert rank(means[targets].to(dtype), targets) == 3
    means[3] = means[2] * (1 + 0.5 * torch.finfo(dtype).eps)
    assert rank(means[targets].to(dtype), targets) == 2


def test_float64_features_need_their_own_rounding_to_be_seen_as_exact():
    means = normal(4, 8)
    means[3] = means[2] + 1e-9 * normal(8, seed=5)
    targets = torch.arange(4)
    assert (rank(means, targets, rounding_of(torch.float32)), rank(means, targets, FLOAT64)) == (2, 3)
