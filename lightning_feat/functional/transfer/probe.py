"""How well a linear classifier reads classes from fixed features: multinomial logistic regression, fitted to the end.

Shapes: N samples, D features, C classes, R directions that the training features span, L strengths of the penalty.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_length

from lightning_feat.functional.common.class_sums import check_target_range, to_float64
from lightning_feat.functional.common.precision import full_precision
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.transfer.class_separation import sample_of_each_class
from lightning_feat.functional.transfer.logistic import _minimise

Scaling: TypeAlias = Literal["standardize", "unit", "none"]

PENALTIES = tuple(10.0**exponent for exponent in range(-6, 2))
_WORTH_SAYING = 1e-5  # what is left to gain, over the objective


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

    Cost: one eigendecomposition of ``min(N, D)`` rows, then 50 to 100 products of the features with all classes of all
        penalties at once, ``4 N D L C`` flops for each, and about ten looks at the device; ``20 N D + 60 N L C`` bytes.

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
    fits = _fits(train_ND, target_N, len(classes_C), tried)
    val_L = torch.stack([accuracy(fitted, val_ND, val_targets) for fitted in fits])
    best = max(enumerate(val_L.tolist()), key=lambda place: place[::-1])[0]  # the last of the equal ones
    penalties_L = torch.tensor(tried, dtype=torch.float64)
    return LinearProbeResult(accuracy(fits[best], test_ND, test_targets), tried[best], penalties_L, val_L)


@torch.no_grad()
def fit_logistic_regression(features: Tensor, targets: Tensor, num_classes: int, penalty: float) -> LogisticRegression:
    r"""Minimise the mean cross entropy plus a penalty on the weight, not on the bias, to the end and in float64.

    .. math:: \frac{1}{N} \sum_i -\log \mathrm{softmax}(W h_i + b)_{t_i} + \frac{\lambda}{2} \lVert W \rVert_F^2

    scikit-learn's ``C`` is ``1 / (penalty * N)``. Minimised by Newton's method with conjugate gradients, in the
    principal directions of the features, each scaled to the same spread, so that features of very unequal spread take
    no more iterations. It ends where a further step would lower the loss by less than 1e-9 of it.

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
    return _fits(to_float64(features), targets, num_classes, [penalty])[0]


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


def _fits(h_ND: Tensor, target_N: Tensor, num_classes: int, penalties: list[float]) -> list[LogisticRegression]:
    """One for each penalty, in the principal directions of the features, each brought to a deviation of one."""
    mean_D = h_ND.mean(0)
    direction_RD = _principal_directions(h_ND - mean_D)
    z_NR = (h_ND - mean_D) @ direction_RD.T
    spread_R = z_NR.square().mean(0).sqrt()
    with full_precision(z_NR.device):
        weight_SLC, gains = _minimise(z_NR / spread_R, target_N.long(), num_classes, penalties, spread_R.square())
    unfinished = [f"{penalty:g}" for penalty, gain in zip(penalties, gains, strict=True) if not gain <= _WORTH_SAYING]
    if unfinished:
        warnings.warn(
            f"the logistic regression ended before its minimum at the penalties {', '.join(unfinished)}: standardise "
            "the features.",
            stacklevel=3,
        )
    fits = []
    for weight_SC in weight_SLC.unbind(1):
        weight_CD = (weight_SC[:-1].T / spread_R) @ direction_RD
        fits.append(LogisticRegression(weight_CD, weight_SC[-1] - weight_CD @ mean_D))
    return fits


def _principal_directions(centred_ND: Tensor) -> Tensor:
    """Orthonormal directions ``(R, D)`` of centred features; what they do not span is left out.

    The weight has no part there: it would cost a penalty and change no training logit.
    """
    n, d = centred_ND.shape
    if d <= n:
        square_D, direction_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / n)
        return direction_DD.T[square_D > 1e-24 * square_D[-1:]]
    square_N, left_NN = torch.linalg.eigh(centred_ND @ centred_ND.T / n)
    kept_N = square_N > 1e-12 * square_N[-1:]
    return torch.linalg.qr(centred_ND.T @ left_NN[:, kept_N]).Q.T  # exact where the eigenvalues are not
