import math

import pytest
import torch
import torch.distributed

from lightning_feat.functional.grassmann import principal_angles, random_basis
from lightning_feat.functional.transfer.class_separation import (
    class_separation_r2,
    direction_sums,
    pair_angle_sums,
    within_class_variability,
)
from lightning_feat.metrics import ClassSeparation, WithinClassVariability
from lightning_feat.metrics.grassmann import subspace_angles, subspace_distances
from tests.pairs import two_processes

C, D, SIZE = 4, 6, 41


def samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(SIZE) % 3  # the last class stays empty
    return torch.randn(C, D, generator=generator)[targets] + torch.randn(SIZE, D, generator=generator), targets


def measured(parts):
    features, targets = samples()
    metrics = ClassSeparation(C, D), WithinClassVariability(C)
    for part in parts:
        for metric in metrics:
            metric.update(features[part], targets[part])
    return torch.stack([metric.compute() for metric in metrics])


def test_r2_over_unequal_batches_is_the_function_over_all_samples():
    value = measured([slice(0, 7), slice(7, 33), slice(33, SIZE)])[0]
    torch.testing.assert_close(value, class_separation_r2(direction_sums(*samples(), C)), rtol=1e-12, atol=0)


def test_variability_is_of_the_pairs_inside_the_batches():
    features, targets = samples()
    parts = [slice(0, 7), slice(7, SIZE)]
    sums = [pair_angle_sums(features[part], targets[part], C) for part in parts]
    expected = sum(s.angles for s in sums)[:3] / sum(s.pairs for s in sums)[:3]
    torch.testing.assert_close(measured(parts)[1], expected.mean() * 180 / math.pi)
    torch.testing.assert_close(measured([slice(None)])[1], within_class_variability(pair_angle_sums(*samples(), C)))


def test_repeated_and_non_finite_samples_are_left_out_of_both():
    features, targets = samples()
    dirty = torch.cat([features, features[:2], torch.full((2, D), torch.nan)])
    dirty[-1, 1:] = torch.inf
    labels = torch.cat([targets, targets[:2], torch.tensor([0, 1])])
    repeated = torch.arange(SIZE + 4).ge(SIZE) & torch.arange(SIZE + 4).lt(SIZE + 2)
    expected = measured([slice(None)])
    for metric, value in zip((ClassSeparation(C, D), WithinClassVariability(C)), expected, strict=True):
        metric.update(dirty, labels, repeated)
        torch.testing.assert_close(metric.compute(), value)


def test_feature_maps_are_refused():
    for metric in (ClassSeparation(C, D), WithinClassVariability(C)):
        with pytest.raises(ValueError, match=r"\(N, D\)"):
            metric.update(torch.zeros(2, D, 3), torch.tensor([0, 1]))


def worker(process, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process, world_size=2)
    torch.save(measured([slice(0, 7), slice(7, 11)] if process == 0 else [slice(11, SIZE)]), f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    two_processes(worker, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{process}.pt") for process in range(2))
    assert first.equal(second)
    expected = measured([slice(0, 7), slice(7, 11), slice(11, SIZE)])
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=0)


def basis_of(classes):
    return random_basis(classes, 2, 8, generator=torch.Generator().manual_seed(0))


def test_up_to_max_pairs_all_subspaces_are_compared_and_beyond_a_sample_without_repeats():
    basis = basis_of(12)  # 66 pairs
    pairs = [principal_angles(basis[i], basis[j]) for i in range(12) for j in range(i + 1, 12)]
    everything = torch.stack(pairs).double()
    # arccos of float32 cosines: 1e-7 over the sine of angles that are not small
    torch.testing.assert_close(subspace_angles(basis, 66).double(), everything, rtol=0, atol=1e-5)
    for most in (1, 10, 20, 65):  # drawn with and without a permutation of all pairs
        some = subspace_angles(basis, most).double()
        apart = (some[:, None] - everything).abs().amax(2)
        assert some.shape == (most, 2)
        assert (apart.min(1).values < 1e-5).all()
        assert len(apart.argmin(1).unique()) == most


def test_the_sample_of_pairs_follows_the_seed_and_leaves_the_random_numbers():
    basis, state = basis_of(12), torch.get_rng_state()
    assert subspace_angles(basis, 10, seed=1).equal(subspace_angles(basis, 10, seed=1))
    assert not subspace_angles(basis, 10, seed=1).equal(subspace_angles(basis, 10, seed=2))
    assert torch.get_rng_state().equal(state)


def test_distances_are_the_norms_of_the_principal_angles():
    start, end = basis_of(6)[:3], basis_of(6)[3:]
    expected = torch.stack([principal_angles(a, b).square().sum().sqrt() for a, b in zip(start, end, strict=True)])
    torch.testing.assert_close(subspace_distances(end, start), expected)
    assert subspace_distances(start, start.flip(1)).abs().max() < 1e-5  # another basis of the same subspaces
    with pytest.raises(ValueError, match=r"but started as \(3, 2, 8\)"):
        subspace_distances(basis_of(4), start)
