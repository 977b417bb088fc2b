"""Arguments that do not fit together are named, with what was expected."""

import pytest
import torch

from lightning_feat.functional.common.shapes import check_shapes

ONE, TWO, THREE = torch.ones(5), torch.ones(5, 3), torch.ones(2, 5, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"features": (TWO, "ND"), "targets": (torch.ones(5).long(), "N", int), "means": (torch.ones(7, 3), "CD")},
        {"features": (TWO, "ND"), "weights": (None, "N")},
        {"vectors": (THREE, "*D"), "others": (TWO, "*D")},
        {"vectors": (ONE, "*D")},
        {"basis": (THREE, "*kD"), "other": (torch.ones(1, 4, 3), "*lD")},
        {"moment": (torch.ones(3, 3), "DD")},
        {"chosen": (ONE > 0, "N", bool), "empty": (torch.ones(0, 5), "MN")},
        {"scalar": (torch.tensor(1.0), "")},
    ],
)
def test_what_fits_passes(arguments):
    check_shapes(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"features": (ONE, "ND")}, r"features must be \(N, D\), got \(5,\)\."),
        ({"targets": (TWO, "N")}, r"targets must be \(N,\), got \(5, 3\)\."),
        ({"scalar": (ONE, "")}, r"scalar must be \(\), got \(5,\)\."),
        ({"a": (TWO, "ND"), "b": (torch.ones(5, 4), "CD")}, r"b must be \(C, D\) with D = 3, got \(5, 4\)\."),
        ({"a": (TWO, "ND"), "b": (torch.ones(4, 2), "ND")}, r"b must be \(N, D\) with N = 5 and D = 3, got \(4, 2\)\."),
        ({"moment": (TWO, "DD")}, r"moment must be \(D, D\), got \(5, 3\)\."),
        ({"basis": (ONE, "*kD")}, r"basis must be \(\.\.\., k, D\), got \(5,\)\."),
        ({"a": (THREE, "*kD"), "b": (torch.ones(3, 4, 3), "*lD")}, r"do not fit together: \(2,\) of a, \(3,\) of b\."),
        ({"targets": (ONE, "N", int)}, r"targets must be whole numbers, got torch\.float32\."),
        ({"targets": (ONE > 0, "N", int)}, r"targets must be whole numbers, got torch\.bool\."),
        ({"chosen": (ONE.long(), "N", bool)}, r"chosen must be a mask of bools, got torch\.int64\."),
    ],
)
def test_what_does_not_fit_is_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        check_shapes(**arguments)


def test_a_compiled_function_checks_too():
    compiled = torch.compile(lambda x, y: (check_shapes(x=(x, "ND"), y=(y, "CD")), x @ y.T)[1], backend="eager")
    assert compiled(TWO, torch.ones(2, 3)).shape == (5, 2)
    with pytest.raises(ValueError, match="with D = 3"):
        compiled(TWO, torch.ones(2, 4))
