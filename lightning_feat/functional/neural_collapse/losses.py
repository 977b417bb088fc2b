"""Losses that draw features towards neural collapse: to fixed prototypes, or to class means that are learned.

Shapes: N samples, D features, C classes.
"""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.neural_collapse.simplex import directions, prototype_cosines

PushVariant: TypeAlias = Literal["per_class", "global", "frobenius"]

_LARGEST_COSINE = 0.99999  # beyond, the slope of arccos grows without bound; the number is that of Liu et al.


def dot_regression(features: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
    r"""Squared distance of each feature's cosine with its prototype to one: a pull, and no push from other classes.

    .. math:: \frac{1}{2N} \sum_i \left( \langle h_i / \lVert h_i \rVert, w_{y_i} \rangle - \lVert w_{y_i} \rVert
              \right)^2

    In cross-entropy it is the push that wears down the prototypes of small classes. Source: Yang et al., NeurIPS 2022,
    arXiv 2203.09081, with feature and prototype lengths of one.

    Args:
        features: ``(N, D)``, any floating dtype; computed in float32 at least. Those shorter than 1e-8 get no gradient.
        targets: class indices ``(N,)``, or shares of classes ``(N, C)``, over which the squares are averaged. Mixed
            targets ``s * onehot(a) + (1 - s) * onehot(b)`` thus give ``s`` of the loss with targets a and ``1 - s`` of
            that with b.
        prototypes: ``(C, D)``, fixed; unit rows, or rows of :func:`balanced_lengths`, by whose squares the classes are
            then weighted.

    Returns:
        Scalar in ``[0, 2]`` for unit prototypes; zero if all features point to their prototype; nan for N = 0.

    Example:
        >>> corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> dot_regression(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), corners)  # 0, 90 degrees
        tensor(0.2500)
    """
    check_shapes(features=(features, "ND"), prototypes=(prototypes, "CD"))
    exact = torch.promote_types(prototypes.dtype, torch.float32)
    length_C = torch.linalg.vector_norm(prototypes, dim=1, dtype=exact)
    if targets.ndim == 2 and targets.is_floating_point():
        if targets.shape != (len(features), len(prototypes)):
            raise ValueError(f"soft targets must be ({len(features)}, {len(prototypes)}), got {tuple(targets.shape)}.")
        error_NC = prototype_cosines(features, prototypes) - length_C
        return (targets.to(error_NC.dtype) * error_NC.square()).sum(1).mean() / 2
    _check_pairs(features, targets, prototypes)
    unit_ND = directions(features, prototypes.dtype)
    index_N = targets.long()  # by index_select: plain indexing takes -1 for the last class
    error_N = (unit_ND * prototypes.index_select(0, index_N)).sum(1) - length_C.index_select(0, index_N)
    return error_N.square().mean() / 2


def balanced_lengths(counts: Tensor) -> Tensor:
    r"""Lengths of prototypes, ``(C,)``, with which all classes weigh the same in :func:`dot_regression`.

    :math:`\sqrt{\gamma / n_c}` with :math:`\gamma` the mean of the counts of the classes that have samples; one for
    classes without. Source: Yang et al., NeurIPS 2022.

    Args:
        counts: samples of each class, ``(C,)``, in the data set or in the batch; of soft targets their sum over N.
    """
    check_shapes(counts=(counts, "C"))
    n_C = counts.to(torch.promote_types(counts.dtype, torch.float32))
    seen_C = n_C > 0
    mean_count = n_C.sum() / seen_C.sum().clamp(min=1)
    return torch.where(seen_C, (mean_count / n_C.clamp(min=torch.finfo(n_C.dtype).tiny)).sqrt(), 1.0)


def within_class_pull(features: Tensor, targets: Tensor, means: Tensor) -> Tensor:
    r"""Mean squared distance of the features to the mean of their class, averaged first within classes.

    .. math:: \frac1C \sum_{c \in \mathrm{batch}} \frac1{n_c} \sum_{i: y_i = c} \lVert h_i - v_c \rVert^2

    with :math:`n_c` the samples of class c in the batch. C counts all classes: those without samples add zero. In the
    squared unit of the features, never negative. Source: Liu et al., "Inducing neural collapse in deep long-tailed
    learning", AISTATS 2023, arXiv 2302.12453, where it is called NC1.

    Args:
        features: ``(N, D)``.
        targets: class indices ``(N,)``.
        means: ``(C, D)``, commonly parameters.
    """
    _check_pairs(features, targets, means)
    index_N = targets.long()
    distance_N = (features - means.index_select(0, index_N)).square().sum(1)
    count_C = torch.zeros(len(means), dtype=distance_N.dtype, device=distance_N.device)
    count_C = count_C.index_add_(0, index_N, torch.ones_like(distance_N))
    return (distance_N / count_C[index_N]).sum() / len(means)


def between_class_push(means: Tensor, variant: PushVariant = "per_class") -> Tensor:
    r"""How near class means are to one another in angle, seen from their centre: lowest for a simplex.

    With :math:`u_c` the direction of :math:`v_c - \bar v`:

    - ``"per_class"``: :math:`-\frac1C \sum_c \arccos \max_{c' \ne c} \langle u_c, u_{c'} \rangle`, the mean angle of a
      class to its nearest other, in radians, negative;
    - ``"global"``: the negative angle of the two nearest classes;
    - ``"frobenius"``: the Frobenius norm of :math:`\langle u_c, u_{c'} \rangle + 1 / (C - 1)` over
      :math:`c \ne c'`; never negative, zero for a simplex.

    Cosines are cut off at 0.99999 in size, where the slope of arccos is 224: classes nearer than that are not driven
    apart by the first two. Only the first reaches every class in every step. Source: Liu et al., AISTATS 2023, where
    it is called NC2.

    Args:
        means: ``(C, D)``, at least two.
        variant: see above.
    """
    if means.ndim != 2 or len(means) < 2:
        raise ValueError(f"between_class_push needs the means (C, D) of two classes or more, got {tuple(means.shape)}.")
    centered_CD = means - means.mean(0)
    cosine_CC = prototype_cosines(centered_CD, directions(centered_CD))
    same_CC = torch.eye(len(means), dtype=torch.bool, device=means.device)
    if variant == "frobenius":
        return torch.linalg.matrix_norm((cosine_CC + 1 / (len(means) - 1)).masked_fill(same_CC, 0.0))
    if variant not in ("per_class", "global"):
        raise ValueError(f"variant={variant!r}: choose 'per_class', 'global' or 'frobenius'.")
    nearest_C = cosine_CC.masked_fill(same_CC, -2.0).amax(1)
    nearest_C = nearest_C.amax(0, keepdim=True) if variant == "global" else nearest_C
    return -nearest_C.clamp(-_LARGEST_COSINE, _LARGEST_COSINE).arccos().mean()


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same values bit for bit, with ``factor`` times the gradient."""
    fixed = tensor.detach()
    return fixed + factor * (tensor - fixed)


def cut_gradient(tensor: Tensor) -> Tensor:
    """The same values, in the graph, with a gradient of zero whatever comes back: also for infinite or NaN gradients.

    Unlike ``detach`` it leaves a backward pass to those who wait for one, as FSDP2 does.
    """
    cut: Tensor = _CutGradient.apply(tensor)  # type: ignore[no-untyped-call]
    return cut


class _CutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


def _check_pairs(features: Tensor, targets: Tensor, vectors: Tensor) -> None:
    check_shapes(features=(features, "ND"), targets=(targets, "N", int), class_vectors=(vectors, "CD"))
    if targets.device.type == "cpu":  # free there; elsewhere it would make every batch wait for the device
        check_target_range(targets, len(vectors))
