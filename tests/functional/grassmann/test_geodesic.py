"""The in-place geodesic step against the formula with a singular value decomposition, in bases of rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_feat.functional.common.precision import full_precision
from lightning_feat.functional.grassmann import geodesic as grassmann_geodesic
from lightning_feat.functional.grassmann import geodesic_, geodesic_distance, orthonormality_error, random_basis
from lightning_feat.functional.grassmann.geodesic import cos_and_sinc

DATA = Path(__file__).parents[2] / "data"


def svd_geodesic(start: Tensor, displacement: Tensor) -> Tensor:
    """S -> (S V cos + U sin) V^T with U sigma V^T the tangent part, written for columns and turned back to rows."""
    s, delta = start.mT, displacement.mT
    tangent = delta - s @ (s.mT @ delta)
    tangent = tangent - s @ (s.mT @ tangent)  # twice: a large part inside the subspace leaves its rounding
    u, sigma, vt = torch.linalg.svd(tangent, full_matrices=False)
    return ((s @ vt.mT * sigma.cos()[:, None] + u * sigma.sin()[:, None]) @ vt).mT


def displacement_with_angles(start: Tensor, angles: list[float], seed: int = 1) -> Tensor:
    """A tangent displacement of every class of ``start`` with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    classes, k, width = start.shape
    normal = torch.randn(classes, width, k, generator=generator, dtype=start.dtype)
    outside = torch.linalg.qr(normal - start.mT @ (start @ normal)).Q
    v = torch.linalg.qr(torch.randn(classes, k, k, generator=generator, dtype=start.dtype)).Q
    return v @ torch.tensor(angles, dtype=start.dtype).diag() @ outside.mT


def bases(classes: int, k: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return random_basis(classes, k, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=["looking", "blind"])
def device_kind(request, monkeypatch):
    """Both ways through the code: a CPU looks at values to spare work, an accelerator runs everything unseen."""
    if request.param == "blind":
        monkeypatch.setattr(grassmann_geodesic, "_may_look", lambda tensor: False)


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize(
    "angles",
    [
        [0.3, 0.2, 0.1, 0.05],
        [0.2, 0.2, 0.2, 0.2],  # repeated: the SVD is not unique, the geodesic is
        [0.5, 0.5, 1e-9, 0.0],  # repeated, tiny and vanishing at once
        [1e-7, 1e-8, 1e-9, 1e-10],
        [1.7, 2.5, 3.1, 0.1],  # past a right angle
        [12.0, 7.0, 40.0, 1e-3],  # several turns
        [0.0, 0.0, 0.0, 0.0],
    ],
)
@pytest.mark.parametrize("inside", [0.0, 0.3, 1e4])
def test_step_is_the_svd_geodesic(angles, inside):
    start = bases(5, 4, 30)
    generator = torch.Generator().manual_seed(2)
    mix = inside * torch.randn(5, 4, 4, generator=generator, dtype=torch.float64)
    displacement = displacement_with_angles(start, angles) + mix @ start
    expected = svd_geodesic(start, displacement)
    # 1e-10: float64 rounds a displacement of 1e4 to 2e-12, and 40 radians multiply roundings by about that.
    torch.testing.assert_close(geodesic_(start + displacement, start), expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("factor", [0.5, -1.0, 3.0, 0.0])
def test_factor_scales_the_displacement(factor):
    start = bases(3, 2, 9)
    displacement = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = svd_geodesic(start, factor * displacement)
    torch.testing.assert_close(geodesic_(start + displacement, start, factor=factor), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_that_did_not_move_stays_bit_for_bit_among_others_that_did(dtype):
    start = bases(4, 3, 11, dtype)
    start[1] *= 1 + 1e-6  # a repair would change it
    moved = start + 0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    moved[1] = start[1]
    geodesic_(moved, start)
    assert torch.equal(moved[1], start[1])
    assert not torch.isclose(moved[[0, 2, 3]], start[[0, 2, 3]]).all()


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_come_out_as_nan_and_only_in_their_class(bad):
    start = bases(3, 2, 7)
    moved = start + 0.1
    clean = geodesic_(moved.clone(), start)
    moved[1, 0, 3] = bad
    geodesic_(moved, start)
    assert moved[1].isnan().all()
    torch.testing.assert_close(moved[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-14)  # other roundings in other branches


def test_start_orthonormal_to_1e_6_moves_as_its_nearest_orthonormal_basis():
    exact = bases(4, 3, 20)
    generator = torch.Generator().manual_seed(5)
    lean = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    start = (
        torch.eye(3, dtype=torch.float64) + 1e-6 * (lean + lean.mT)
    ) @ exact  # symmetric: exact is its polar factor
    assert orthonormality_error(start).max() > 1e-6
    displacement = torch.randn(4, 3, 20, generator=generator, dtype=torch.float64)
    end = geodesic_(start + displacement, start)
    # Third order in 1e-5 is 1e-15; the rest is rounding.
    torch.testing.assert_close(end, svd_geodesic(exact, displacement), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("device_kind")
def test_thousand_float32_steps_stay_orthonormal():
    basis = bases(6, 8, 64, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        start = basis.clone()
        geodesic_(basis.add_(torch.randn(basis.shape, generator=generator), alpha=0.05), start)
    # One step rounds to 5e-7 (measured); without the repair a thousand of them reach 1e-5.
    assert orthonormality_error(basis).max() < 2e-6


def test_length_of_the_path_is_the_distance():
    start = bases(3, 2, 12, torch.float32)
    displacement = displacement_with_angles(start, [0.9, 0.4])
    end = geodesic_(start + displacement, start)
    # float32 rounds an angle of about one to 1e-6
    torch.testing.assert_close(geodesic_distance(start, end), torch.full((3,), (0.81 + 0.16) ** 0.5), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["grassmann_rsgd", "grassmann_rsgd_lines"])
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["single", "foreach", "fused"])
def test_torch_sgd_followed_by_the_step_gives_the_golden_trajectory(name, kind):
    golden = np.load(DATA / f"{name}.npz")
    basis = torch.nn.Parameter(torch.tensor(golden["initial_basis"]))
    optimizer = torch.optim.SGD([basis], lr=float(golden["lr"]), momentum=float(golden["momentum"]), **kind)
    for gradient, projectors in zip(golden["gradients"], golden["projectors"], strict=True):
        basis.grad = torch.tensor(gradient)
        start = basis.detach().clone()
        optimizer.step()
        geodesic_(basis, start)
        # Required: 1e-10. Both sides are float64 and 8 steps long.
        torch.testing.assert_close((basis.mT @ basis).detach(), torch.tensor(projectors), rtol=0, atol=1e-12)


def test_blocks_do_not_show(monkeypatch):
    start = bases(7, 3, 10)
    moved = start + torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = geodesic_(moved.clone(), start)
    monkeypatch.setattr(grassmann_geodesic, "_BLOCK_BYTES", 2 * 2 * 3 * 10 * 8)  # two classes at a time, then one
    torch.testing.assert_close(geodesic_(moved, start), whole, rtol=0, atol=1e-14)


def test_writes_into_moved_and_leaves_start():
    start = bases(2, 2, 5)
    kept, moved = start.clone(), start + 0.1
    assert geodesic_(moved, start).data_ptr() == moved.data_ptr()
    assert torch.equal(start, kept)
    assert geodesic_(torch.empty(0, 2, 5), torch.empty(0, 2, 5)).shape == (0, 2, 5)  # a shard without classes


def test_memory_order_of_the_basis_does_not_show():
    start = bases(3, 2, 6)
    moved = start + 0.2
    columns = moved.mT.contiguous().mT  # as a QR leaves it
    torch.testing.assert_close(geodesic_(columns, start), geodesic_(moved, start), rtol=0, atol=1e-14)


def test_nothing_reads_a_value_off_the_device():
    basis = torch.empty(4, 3, 8, device="meta")  # which has no values: reading one raises
    assert geodesic_(basis, torch.empty_like(basis)).shape == (4, 3, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_cpu_result_without_waiting_and_in_spite_of_tf32():
    start = bases(20, 4, 256, torch.float32)
    moved = start + 0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    start_cuda, moved_cuda = start.cuda(), moved.cuda()
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_sync_debug_mode("error")
    try:
        geodesic_(moved_cuda, start_cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(kept)
    # TF32 would be off by 1e-3.
    torch.testing.assert_close(moved_cuda.cpu(), geodesic_(moved, start), rtol=0, atol=2e-6)


def test_autocast_and_matmul_precision_do_not_reach_the_step():
    start = bases(4, 4, 64, torch.float32)
    moved = start + 0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    expected = geodesic_(moved.clone(), start)
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(geodesic_(moved, start), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(kept)


def test_full_precision_puts_the_switches_back_after_an_error():
    def switches():
        return torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()

    before = switches()
    with pytest.raises(RuntimeError, match="inside"), full_precision(torch.device("cpu")):
        raise RuntimeError("inside")
    assert switches() == before


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cos_and_sinc_are_those_of_the_eigenvalues(dtype):
    angle = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e-6, 0.1, 0.1, 1.0], [0.99, 1.0, 1.01, 4.0], [200.0, 2.0, 9.0, 77.0]])
    angle = angle.to(dtype)
    v = torch.linalg.qr(torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)).Q
    cos, sinc = cos_and_sinc((v * angle.square()[:, None]) @ v.mT)
    # H itself is rounded to eps of its norm, and its functions have derivatives of 1 / 2 and less.
    roundings = torch.finfo(dtype).eps * (1 + angle.square().sum(1))[:, None, None]
    for value, expected in ((cos, angle.cos()), (sinc, torch.sinc(angle / torch.pi))):
        error = value - (v * expected[:, None]) @ v.mT
        torch.testing.assert_close(error / roundings, torch.zeros_like(error), rtol=0, atol=8)


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 512.0), (torch.float64, 4096.0)])
def test_angles_too_large_to_tell_are_nan_and_not_somewhere(dtype, most):
    cos, sinc = cos_and_sinc(torch.tensor([[[(1.01 * most) ** 2]], [[(0.99 * most) ** 2]]], dtype=dtype))
    assert cos[0].isnan().all()
    assert sinc[0].isnan().all()
    # A rounding of the angle itself is eps * most; the doublings multiply it by a few.
    expected = torch.tensor(0.99 * most, dtype=torch.float64).cos().to(dtype)
    torch.testing.assert_close(cos[1, 0, 0], expected, rtol=0, atol=8 * most * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(ValueError, match="keep the basis in float32"):
        geodesic_(torch.zeros(1, 1, 2, dtype=dtype), torch.zeros(1, 1, 2, dtype=dtype))


@pytest.mark.parametrize(("moved", "start"), [((2, 3), (2, 3)), ((1, 2, 3), (2, 2, 3)), ((1, 3, 2), (1, 3, 2))])
def test_wrong_shapes_are_refused(moved, start):
    with pytest.raises(ValueError, match=r"one shape \(C, k, D\)"):
        geodesic_(torch.zeros(moved), torch.zeros(start))
