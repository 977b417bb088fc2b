"""Which examples a network learns late: two clusters of its outputs in each class, and the one with the higher loss.

Shapes: N examples, F outputs of the network, C classes, B classes in a block, M examples of the largest of them, R
restarts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.shapes import check_shapes

_BLOCK_BYTES = 256 * 2**20  # of the outputs of the classes that are clustered at once


class TwoMeans(NamedTuple):
    """Each class cut in two."""

    cluster: Tensor  # (N,) 0 or 1; 0 for all examples of a class that cannot be cut
    inertia: Tensor  # (C,) float64, sum of squared distances to the nearer of the two means; nan for an empty class


class SlowExamples(NamedTuple):
    """What was learned late, and why it is thought so."""

    slow: Tensor  # (N,) bool
    cluster: Tensor  # (N,) 0 or 1
    loss: Tensor  # (C, 2) float64, mean loss of both clusters; nan for an empty one
    skipped: Tensor  # (C,) bool: no two different outputs, or both clusters with one loss


@torch.no_grad()
def two_means(
    outputs: Tensor,
    targets: Tensor,
    num_classes: int,
    restarts: int = 10,
    max_iterations: int = 100,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> TwoMeans:
    r"""Cut the outputs of each class in two by k-means with k = 2, all restarts and many classes at once.

    Lloyd's iteration from starts drawn by k-means++ (Arthur, Vassilvitskii, SODA 2007); the restart with the lowest
    inertia counts. With two means :math:`a, b` a point is nearer to b where :math:`2 \langle x, b - a \rangle > \lVert
    b \rVert^2 - \lVert a \rVert^2`, so an iteration takes two products with the outputs and no distances.

    Args:
        outputs: ``(N, F)`` floating, commonly logits; a half precision is brought to float32.
        targets: ``(N,)`` class indices.
        num_classes: number of classes C.
        restarts: starts of each class.
        max_iterations: bound; it ends as soon as no example changes sides.
        seed: of the starts; the global random numbers stay as they are. The starts are drawn on the CPU, so that every
            device begins with the same.
        device: where to compute, a block at a time: outputs too large for it may stay in the memory of the host. None
            for where they are.

    Raises:
        ValueError: if shapes do not fit, an output is NaN or inf, or a number is below one.

    Cost: ``4 N F R`` flops an iteration; blocks of 256 MiB (at least one class), in which classes are padded to the
    largest of their block, sorted by size, and about twice that for a moment.

    Example:
        >>> outputs = torch.tensor([[0.0], [0.1], [5.0], [5.1], [7.0]])
        >>> two_means(outputs, torch.tensor([0, 0, 0, 0, 1]), num_classes=2).inertia
        tensor([0.0100, 0.0000], dtype=torch.float64)
    """
    _check(outputs, targets, num_classes)
    targets = targets.long()
    if restarts < 1 or max_iterations < 1:
        raise ValueError(f"{restarts=} and {max_iterations=} must be at least 1.")
    exact = torch.promote_types(outputs.dtype, torch.float32)
    count_C = targets.bincount(minlength=num_classes)
    by_class_N = targets.argsort(stable=True)
    first_C = count_C.cumsum(0) - count_C
    cluster_N = torch.zeros_like(targets)
    inertia_C = torch.full((num_classes,), torch.nan, dtype=torch.float64, device=outputs.device)
    generator = torch.Generator().manual_seed(seed)
    draws_CR2 = torch.rand(num_classes, restarts, 2, generator=generator, dtype=torch.float64)
    device = outputs.device if device is None else torch.device(device)
    for classes_B in _blocks(count_C, outputs.shape[1] * exact.itemsize + 40 * restarts):
        slot_M = torch.arange(int(count_C[classes_B].max()), device=outputs.device)
        there_BM = slot_M < count_C[classes_B, None]
        place_BM = by_class_N[(first_C[classes_B, None] + slot_M).clamp(max=len(targets) - 1)]
        x_BMF, here_BM = outputs[place_BM].to(device, exact), there_BM.to(device)
        x_BMF *= here_BM[:, :, None]
        # Centred, as differences of large numbers cancel.
        x_BMF -= x_BMF.sum(1, keepdim=True) / here_BM.sum(1)[:, None, None]
        x_BMF *= here_BM[:, :, None]
        # By a power of two, which rounds nothing: in float32 the squares of 1e20 overflow, those of 1e-25 vanish.
        size_B = x_BMF.new_zeros(len(x_BMF), dtype=torch.float64)
        if x_BMF.numel():
            size_B = x_BMF.abs().amax((1, 2)).double()
        size_B = torch.exp2(size_B.log2().floor().nan_to_num(neginf=0.0))
        x_BMF = (x_BMF / size_B[:, None, None]).to(exact)
        side_BM, inertia_B = _cut(x_BMF, here_BM, draws_CR2[classes_B.cpu()].to(device), max_iterations)
        cluster_N[place_BM[there_BM]] = side_BM.to(outputs.device)[there_BM].to(cluster_N.dtype)
        inertia_C[classes_B] = (inertia_B * size_B.square()).to(outputs.device)
    return TwoMeans(cluster_N, inertia_C)


@torch.no_grad()
def slow_examples(
    outputs: Tensor,
    losses: Tensor,
    targets: Tensor,
    num_classes: int,
    restarts: int = 10,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> SlowExamples:
    """The cluster with the higher mean loss in each class: the examples without the feature that is easy to learn.

    A class with fewer than two different outputs, or with one mean loss for both clusters, has no slow examples.
    Source: Nguyen, Haddad, Gan, Mirzasoleiman, "Changing the training data distribution to reduce simplicity bias
    improves in-distribution generalization", NeurIPS 2024, arXiv 2404.17768, who take the outputs early in training, in
    eval mode and without augmentation, and then show these examples twice.

    Args:
        outputs: ``(N, F)``, see :func:`two_means`.
        losses: ``(N,)`` loss of each example.
        targets: ``(N,)`` class indices.
        num_classes: number of classes C.
        restarts: of k-means.
        seed: of k-means.
        device: where to cluster, see :func:`two_means`.

    Raises:
        ValueError: as :func:`two_means`, and if a loss is NaN or the losses do not fit the targets.

    Example:
        >>> outputs = torch.tensor([[4.0], [4.2], [4.1], [0.3], [0.2]])
        >>> slow_examples(outputs, (-outputs[:, 0]).exp(), torch.zeros(5, dtype=torch.long), num_classes=1).slow
        tensor([False, False, False,  True,  True])
    """
    _check(outputs, targets, num_classes)
    if losses.shape != targets.shape or losses.isnan().any():
        raise ValueError(
            f"losses {tuple(losses.shape)} must give one number for each of the {len(targets)} examples, none NaN: "
            "take the loss with reduction='none'."
        )
    targets = targets.long()  # of uint8 the double would overflow, and as an index it is a mask
    cluster_N = two_means(outputs, targets, num_classes, restarts, seed=seed, device=device).cluster
    group_N = 2 * targets + cluster_N
    count = group_N.bincount(minlength=2 * num_classes)
    total = torch.zeros(2 * num_classes, dtype=torch.float64, device=losses.device)
    loss_C2 = (total.index_add_(0, group_N, losses.double()) / count).view(num_classes, 2)
    skipped_C = ~(loss_C2[:, 0] != loss_C2[:, 1]) | loss_C2.isnan().any(1)
    slow_N = (cluster_N == loss_C2.nan_to_num(-torch.inf).argmax(1)[targets]) & ~skipped_C[targets]
    return SlowExamples(slow_N, cluster_N, loss_C2, skipped_C)


def useful_indices(
    outputs: Tensor, losses: Tensor, targets: Tensor, factor: int = 2, num_classes: int | None = None, seed: int = 0
) -> Tensor:
    """Indices ``(N',)`` of the training set in which each slow example stands ``factor`` times, in ascending order.

    For scripts: give ``torch.utils.data.Subset(dataset, indices)`` to a loader that shuffles, and every copy is
    augmented on its own. See :func:`slow_examples` for the rest.

    Example:
        >>> outputs = torch.tensor([[4.0], [4.2], [4.1], [0.3], [0.2]])
        >>> useful_indices(outputs, (-outputs[:, 0]).exp(), torch.zeros(5, dtype=torch.long))
        tensor([0, 1, 2, 3, 3, 4, 4])
    """
    if factor < 1:
        raise ValueError(f"factor={factor} must be at least 1; the paper takes 2.")
    check_shapes(targets=(targets, "N", int))
    if num_classes is None:
        num_classes = int(targets.max()) + 1 if len(targets) else 0
    slow_N = slow_examples(outputs, losses, targets, num_classes, seed=seed).slow
    return torch.arange(len(targets), device=targets.device).repeat_interleave(1 + (factor - 1) * slow_N.long())


def _check(outputs: Tensor, targets: Tensor, num_classes: int) -> None:
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or not outputs.is_floating_point():
        raise ValueError(
            f"outputs (N, F) and targets (N,) are needed, got {outputs.dtype} {tuple(outputs.shape)} and "
            f"{tuple(targets.shape)}."
        )
    if targets.is_floating_point() or len(targets) == 0 or targets.min() < 0 or targets.max() >= num_classes:
        found = f"{int(targets.min())} to {int(targets.max())}" if len(targets) else "none"
        raise ValueError(
            f"targets must be class indices below num_classes={num_classes}, got {targets.dtype}, {found}."
        )
    if not outputs.isfinite().all():
        bad = int((~outputs.isfinite().all(1)).sum())
        raise ValueError(f"{bad} of {len(outputs)} outputs are NaN or inf: has the training diverged?")


def _blocks(count_C: Tensor, row_bytes: int) -> list[Tensor]:
    """Classes that have examples, in blocks of like size, so that padding to the largest wastes little."""
    blocks: list[list[int]] = []
    for label in count_C.argsort(descending=True).tolist():
        rows = int(count_C[blocks[-1][0] if blocks else label])
        if rows == 0 or count_C[label] == 0:
            break
        if not blocks or (len(blocks[-1]) + 1) * rows * row_bytes > _BLOCK_BYTES or 2 * int(count_C[label]) < rows:
            blocks.append([])
        blocks[-1].append(label)
    return [torch.tensor(block, device=count_C.device) for block in blocks]


def _cut(x_BMF: Tensor, there_BM: Tensor, draws_BR2: Tensor, max_iterations: int) -> tuple[Tensor, Tensor]:
    """Sides ``(B, M)`` bool and inertia ``(B,)`` of centred outputs; those that are not there are zero."""
    square_BM = x_BMF.double().square().sum(2)
    number_B1 = there_BM.sum(1, keepdim=True).to(x_BMF.dtype)
    weight_BMR = there_BM[:, :, None].to(x_BMF.dtype)
    first_BRF, second_BRF = _starts(x_BMF, square_BM, there_BM, draws_BR2)
    side_BMR = torch.zeros(())
    for _ in range(max_iterations):
        axis_BRF = second_BRF - first_BRF
        middle_BR = (axis_BRF * (first_BRF + second_BRF)).sum(2) / 2
        new_BMR = ((x_BMF @ axis_BRF.mT) > middle_BR[:, None, :]).to(x_BMF.dtype) * weight_BMR
        if side_BMR.shape == new_BMR.shape and torch.equal(side_BMR, new_BMR):
            break
        side_BMR = new_BMR
        # Of centred outputs the sum of one side is minus that of the other.
        sum_BRF, count_BR = side_BMR.mT @ x_BMF, side_BMR.sum(1)
        second_BRF = sum_BRF / count_BR.clamp(min=1)[:, :, None]
        first_BRF = -sum_BRF / (number_B1 - count_BR).clamp(min=1)[:, :, None]
    count_BR, others_BR = side_BMR.sum(1).double(), (number_B1 - side_BMR.sum(1)).double()
    between_BR = count_BR * second_BRF.double().square().sum(2) + others_BR * first_BRF.double().square().sum(2)
    best_B = between_BR.argmax(1)
    side_BM = side_BMR.gather(2, best_B[:, None, None].expand(-1, side_BMR.shape[1], 1))[:, :, 0] > 0
    # By distances, and not as the total less what lies between: where the clusters are tight that would cancel.
    exact_BMF = x_BMF.double()
    inertia_B = exact_BMF.new_zeros(len(exact_BMF))
    for here_BM in (side_BM, there_BM & ~side_BM):
        mean_B1F = (exact_BMF * here_BM[:, :, None]).sum(1, keepdim=True) / here_BM.sum(1).clamp(min=1)[:, None, None]
        inertia_B += ((exact_BMF - mean_B1F) * here_BM[:, :, None]).square().sum((1, 2))
    return side_BM, inertia_B


def _starts(x_BMF: Tensor, square_BM: Tensor, there_BM: Tensor, draws_BR2: Tensor) -> tuple[Tensor, Tensor]:
    """Two examples of each class and restart, ``(B, R, F)``: one at random, one by its squared distance from that."""
    chance_BRM = there_BM.double()[:, None, :].expand(-1, draws_BR2.shape[1], -1)
    first_BRF = _drawn(x_BMF, chance_BRM, draws_BR2[:, :, 0])
    product_BRM = (first_BRF @ x_BMF.mT).double()
    own_BR1 = first_BRF.double().square().sum(2, keepdim=True)
    distance_BRM = (square_BM[:, None, :] - 2 * product_BRM + own_BR1).clamp(min=0) * there_BM[:, None, :]
    return first_BRF, _drawn(x_BMF, distance_BRM, draws_BR2[:, :, 1])


def _drawn(x_BMF: Tensor, chance_BRM: Tensor, draw_BR: Tensor) -> Tensor:
    sum_BRM = chance_BRM.cumsum(2)
    place_BR1 = torch.searchsorted(sum_BRM, (draw_BR * sum_BRM[:, :, -1])[:, :, None], right=True)
    place_BR1 = place_BR1.clamp(max=x_BMF.shape[1] - 1)
    return x_BMF.gather(1, place_BR1.expand(-1, -1, x_BMF.shape[2]))
