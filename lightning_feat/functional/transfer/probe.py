"""How well a linear classifier reads classes from fixed features: multinomial logistic regression, fitted to the end.

Shapes: N samples, D features, C classes, R directions that the training features span, L strengths of the penalty.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.functional import normalize as unit_length

from lightning_feat.functional.common.class_sums import check_target_range, to_float64
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.transfer.class_separation import sample_of_each_class

Scaling: TypeAlias = Literal["standardize", "unit", "none"]

PENALTIES = tuple(10.0**exponent for exponent in range(-6, 2))
# Largest entry of the gradient, in coordinates where the curvature is near one: the loss is within about 1e-10 of its
# minimum then. At 1e-7 rounding of the loss misleads the line search, and takes ten times the iterations.
_TOLERANCE = 1e-5
_MAX_ITERATIONS = 1000


class LinearProbeResult(NamedTuple):
    """What a linear classifier reads from the features."""

    accuracy: Tensor  # () share of the test samples, at the chosen penalty
    penalty: float  # the chosen one
    penalties: Tensor  # (L,) those tried, ascending
    val_accuracies: Tensor  # (L,) share of the validation samples, at each of them


class LogisticRegression(NamedTuple):
    """A fitted linear classifier: ``features @ weight.T + bias`` are its logits."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)


@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_targets: Tensor,
    val_features: Tensor,
    val_targets: Tensor,
    test_features: Tensor,
    test_targets: Tensor,
    scaling: Scaling = "standardize",
    penalties: Sequence[float] = PENALTIES,
) -> LinearProbeResult:
    """Fit a classifier for each penalty, choose the one of highest validation accuracy, and test that one.

    Of equal accuracies the stronger penalty is chosen. The classifier is not fitted again to the validation samples.
    In float64 and without chance: the same features give the same result.

    Args:
        train_features: ``(N, D)``, any floating dtype.
        train_targets: ``(N,)`` class indices; any integers. A class that only appears later is never predicted.
        val_features: ``(M, D)``; see :func:`hold_out` where there are none.
        val_targets: ``(M,)``.
        test_features: ``(K, D)``.
        test_targets: ``(K,)``.
        scaling: ``"standardize"`` by mean and deviation of each training feature (one that is constant is only
            centred), ``"unit"`` length of each sample, or ``"none"``.
        penalties: strengths to try, see :func:`fit_logistic_regression`.

    Raises:
        ValueError: if shapes do not fit, a part is empty, features are not finite, the training samples have fewer
            than two classes, or a penalty is not positive.

    Cost: one eigendecomposition of ``min(N, D)`` rows, then some tens of passes over the features for each penalty:
        1000 x 512 with 10 classes and 8 penalties take under a second on two CPU cores.

    Example:
        >>> features, targets = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([4, 4, 9, 9])
        >>> linear_probe(features, targets, features, targets, features, targets).accuracy
        tensor(1., dtype=torch.float64)
    """
    parts = {
        "train": (train_features, train_targets),
        "val": (val_features, val_targets),
        "test": (test_features, test_targets),
    }
    for name, (features, targets) in parts.items():
        _check_part(name, features, targets, _width(train_features))
    if len(penalties) == 0 or not all(0 < penalty < math.inf for penalty in penalties):
        raise ValueError(
            f"penalties={list(penalties)}: give at least one, all positive; without one the fit may run away."
        )
    classes_C = train_targets.unique()
    if len(classes_C) < 2:
        raise ValueError(
            f"the train targets hold {len(classes_C)} class: a linear classifier tells at least two apart."
        )
    train_ND, val_ND, test_ND = _scaled([features for features, _ in parts.values()], scaling)
    target_N = torch.searchsorted(classes_C, train_targets).to(train_ND.device)
    classes_C = classes_C.to(train_ND.device)

    def accuracy(fitted: LogisticRegression, features: Tensor, targets: Tensor) -> Tensor:
        predicted = classes_C[(features @ fitted.weight.T + fitted.bias).argmax(1)]
        return (predicted == targets.to(predicted.device)).double().mean()

    tried = sorted(map(float, penalties))
    # From the strongest down: each fit starts where the one before ended.
    fits = _path(train_ND, target_N, len(classes_C), tried[::-1])[::-1]
    val_L = torch.stack([accuracy(fitted, val_ND, val_targets) for fitted in fits])
    best = max(range(len(tried)), key=lambda i: (float(val_L[i]), tried[i]))
    penalties_L = torch.tensor(tried, dtype=torch.float64)
    return LinearProbeResult(accuracy(fits[best], test_ND, test_targets), tried[best], penalties_L, val_L)


@torch.no_grad()
def fit_logistic_regression(features: Tensor, targets: Tensor, num_classes: int, penalty: float) -> LogisticRegression:
    r"""Minimise the mean cross entropy plus a penalty on the weight, not on the bias, to the end and in float64.

    .. math:: \frac{1}{N} \sum_i -\log \mathrm{softmax}(W h_i + b)_{t_i} + \frac{\lambda}{2} \lVert W \rVert_F^2

    scikit-learn's ``C`` is ``1 / (penalty * N)``. Minimised by L-BFGS in the principal directions of the features, each
    scaled by the curvature the loss can have there, so that features of very unequal spread take no more iterations.

    Args:
        features: ``(N, D)``; centred or standardised features take fewer iterations.
        targets: ``(N,)`` class indices in ``[0, num_classes)``.
        num_classes: number of classes C.
        penalty: :math:`\lambda`, positive.

    Raises:
        ValueError: if shapes do not fit, there are no samples, features are not finite, a class index is out of range,
            or the penalty is not positive.
    """
    _check_part("given", features, targets, _width(features))
    check_target_range(targets, num_classes)
    if not 0 < penalty < math.inf:
        raise ValueError(f"penalty={penalty} must be positive: without one the fit may run away.")
    return _path(to_float64(features), targets, num_classes, [penalty])[0]


def hold_out(targets: Tensor, share: float = 0.2, seed: int = 0) -> Tensor:
    """Mask ``(N,)`` of a share of each class, for validation; rounded, but at least one sample of a class, and always
    leaving one.

    Example:
        >>> hold_out(torch.tensor([0, 0, 0, 0, 1, 1, 2]), share=0.5).sum()
        tensor(3)
    """
    check_shapes(targets=(targets, "N", int))
    if not 0 < share < 1:
        raise ValueError(f"share={share}: hold out more than nothing and less than all.")
    held_N = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique():
        members = (targets == target).nonzero()[:, 0]
        most = min(max(1, round(share * len(members))), len(members) - 1)
        if most:
            held_N[members[sample_of_each_class(targets[members], most, seed, members)].cpu()] = True
    return held_N.to(targets.device)


def _width(features: Tensor) -> int:
    return features.shape[-1] if features.ndim else 0


def _check_part(name: str, features: Tensor, targets: Tensor, width: int) -> None:
    if features.ndim != 2 or targets.shape != features.shape[:1] or features.shape[1] != width:
        raise ValueError(
            f"the {name} features must be (N, {width}) and their targets (N,), got {tuple(features.shape)} and "
            f"{tuple(targets.shape)}: pool or flatten feature maps first, the same way in all parts."
        )
    if len(features) == 0:
        raise ValueError(f"the {name} part is empty: give samples, or hold some of the training samples out.")
    if targets.is_floating_point():
        raise ValueError(f"the {name} targets are {targets.dtype}: give integer class indices.")
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).sum())
        raise ValueError(f"{bad} of {len(features)} {name} features are NaN or inf: leave these samples out.")


def _scaled(parts: list[Tensor], scaling: Scaling) -> list[Tensor]:
    parts = [to_float64(part) for part in parts]
    if scaling == "unit":
        return [unit_length(part) for part in parts]
    if scaling == "none":
        return parts
    if scaling != "standardize":
        raise ValueError(f"scaling={scaling!r}: choose 'standardize', 'unit' or 'none'.")
    mean_D = parts[0].mean(0)
    std_D = parts[0].std(0, correction=0)
    # What is left of a constant feature is rounding, which must not be blown up to a deviation of one.
    constant_D = std_D <= 1e-12 * mean_D.abs()
    return [(part - mean_D) / torch.where(constant_D, 1.0, std_D) for part in parts]


def _path(h_ND: Tensor, target_N: Tensor, num_classes: int, penalties: list[float]) -> list[LogisticRegression]:
    """One fit for each penalty in turn, each started from the one before."""
    mean_D = h_ND.mean(0)
    spread_R, direction_RD = _principal_directions(h_ND - mean_D)
    z_NR = (h_ND - mean_D) @ direction_RD.T
    member_NC = one_hot(target_N.long(), num_classes).to(z_NR)
    weight_RC = z_NR.new_zeros(len(spread_R), num_classes)
    bias_C = (member_NC.mean(0) + 1e-12).log()
    fits = []
    for penalty in penalties:
        chance_NC = torch.addmm(bias_C, z_NR, weight_RC).softmax(1)
        curvature_C = (chance_NC * (1 - chance_NC)).mean(0)  # of the loss in a logit, where this fit starts
        step_RC = (spread_R.square()[:, None] * curvature_C + penalty).rsqrt()
        weight_RC, bias_C = _minimise(z_NR, member_NC, weight_RC / step_RC, bias_C, step_RC, penalty)
        weight_CD = weight_RC.T @ direction_RD
        fits.append(LogisticRegression(weight_CD, bias_C - weight_CD @ mean_D))
    return fits


def _principal_directions(centred_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations ``(R,)`` and orthonormal directions ``(R, D)`` of centred features; what they do not span is left out.

    The weight has no part there: it would cost a penalty and change no training logit.
    """
    n, d = centred_ND.shape
    if d <= n:
        square_D, direction_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / n)
        return square_D.clamp(min=0).sqrt(), direction_DD.T
    square_N, left_NN = torch.linalg.eigh(centred_ND @ centred_ND.T / n)
    kept_N = square_N > 1e-12 * square_N[-1:]
    directions_RD = torch.linalg.qr(centred_ND.T @ left_NN[:, kept_N]).Q.T  # exact where the eigenvalues are not
    return square_N[kept_N].sqrt(), directions_RD


def _minimise(
    z_NR: Tensor, member_NC: Tensor, start_RC: Tensor, bias_C: Tensor, step_RC: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """Weight ``(R, C)`` and bias at the minimum; ``start_RC`` is in the coordinates that ``step_RC`` scales."""
    scaled_RC, bias_C = start_RC.clone(), bias_C.clone()
    optimizer = torch.optim.LBFGS(
        [scaled_RC, bias_C],
        max_iter=_MAX_ITERATIONS,
        max_eval=2 * _MAX_ITERATIONS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-14,  # a loss that falls by no more has stalled at its rounding
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        weight_RC = step_RC * scaled_RC
        logits_NC = torch.addmm(bias_C, z_NR, weight_RC)
        residual_NC = (logits_NC.softmax(1) - member_NC) / len(z_NR)
        # By hand: autograd takes twice as long for a product this small.
        scaled_RC.grad = step_RC * torch.addmm(penalty * weight_RC, z_NR.T, residual_NC)
        bias_C.grad = residual_NC.sum(0)
        return cross_entropy(logits_NC, member_NC) + 0.5 * penalty * weight_RC.square().sum()

    optimizer.step(loss)
    # Features that do not vary leave no direction, and a weight of no rows.
    steepest = max(float(part.grad.abs().max()) for part in (scaled_RC, bias_C) if part.grad is not None and len(part))
    if not steepest < 10 * _TOLERANCE:
        warnings.warn(
            f"the logistic regression with penalty {penalty:g} ended with a gradient of {steepest:.1e}, not at its "
            "minimum: standardise the features.",
            stacklevel=2,
        )
    return step_RC * scaled_RC, bias_C
