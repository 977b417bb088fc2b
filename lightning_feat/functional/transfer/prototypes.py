"""Classes as the means of their samples: who is nearest, and how means of few samples are mended by those of many.

Shapes: N samples, D features, C classes, A classes with few samples.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_feat.functional.common.lengths import tamed
from lightning_feat.functional.common.shapes import check_shapes

Nearness: TypeAlias = Literal["cosine", "euclidean"]


def nearest_mean_scores(features: Tensor, means: Tensor, nearness: Nearness = "cosine") -> Tensor:
    """How near samples are to the mean of each class, for a classifier that has nothing to learn.

    The nearest class mean of pretrained features is a baseline that continual learning often does not beat (Janson,
    Zhang, Aljundi, Elhoseiny, "A simple baseline that questions the use of pretrained-models in continual learning",
    2022, arXiv 2210.04428).

    Args:
        features: ``(N, D)``.
        means: ``(C, D)``, as ``functional.common.class_sums.class_means`` gives them; a class whose mean is nan is
            never nearest.
        nearness: the ``"cosine"``, or minus half the squared ``"euclidean"`` distance up to a number for each sample.

    Returns:
        ``(N, C)``, the largest the nearest; minus infinity for a class without a mean.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> nearest_mean_scores(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).argmax(1)
        tensor([0])
    """
    check_shapes(features=(features, "ND"), means=(means, "CD"))
    dtype = torch.promote_types(torch.promote_types(features.dtype, means.dtype), torch.float32)
    h_ND, mean_CD = features.to(dtype), means.to(dtype)
    missing_C = mean_CD.isnan().any(1)
    mean_CD = mean_CD.masked_fill(missing_C[:, None], 0)
    if nearness == "cosine":
        score_NC = normalize(tamed(h_ND)[0], dim=1) @ normalize(tamed(mean_CD)[0], dim=1).T
    else:
        score_NC = h_ND @ mean_CD.T - mean_CD.square().sum(1) / 2
    return score_NC.masked_fill(missing_C, -torch.inf)


def calibrated_prototypes(few: Tensor, many: Tensor, temperature: float = 16.0, share: float = 0.5) -> Tensor:
    r"""Means of classes with few samples, drawn towards those of the classes with many that they resemble.

    .. math:: (1 - \alpha)\, c_a + \alpha \, \frac{\delta_a}{\lVert \delta_a \rVert}, \quad
        \delta_a = \sum_b w_{ab} c_b, \quad w_a = \mathrm{softmax}_b(\tau \langle c_a, c_b \rangle)

    with all means at length one. Nothing is trained. Few samples of a class are taken for one with many too often, and
    this evens it. Source: Wang et al., "Few-shot class-incremental learning via training-free prototype calibration",
    NeurIPS 2023, arXiv 2312.05229.

    Args:
        few: ``(A, D)`` means of the classes with few samples.
        many: ``(C, D)`` means of the classes with many, which stay as they are.
        temperature: :math:`\tau`; 16 as in the paper's code.
        share: :math:`\alpha`; 0.5, and 0.1 for CIFAR-100 in the paper.

    Returns:
        ``(A, D)``, for a classifier by cosine: not of length one again.

    Raises:
        ValueError: if the shapes do not fit, there is no class with many samples, or the share is outside [0, 1].

    Example:
        >>> calibrated_prototypes(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([[0.5000, 0.5000]])
    """
    check_shapes(few=(few, "AD"), many=(many, "CD"))
    if not len(many):
        raise ValueError("there is no class with many samples to draw towards.")
    if not 0 <= share <= 1:
        raise ValueError(f"{share=} must lie between zero and one.")
    few_AD, many_CD = (normalize(tamed(means)[0], dim=1) for means in (few, many))
    weight_AC = (temperature * few_AD @ many_CD.T).softmax(1)
    return (1 - share) * few_AD + share * normalize(weight_AC @ many_CD, dim=1)
