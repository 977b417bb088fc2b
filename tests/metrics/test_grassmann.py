import torch

from lightning_feat.metrics.grassmann import subspace_geometry

AXES = torch.eye(6, dtype=torch.float64)


def test_geometry_of_planes_at_known_angles():
    turned = torch.stack([(AXES[0] + AXES[2]) / 2**0.5, AXES[3]])  # 45 and 90 degrees from the first plane
    basis = torch.stack([AXES[:2], turned, AXES[4:]])
    values = subspace_geometry(basis, start=torch.stack([AXES[:2], turned, AXES[2:4]])).values
    torch.testing.assert_close(values["smallest_angle"], torch.tensor(45.0, dtype=torch.float64))
    torch.testing.assert_close(values["angle_mean"], torch.tensor((45 + 5 * 90) / 6, dtype=torch.float64))
    torch.testing.assert_close(values["distance_from_start_max"], torch.tensor(torch.pi / 2**0.5, dtype=torch.float64))
    torch.testing.assert_close(values["distance_from_start_mean"], values["distance_from_start_max"] / 3)
    assert values["orthonormality_error"] < 1e-15


def test_a_single_class_has_no_angles_and_beside_a_head_the_smallest_is_left_out():
    assert subspace_geometry(AXES[None, :2]).values.keys() == {"orthonormality_error"}
    beside = subspace_geometry(torch.stack([AXES[:2], AXES[2:4]]), alone=False)
    assert beside.values.keys() == {"orthonormality_error", "angle_mean"}
