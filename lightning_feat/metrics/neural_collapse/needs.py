"""What the collapse measures need to be known, in sentences for whoever misses one."""

from collections.abc import Mapping

from torch import Tensor

NEED_MOMENT = frozenset({"vci", "nc1_pinv_over_k"})
NEED_RESIDUALS = frozenset({"nc1_pinv_over_k", "nc1_pinv_over_k_balanced", "ncc_accuracy", "nc4_mismatch"})
_NEED_A_SIMPLEX = ("nc2_etf_error", "nc2_equiangularity", "nc2_weight_etf_error", "nc2_weight_equiangularity")


def why_undefined(values: Mapping[str, Tensor], counts: Tensor, num_features: int) -> str:
    """Why some of the ``values`` of ``collapse_measures`` are nan: too few samples. Empty where they are enough.

    Args:
        values: scalars by the names of the measures.
        counts: ``(C,)`` samples of each class.
        num_features: width D of the features.

    Example:
        >>> import torch
        >>> why_undefined({"cdnv": torch.tensor(torch.nan)}, torch.tensor([1, 1]), 8)
        '2 samples of 2 classes, none with two: no spread within classes is known, and NC1 and CDNV are nan.'
    """
    samples, seen = float(counts.sum()), int((counts > 0).sum())
    if 0 < samples <= seen and values.keys() & {"nc1_quotient", "cdnv", "nc1_pinv_over_k"}:
        return (
            f"{samples:g} samples of {seen} classes, none with two: no spread within classes is known, and NC1 and "
            "CDNV are nan."
        )
    if "vci" in values and values["vci"].isnan() and seen < samples <= num_features + 1:
        return (
            f"vci is nan, as a linear probe on {num_features} features fits any {samples:g} samples. It needs more "
            f"than {num_features + 1}, and ten times as many to be right to a tenth."
        )
    return ""


def how_to_know(name: str, num_classes: int, num_features: int, has_moment: bool) -> str:
    """What to do for a measure that ``metrics.NeuralCollapse`` does not know yet.

    Args:
        name: of the measure.
        num_classes: number of classes C.
        num_features: width D of the features.
        has_moment: whether the second moment is kept.

    Example:
        >>> how_to_know("nc4_mismatch", num_classes=3, num_features=8, has_moment=False)
        'run over the samples again after start_second_pass(), with the logits'
    """
    if name in NEED_MOMENT and not has_moment:
        return "set second_moment=True, or run a second pass" + (" with within_scatter=True" * (name == "vci"))
    if name in NEED_RESIDUALS:
        logits = ", with the logits" if name == "nc4_mismatch" else ""
        return f"run over the samples again after start_second_pass(){logits}"
    if name in _NEED_A_SIMPLEX and num_features < num_classes - 1:
        return f"no simplex of {num_classes} classes fits {num_features} features"
    return "give the classifier by set_classifier()"
