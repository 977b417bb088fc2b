"""What a data set is reduced to before anything is measured on its classes: sums that add over batches and ranks.

One pass gives counts, sums and squared norms per class and, where wanted, the second moment of all features. What
needs the class means first (nearest mean, residuals) takes a second pass, see ``second_pass``.

Shapes: N samples, D features, C classes, S classes with samples.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_feat.functional.common.looks import values_are_at_hand
from lightning_feat.functional.common.shapes import check_shapes

GlobalMean = Literal["classes", "samples"]


class ClassSums(NamedTuple):
    """Sums over samples. Those of two disjoint sets of samples add up, entry by entry, to those of their union."""

    counts: Tensor  # (C,) samples in each class
    sums: Tensor  # (C, D) sum of the features of each class
    squares: Tensor  # (C,) sum of the squared norms of the features of each class


def accumulation_device(device: torch.device) -> torch.device:
    """Where float64 sums of features on ``device`` can live: there, except on MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(values: Tensor) -> Tensor:
    """``values`` as float64; see :func:`accumulation_device`."""
    return values.to(accumulation_device(values.device)).double()


def check_target_range(targets: Tensor, num_classes: int) -> None:
    """Raise a ``ValueError`` where a class index lies outside ``[0, num_classes)``; waits for the device."""
    if targets.numel() == 0:
        return
    smallest, largest = (int(end) for end in targets.aminmax())
    if largest >= num_classes:
        raise ValueError(
            f"a target is {largest} but num_classes={num_classes}: set num_classes to at least {largest + 1}, "
            f"counting classes that this batch does not hold; or, if {largest} marks what has no label, leave such "
            f"samples out (of a callback: ignore_index={largest})."
        )
    if smallest < 0:
        raise ValueError(
            f"a target is {smallest}, targets are class indices from 0 to num_classes - 1 = {num_classes - 1}: "
            f"leave out the samples that carry a marker for 'no label' (of a callback: ignore_index={smallest})."
        )


def check_values(targets: Tensor, num_classes: int) -> None:
    """Raise a ``ValueError`` where class indices are out of range, or rows of soft targets do not sum to one; waits for
    the device.
    """
    if not targets.is_floating_point():
        check_target_range(targets, num_classes)
    elif targets.ndim != 2:
        raise ValueError(f"soft targets are (N, C), a row for each sample, got {tuple(targets.shape)}.")
    elif targets.numel() and ((targets.double().sum(1) - 1).abs().max() > 2e-2 or targets.min() < 0):
        raise ValueError(  # 2e-2: rows that were rounded to bfloat16
            f"rows of soft targets must be non-negative and sum to one; the sums lie between "
            f"{float(targets.sum(1).min()):.4g} and {float(targets.sum(1).max()):.4g}. Of logits take the softmax; "
            "where samples have several labels at once, choose one for each."
        )


def check_batch(features: Tensor, targets: Tensor, num_classes: int, weights: Tensor | None = None) -> bool:
    """Whether targets are soft; raise a ``ValueError`` where shapes, dtypes or class indices fit neither form.

    Values are looked at on the CPU only: elsewhere it would make every batch wait for the device.
    """
    soft = targets.ndim == 2 and targets.is_floating_point()
    wanted = (features.shape[0], num_classes) if soft else features.shape[:1]
    if features.ndim != 2 or targets.shape != wanted:
        raise ValueError(
            f"features must be (N, D) and targets (N,) class indices, or (N, {num_classes}) floating soft targets; got "
            f"{tuple(features.shape)} and {tuple(targets.shape)} {targets.dtype}: pool or flatten feature maps first."
        )
    if not soft and targets.is_floating_point():
        raise ValueError(
            f"targets (N,) must be integer class indices, got {targets.dtype}: give soft targets as (N, num_classes)."
        )
    if values_are_at_hand(targets):
        check_values(targets, num_classes)
    check_shapes(features=(features, "ND"), weights=(weights, "N"))
    return soft


def empty_class_sums(num_classes: int, num_features: int, device: torch.device | str | None = None) -> ClassSums:
    """The sums of no samples, float64."""
    shapes = (num_classes,), (num_classes, num_features), (num_classes,)
    return ClassSums(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


def add_class_sums_(totals: ClassSums, features: Tensor, targets: Tensor, weights: Tensor | None = None) -> ClassSums:
    """Add a batch to ``totals`` in place and return them. The arguments are those of :func:`class_sums`.

    In place because C x D may be a thousand times the batch: hard targets touch N rows of ``totals.sums`` and no more.
    """
    num_classes = len(totals.counts)
    soft = check_batch(features, targets, num_classes, weights)
    # float64: near collapse a variance is a small difference of large sums, of which float32 keeps only rounding.
    h_ND = to_float64(features)
    targets = targets.to(h_ND.device)
    square_N: Tensor = vector_norm(h_ND, dim=1).square()  # no second (N, D): 2 ms at D = 2048
    if soft:
        member_NC = targets.double() if weights is None else targets.double() * weights.to(h_ND)[:, None]
        totals.counts.add_(member_NC.sum(0))
        totals.sums.addmm_(member_NC.T, h_ND)
        totals.squares.addmv_(member_NC.T, square_N)
        return totals
    index_N, one_N = targets.long(), torch.ones_like(square_N)
    if weights is not None:
        one_N = weights.to(h_ND)
        h_ND, square_N = h_ND * one_N[:, None], square_N * one_N
    # One CPU core, N = 128: the whole function takes 0.08 ms at C x D = 10 x 512 and 0.2 ms at 1000 x 2048, a product
    # with a one-hot matrix instead 0.13 and 13 ms.
    totals.counts.index_add_(0, index_N, one_N)
    totals.sums.index_add_(0, index_N, h_ND)
    totals.squares.index_add_(0, index_N, square_N)
    return totals


def class_sums(features: Tensor, targets: Tensor, num_classes: int, weights: Tensor | None = None) -> ClassSums:
    """Sum a batch into what the collapse measures need, in float64, on the device of ``features`` (MPS: on the CPU).

    Args:
        features: ``(N, D)``, any floating dtype; N may be zero.
        targets: ``(N,)`` integer class indices in ``[0, num_classes)``; or ``(N, C)`` floating soft targets, rows that
            sum to one (mixup, label smoothing), by which a sample counts in part for several classes.
        num_classes: number of classes C, counting those absent from the batch.
        weights: ``(N,)`` factor of each sample, zero to leave it out; None counts every sample once.

    Raises:
        ValueError: if shapes or dtypes fit neither form, a class index is out of range (checked on the CPU alone), or
            soft targets do not sum to one.

    Example:
        >>> class_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 1]), num_classes=2).sums
        tensor([[0., 0.],
                [4., 6.]], dtype=torch.float64)
    """
    width = features.shape[-1] if features.ndim else 0
    totals = empty_class_sums(num_classes, width, accumulation_device(features.device))
    return add_class_sums_(totals, features, targets, weights)


def second_moment(features: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the outer products of the features, ``(D, D)`` float64: ``8 D^2`` bytes, ``2 N D^2`` operations."""
    check_shapes(features=(features, "ND"), weights=(weights, "N"))
    h_ND = to_float64(features)
    return (h_ND if weights is None else h_ND * weights.to(h_ND)[:, None]).T @ h_ND


def class_means(totals: ClassSums) -> Tensor:
    """Mean of each class, ``(C, D)``; nan for a class without samples."""
    return totals.sums / totals.counts[:, None]


def present_class_means(totals: ClassSums) -> Tensor:
    """Means of the classes that have samples, ``(S, D)``, S <= C. The gradient of the others is zero, where one through
    ``class_means`` is nan.
    """
    present_C = totals.counts > 0
    return totals.sums[present_C] / totals.counts[present_C, None]


def class_variances(totals: ClassSums, residual_squares: Tensor | None = None) -> Tensor:
    """Mean squared distance of each class to its mean (over n, not n - 1), ``(C,)``; nan without samples.

    From the sums alone it is a difference of two mean squares, right to some 1e-15 of these; the ``residual_squares``
    ``(C,)`` of a second pass have no such floor.
    """
    if residual_squares is not None:
        return residual_squares / totals.counts
    variance_C = totals.squares / totals.counts - class_means(totals).square().sum(1)
    return variance_C.clamp(min=0)  # rounding can dip below zero


def has_spread(totals: ClassSums) -> Tensor:
    """Whether samples outnumber their classes: else each is its class's mean, and no spread within classes is known."""
    return totals.counts.sum() > (totals.counts > 0).sum()


def feature_mean(totals: ClassSums, global_mean: GlobalMean = "classes") -> Tensor:
    """Global mean ``(D,)``: of the class means, each counted once ("classes"), or of all samples ("samples").

    The two differ when classes are unequal, and with them every centred measure.

    Raises:
        ValueError: if ``global_mean`` is neither.
    """
    if global_mean == "classes":
        return present_class_means(totals).mean(0)
    if global_mean == "samples":
        return totals.sums.sum(0) / totals.counts.sum()
    raise ValueError(f"global_mean must be 'classes' or 'samples', got {global_mean!r}")


def centered_class_means(totals: ClassSums, global_mean: GlobalMean = "classes") -> Tensor:
    """Class means minus the global mean, ``(S, D)``, for the classes with samples, in their order."""
    return present_class_means(totals) - feature_mean(totals, global_mean)


def repeated_by_sampler(
    first: int, batch_size: int, process: int, num_processes: int, dataset_size: int, device: torch.device | None = None
) -> Tensor:
    """Mask ``(batch_size,)`` of the samples that ``DistributedSampler`` repeats to give all processes equally many.

    The sampler deals its (shuffled) order out in turn and fills it up at the end: the ``j``-th sample of process ``r``
    of ``W`` stands at place ``j W + r``, and the places from ``dataset_size`` on are repeats.

    Args:
        first: samples this process has had in this epoch before the batch.
        batch_size: samples in the batch.
        process: index of this process.
        num_processes: how many there are.
        dataset_size: samples in the data set, before any are repeated.
        device: where to put the mask.

    Example:
        >>> repeated_by_sampler(first=2, batch_size=2, process=1, num_processes=2, dataset_size=7)
        tensor([False,  True])
    """
    return (first + torch.arange(batch_size, device=device)) * num_processes + process >= dataset_size
