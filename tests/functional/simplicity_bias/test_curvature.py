import pytest
import torch

from lightning_feat.functional.simplicity_bias import top_eigenvalue


def symmetric(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    axes = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return axes @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ axes.T


def found(matrix, **options):
    start = torch.randn(len(matrix), generator=torch.Generator().manual_seed(1), dtype=matrix.dtype)
    return top_eigenvalue(lambda v: matrix @ v, start, **{"max_products": 500, "tolerance": 1e-4, **options})


@pytest.mark.parametrize(
    ("eigenvalues", "top"),
    [
        ((5.0, 2.0, 1.0, 0.0), 5.0),
        ((5.0, -2.0, 1.0), 5.0),
        ((-5.0, 2.0, 1.0), 2.0),  # the largest, not the largest in size
        ((3.0, -3.0, 1.0), 3.0),  # neither of two in size alone wins
        ((-5.0, -2.0, -1.0), -1.0),
        ((4.0, 4.0, 1.0), 4.0),
        ((-4.0, 0.0, -1.0), 0.0),
        ((1e-8, 5e-9, -1e-9), 1e-8),
        ((1e8, 1.0, 2.0), 1e8),
    ],
)
def test_of_a_known_quadratic(eigenvalues, top):
    result = found(symmetric(eigenvalues))
    scale = max(abs(value) for value in eigenvalues)
    assert float(result.value) == pytest.approx(top, rel=1e-5, abs=1e-5 * scale)


def test_of_a_random_matrix_it_is_that_of_the_dense_one():
    matrix = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix + matrix.T
    assert float(found(matrix).value) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-5)


def test_float32_products():
    matrix = symmetric((5.0, 2.0, 1.0)).float()
    result = found(matrix, tolerance=1e-3)
    assert result.converged
    assert float(result.value) == pytest.approx(5.0, rel=1e-5)


def test_zero_and_what_is_not_finite():
    assert float(found(torch.zeros(3, 3)).value) == 0
    assert found(torch.full((3, 3), torch.nan)).value.isnan()
    assert found(torch.full((3, 3), torch.inf)).value.isnan()
    assert top_eigenvalue(lambda v: v, torch.zeros(0)).value.isnan()


def test_the_bound_counts():
    calls = []
    matrix = symmetric((5.0, 4.99, 1.0))
    start = torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = top_eigenvalue(lambda v: calls.append(None) or matrix @ v, start, max_products=4, tolerance=1e-12)
    assert not result.converged
    assert result.products == len(calls) == 8


@pytest.mark.parametrize(
    ("start", "options"),
    [
        (torch.ones(2, 2), {}),
        (torch.zeros(3), {}),
        (torch.ones(3), {"max_products": 0}),
        (torch.ones(3), {"tolerance": 0}),
    ],
)
def test_what_does_not_fit_is_refused(start, options):
    with pytest.raises(ValueError, match="must be"):
        top_eigenvalue(lambda v: v, start, **options)
