"""What unequal classes do to a classifier, taken back after training: lengths of its rows, and its prior.

Shapes: C classes, D features.
"""

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.shapes import check_shapes


def realigned_lengths(weight: Tensor, power: float = 1.0, lengths: Tensor | None = None) -> Tensor:
    r"""The factor of each row of a classifier that takes back what class sizes did to its length.

    .. math:: s_c \propto r_c \, \lVert w_c \rVert^{-\tau}

    scaled so that the mean length of the rows stays. Rows of large classes grow longer in training, and win where they
    should not. With :math:`\tau = 1` and no given lengths all rows become equally long, for classes that are equally
    frequent ("global realignment"; Kang et al., "Decoupling representation and classifier", ICLR 2020, for any
    :math:`\tau`). With the row lengths r of a classifier that was trained on some client's classes, rows take its
    pattern ("local realignment"). Source: Xiao et al., "FedLoGe", ICLR 2024, and its code, which divides by the lengths
    of an auxiliary classifier.

    Args:
        weight: ``(C, D)``, the rows of the classifier, or of an auxiliary one that was trained beside a fixed one.
        power: exponent :math:`\tau`; 0 leaves the lengths as they are.
        lengths: ``(C,)`` pattern r, above zero; None for equal ones.

    Returns:
        ``(C,)`` float64; 1 for a row of zeros.

    Raises:
        ValueError: if shapes do not fit, or a length is not above zero.

    Example:
        >>> realigned_lengths(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([0.6667, 2.0000], dtype=torch.float64)
    """
    check_shapes(weight=(weight, "CD"))
    length_C = torch.linalg.vector_norm(to_float64(weight), dim=1)
    pattern_C = torch.ones_like(length_C)
    if lengths is not None:
        check_shapes(weight=(weight, "CD"), lengths=(lengths, "C"))
        pattern_C = to_float64(lengths).to(length_C.device)
        if not bool((pattern_C > 0).all()):
            raise ValueError(f"lengths={pattern_C.tolist()}: each must be above zero.")
    empty_C = length_C == 0
    factor_C = pattern_C * torch.where(empty_C, 1.0, length_C).pow(-power)
    factor_C = factor_C * (length_C.sum() / (factor_C * length_C).sum())
    return torch.where(empty_C, 1.0, factor_C)


def prior_shift(frequencies: Tensor, train_frequencies: Tensor) -> Tensor:
    r"""What to add to the logits where classes are otherwise frequent than they were in training.

    :math:`\log \pi'_c - \log \pi_c`: exact for a classifier whose probabilities are right on the training distribution.
    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, section 4.

    Args:
        frequencies: ``(C,)`` samples or shares of the classes where the classifier is used; equal numbers for balanced
            classes. Zero for a class that does not occur: its logit becomes minus infinity.
        train_frequencies: ``(C,)`` those in training, above zero.

    Raises:
        ValueError: if shapes do not fit, a number is negative, or one in training is zero.

    Example:
        >>> prior_shift(torch.tensor([1.0, 1.0]), torch.tensor([90.0, 10.0])).round(decimals=3)
        tensor([-0.5880,  1.6090], dtype=torch.float64)
    """
    check_shapes(frequencies=(frequencies, "C"), train_frequencies=(train_frequencies, "C"))
    new_C, old_C = to_float64(frequencies), to_float64(train_frequencies).to(frequencies.device)
    if not bool((new_C >= 0).all()) or not bool((old_C > 0).all()) or not bool(new_C.sum() > 0):
        raise ValueError(
            f"frequencies={new_C.tolist()} must not be negative, nor all zero, and train_frequencies={old_C.tolist()} "
            "must be above zero: of a class that was never trained on, nothing is known."
        )
    return (new_C / new_C.sum()).log() - (old_C / old_C.sum()).log()
