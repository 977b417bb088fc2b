"""Free features that are kept near given ones, as those of a layer are near what the layer before can give.

Shapes: N samples, D features, C classes or outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.optim import LBFGS

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.shapes import check_shapes

_ITERATIONS = 2000  # of L-BFGS at most; some hundred are usual


class KeptOptimum(NamedTuple):
    """A minimum of the enriched free-features model."""

    features: Tensor  # (N, D) float64
    weight: Tensor  # (C, D) float64, the head
    objective: Tensor  # ()
    gradient: Tensor  # () largest entry of the gradient that is left, in the head; in the features it is rounding


def kept_features_optimum(
    given: Tensor, targets: Tensor, weight_decay: float, feature_decay: float, keep_weight: float
) -> KeptOptimum:
    r"""Features and head that fit the targets best while the features stay near given ones.

    .. math:: \min_{W, H} \tfrac{1}{2N} \lVert W H - Y \rVert^2 + \tfrac{\lambda_W}{2} \lVert W \rVert^2
              + \tfrac{\lambda_H}{2} \lVert H \rVert^2 + \tfrac{\beta}{2} \lVert H - H_0 \rVert^2

    The features that belong to a head W are
    :math:`(W^\top W / N + (\lambda_H + \beta) I)^{-1} (W^\top Y / N + \beta H_0)`, so that W alone is searched, by
    L-BFGS from the head that is best for the given features. There is no closed form for W; of several minima it is the
    one nearest to them. At the minimum the classes vary less about their means, over the distance of these, than in the
    given features (``nc1_quotient``), and the less, the smaller :math:`\beta`: near zero they collapse.

    Costs ``D^3 + 2 N D^2`` operations an iteration. Source: Tirer, Huang, Niles-Weed, "Perturbation analysis of neural
    collapse", ICML 2023, whose decays are these times N (times C for the head).

    Args:
        given: ``(N, D)`` features :math:`H_0`.
        targets: ``(N,)`` class indices, taken as one-hot rows, or ``(N, C)`` wanted outputs.
        weight_decay: factor :math:`\lambda_W`, above zero.
        feature_decay: factor :math:`\lambda_H`, zero or above.
        keep_weight: factor :math:`\beta`, above zero.

    Raises:
        ValueError: if shapes or numbers do not fit, or the features are not finite.

    Example:
        >>> given = torch.tensor([[2.0, 0.1], [1.8, -0.1], [0.1, 1.9], [-0.1, 2.1]])
        >>> found = kept_features_optimum(given, torch.tensor([0, 0, 1, 1]), 0.01, 0.001, 0.01)
        >>> (found.weight @ found.features.T).round(decimals=2).abs()
        tensor([[1.0000, 0.9900, 0.0100, 0.0100],
                [0.0100, 0.0100, 0.9900, 1.0000]], dtype=torch.float64)
    """
    if targets.ndim == 1:
        check_shapes(given=(given, "ND"), targets=(targets, "N", int))
        if len(targets) and int(targets.min()) < 0:
            raise ValueError(f"targets hold {int(targets.min())}: class indices count from zero.")
        y_NC = one_hot(targets.long()).double() if len(targets) else targets.new_zeros(0, 1).double()
    else:
        check_shapes(given=(given, "ND"), targets=(targets, "NC"))
        if not targets.is_floating_point():
            raise ValueError(
                f"targets of shape {tuple(targets.shape)} are whole numbers: class indices have the shape (N,), and "
                "wanted outputs (N, C) are floating."
            )
        y_NC = to_float64(targets)
    if min(weight_decay, keep_weight) <= 0 or feature_decay < 0:
        raise ValueError(
            f"{weight_decay=}, {feature_decay=}, {keep_weight=}: the first and the last must be above zero, and the "
            "second not below it."
        )
    h0_ND = to_float64(given.detach())
    if not h0_ND.isfinite().all() or not y_NC.isfinite().all() or not h0_ND.numel():
        raise ValueError(
            f"given features {tuple(given.shape)} and targets must be finite, with at least one sample and one feature."
        )
    y_NC, size, hold = y_NC.detach().to(h0_ND.device), len(h0_ND), feature_decay + keep_weight
    eye_DD = torch.eye(h0_ND.shape[1], dtype=h0_ND.dtype, device=h0_ND.device)
    # Not by solve, which raises where the features are so large that the decay is rounding beside them.
    start_DC = torch.linalg.pinv(h0_ND.T @ h0_ND + size * weight_decay * eye_DD, hermitian=True) @ h0_ND.T @ y_NC
    w_CD = start_DC.T.contiguous().requires_grad_()

    def features_of(weight: Tensor) -> Tensor:
        moment_DD = weight.T @ weight / size + hold * eye_DD
        solved, _ = torch.linalg.solve_ex(moment_DD, (y_NC @ weight / size + keep_weight * h0_ND).T)
        return solved.T

    @torch.no_grad()
    def closure() -> Tensor:
        h_ND = features_of(w_CD)
        slack_NC = h_ND @ w_CD.T - y_NC
        w_CD.grad = slack_NC.T @ h_ND / size + weight_decay * w_CD
        error = slack_NC.square().sum() / size + weight_decay * w_CD.square().sum()
        return (error + feature_decay * h_ND.square().sum() + keep_weight * (h_ND - h0_ND).square().sum()) / 2

    options: dict[str, Any] = {
        "max_iter": _ITERATIONS,
        "max_eval": 2 * _ITERATIONS,
        "history_size": 50,
        "tolerance_grad": 1e-14,
    }
    LBFGS([w_CD], **options, tolerance_change=0.0, line_search_fn="strong_wolfe").step(closure)
    # A line search ends where the objective is rounding; by the gradient alone one comes as near again.
    best_CD, least = w_CD.detach().clone(), _largest(closure, w_CD)
    LBFGS([w_CD], **{**options, "max_iter": 60}, tolerance_change=0.0).step(closure)
    if not _largest(closure, w_CD) < least:
        w_CD.data.copy_(best_CD)
    objective = closure()
    return KeptOptimum(features_of(w_CD.detach()), w_CD.detach(), objective, _largest(closure, w_CD))


def _largest(closure: Callable[[], Tensor], weight: Tensor) -> Tensor:
    """The largest entry of the gradient."""
    closure()
    slope: Any = weight.grad
    largest: Tensor = slope.abs().max()
    return largest
