"""How much a classifier relies on one feature of its inputs, where another would do as well.

Shapes: N samples, C classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.common.shapes import check_shapes

Measure = Callable[[Tensor, Tensor], Tensor]


class SelectionQuality(NamedTuple):
    """How well a selection of examples meets those that were wanted; scalars, float64."""

    share: Tensor  # of all examples that were selected
    precision: Tensor  # share of the selected that were wanted; nan if none was selected
    recall: Tensor  # share of the wanted that were selected; nan if none was wanted


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose largest output, of ``(N, C)``, is that of the class in ``targets`` ``(N,)``; nan for none.

    Scalar, float64, as all that this file gives.
    """
    check_shapes(outputs=(outputs, "NC"), targets=(targets, "N", int))
    check_target_range(targets, outputs.shape[1])
    return (outputs.argmax(1) == targets).double().mean()


def binary_auc(outputs: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve of two classes: how often a sample of class 1 has the larger score, ties counting half.

    Args:
        outputs: scores of class 1 ``(N,)``, or outputs ``(N, 2)``, whose difference is the score.
        targets: ``(N,)`` 0 or 1.

    Returns:
        0.5 for scores that tell nothing; nan where a class is missing. Time and memory are those of a sort.

    Example:
        >>> binary_auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
        tensor(0.8750, dtype=torch.float64)
    """
    if outputs.ndim == 2 and outputs.shape[1] == 2:
        outputs = outputs[:, 1] - outputs[:, 0]
    if outputs.ndim != 1 or outputs.shape != targets.shape or ((targets != 0) & (targets != 1)).any():
        raise ValueError(
            f"binary_auc needs scores (N,) or outputs (N, 2) and targets 0 or 1, got {tuple(outputs.shape)} and "
            f"{tuple(targets.shape)}: with more classes take the accuracy."
        )
    _, place, count = outputs.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2.0).double()[place]  # from 1, samples with one score sharing their mean
    positive = (targets == 1).sum().double()
    negative = len(targets) - positive
    return (rank[targets == 1].sum() - positive * (positive + 1) / 2) / (positive * negative)


def permuted_block(inputs: Tensor, block: Tensor, order: Tensor) -> Tensor:
    """Inputs ``(N, ...)`` in which sample i has the block of sample ``order[i]`` and the rest of its own.

    Args:
        inputs: any dtype.
        block: bool, the shape of one input or broadcast to it; True where the block is.
        order: ``(N,)`` indices.
    """
    if block.dtype != torch.bool:
        raise ValueError(f"block must be bool, True where the block is, got {block.dtype}.")
    check_shapes(order=(order, "N", int))
    if order.shape != inputs.shape[:1] or (order.device.type == "cpu" and len(order) and not _in_range(order)):
        raise ValueError(
            f"order {tuple(order.shape)} must give one index for each of the inputs {tuple(inputs.shape)}."
        )
    fits = all(size in (1, whole) for size, whole in zip(block.shape[::-1], inputs.shape[:0:-1], strict=False))
    if block.ndim >= inputs.ndim or not fits:
        raise ValueError(f"block {tuple(block.shape)} is not the shape of one input {tuple(inputs.shape[1:])}.")
    return torch.where(block, inputs[order], inputs)


@torch.no_grad()
def block_randomized(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    block: Tensor,
    measure: Measure = accuracy,
    repeats: int = 1,
    seed: int = 0,
) -> Tensor:
    r"""A measure with one block of the inputs dealt out anew among the samples, mean over permutations.

    For a measure m and permutations :math:`\pi` uniform over all :math:`N!`,

    .. math:: \mathbb{E}_\pi\, m\big(f(x_{\bar B, i}, x_{B, \pi(i)})_i, (y_i)_i\big)

    The block keeps its distribution, and loses what it tells about the class and about the rest. Near the measure
    without it, f ignores the block; near chance (an AUC of 0.5, an accuracy of 1 / C), f relies on the block alone.
    Source: Shah, Tamuly, Raghunathan, Jain, Netrapalli, "The pitfalls of simplicity bias in neural networks", NeurIPS
    2020, arXiv 2006.07710, who call it randomised accuracy and AUC. With one class in ten a network that follows the
    block is still right by chance one time in ten.

    Args:
        model: from inputs ``(N, ...)`` to outputs for ``measure``; called once a repeat, in the mode it is in, with all
            samples: cut them into batches there.
        inputs: ``(N, ...)``.
        targets: ``(N,)`` class indices.
        block: see ``permuted_block``.
        measure: ``measure(outputs, targets)``, such as ``accuracy`` or ``binary_auc``.
        repeats: permutations.
        seed: of the permutations, drawn on the CPU; the global random numbers stay as they are.

    Example:
        >>> inputs = torch.eye(3).repeat(200, 1)
        >>> targets = torch.arange(600) % 3
        >>> everything = torch.ones(3, dtype=torch.bool)
        >>> bool((block_randomized(lambda x: x, inputs, targets, everything) - 1 / 3).abs() < 0.07)
        True
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1.")
    if inputs.shape[:1] != targets.shape:
        raise ValueError(f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} must be (N, ...) and (N,).")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(repeats):
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        found.append(measure(model(permuted_block(inputs, block, order)), targets).double())
    return torch.stack(found).mean()


def feature_reliance(predictions: Tensor, feature: Tensor, num_classes: int) -> Tensor:
    r"""How far predictions follow a feature, where it is independent of all others: 0 as by chance, 1 always.

    .. math:: R(s) = \frac{P(\hat y = s) - 1 / C}{1 - 1 / C}

    with s the class that the feature stands for. Of two classes that is :math:`2 P - 1`, the mean product of the signs
    of output and feature. A feature that is avoided gives less than zero, at least :math:`-1 / (C - 1)`. Where s and
    the other feature are independent and one of them is uniform, following the other alone gives 0.

    Source: the probe is that of Hermann, Mobahi, Fel, Mozer, "On the foundations of shortcut learning", ICLR 2024,
    arXiv 2310.16228: a balanced grid of both features, on which the output is compared with each. The normalisation to
    0 and 1, and more than two classes, are ours.

    Args:
        predictions: ``(N,)`` predicted classes, over samples that cross every value of the feature with the others.
        feature: ``(N,)`` class that the feature stands for.
        num_classes: number of classes C.

    Example:
        >>> core, shortcut = torch.arange(3).repeat(3), torch.arange(3).repeat_interleave(3)
        >>> feature_reliance(shortcut, shortcut, 3), feature_reliance(shortcut, core, 3)
        (tensor(1., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    _check(predictions, feature)
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: reliance needs at least two classes.")
    for classes in (predictions, feature):
        check_target_range(classes, num_classes)
    return ((predictions == feature).double().mean() - 1 / num_classes) / (1 - 1 / num_classes)


def shortcut_bias(predictions: Tensor, best: Tensor, shortcut: Tensor, num_classes: int) -> Tensor:
    r"""By how much a classifier relies on the shortcut more than the best one does: :math:`R - R^*`.

    A predictive shortcut deserves to be used; bias is only what goes beyond. Zero for the best classifier, negative for
    one that uses the shortcut less. Source as for ``feature_reliance``, where the best classifier is the Bayes
    classifier of the training distribution (there linear discriminant analysis).

    Args:
        predictions: ``(N,)`` classes predicted on the balanced probe.
        best: ``(N,)`` those that the best classifier predicts for the same samples.
        shortcut: ``(N,)`` class that the shortcut stands for.
        num_classes: number of classes C.
    """
    return feature_reliance(predictions, shortcut, num_classes) - feature_reliance(best, shortcut, num_classes)


def slow_feature_accuracy(predictions: Tensor, targets: Tensor, fast_agrees: Tensor) -> Tensor:
    """Accuracy over the samples ``(N,)`` of which the fast feature does not tell the class; nan where there are none.

    There only the slow feature helps. Where a fast feature tells another class, as in a test with conflicting
    features, it is also what is left when both pull.
    """
    _check(predictions, targets)
    if fast_agrees.shape != targets.shape or fast_agrees.dtype != torch.bool:
        raise ValueError(
            f"fast_agrees must be bool {tuple(targets.shape)}, got {fast_agrees.dtype} {tuple(fast_agrees.shape)}."
        )
    return (predictions == targets)[~fast_agrees].double().mean()


def selection_quality(selected: Tensor, wanted: Tensor) -> SelectionQuality:
    """Share, precision and recall of a selection ``(N,)`` against the examples ``(N,)`` that it should have met.

    Example:
        >>> selection_quality(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True]))
        SelectionQuality(share=tensor(0.5000, dtype=torch.float64), precision=tensor(0.5000, dtype=torch.float64), \
recall=tensor(0.3333, dtype=torch.float64))
    """
    if selected.dtype != torch.bool or wanted.dtype != torch.bool or selected.shape != wanted.shape:
        raise ValueError(
            f"selected and wanted must be bool of one shape, got {selected.dtype} {tuple(selected.shape)} and "
            f"{wanted.dtype} {tuple(wanted.shape)}."
        )
    met = (selected & wanted).sum().double()
    return SelectionQuality(selected.double().mean(), met / selected.sum(), met / wanted.sum())


def _in_range(order: Tensor) -> bool:
    return int(order.min()) >= 0 and int(order.max()) < len(order)


def _check(predictions: Tensor, targets: Tensor) -> None:
    if predictions.ndim != 1 or predictions.is_floating_point():
        raise ValueError(
            f"predictions must be classes (N,), got {predictions.dtype} {tuple(predictions.shape)}: take the argmax of "
            "outputs first."
        )
    check_shapes(predictions=(predictions, "N"), targets=(targets, "N", int))
