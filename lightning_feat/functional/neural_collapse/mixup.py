r"""Where mixed samples lie: two samples of one class, or of two, blended in the ratio ``share`` to ``1 - share``.

Trained with mixup, mixes of one class point along the row of that class, and mixes of classes i and j lie in the plane
of rows i and j, where the share decides how far along. Source: Fisher, Meng, Papyan, "Pushing boundaries: mixup's
influence on neural collapse", ICLR 2024, arXiv 2402.06171. That free features do so exactly, where the rows are a
simplex, and how far, follows from stationarity and is derived here.

Shapes: N mixes, D features, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import check_target_range, to_float64
from lightning_feat.functional.common.shapes import check_shapes

_TINY = torch.finfo(torch.float64).tiny  # only zero is left without a direction
_ITERATIONS = 200  # of Newton's method; about ten are taken


class MixSums(NamedTuple):
    """Sums over mixes. Those of two sets of mixes add up, entry by entry, to those of their union."""

    counts: Tensor  # (2,) mixes of one class, and of two
    cosines: Tensor  # () cosine to the row of the class, over mixes of one class
    margins: Tensor  # () logit of the class less the mean of the others, over mixes of one class
    residuals: Tensor  # () share of the squared length outside the plane, over mixes of two classes
    products: Tensor  # (2,) over mixes of two classes: x y and x x, with x the logit of the share, y that of the output


def free_logits(targets: Tensor, strength: float | Tensor) -> Tensor:
    r"""Logits of a free feature at its optimum, above fixed rows that form a simplex, for any soft target.

    The feature minimises cross-entropy plus ``feature_decay / 2`` times its squared length. Its logits then solve
    :math:`z = g \, (y - \operatorname{softmax}(z))` with the ``strength`` g of :func:`free_strength`: classes of equal
    share have equal logits, so a mix of two lies in their plane, and with a growing g the difference of its two logits
    tends to :math:`\log (s / (1 - s))`. Derived here.

    With s the log-partition, each :math:`g p_c` is :math:`\omega(\log g + g y_c - s)`, where
    :math:`\omega(x) + \log \omega(x) = x`; s makes the sum g, by Newton's method on a convex function.

    Args:
        targets: ``(..., C)``, shares of classes, each row summing to one.
        strength: g above zero, a number or ``(...)``.

    Returns:
        ``(..., C)`` float64; each row sums to zero. Not differentiable.

    Raises:
        ValueError: if a strength is not above zero, or the targets are no shares.

    Example:
        >>> free_logits(torch.tensor([0.8, 0.2, 0.0]), strength=1e6).softmax(0)
        tensor([8.0000e-01, 2.0000e-01, 7.2764e-06], dtype=torch.float64)
    """
    y = to_float64(targets.detach())
    if y.ndim == 0 or bool((y < 0).any()) or bool(((y.sum(-1) - 1).abs() > 1e-6).any()):  # 1e-6: float32 shares
        raise ValueError("targets must be shares (..., C): none negative, and each row summing to one.")
    g = torch.as_tensor(strength, dtype=y.dtype, device=y.device).expand(y.shape[:-1])
    if not bool((g > 0).all()):
        raise ValueError(f"strength={strength} must be above zero: without a feature decay it would be infinite.")
    y = y / y.sum(-1, keepdim=True)
    exponent = g.log().unsqueeze(-1) + g.unsqueeze(-1) * y
    # Logits that sum to zero have a log-partition of log C or more; from there Newton's steps only go up.
    partition = torch.full_like(g, y.shape[-1]).log()
    for _ in range(_ITERATIONS):
        omega = _log_wright_omega(exponent - partition.unsqueeze(-1)).exp()
        step = (omega.sum(-1) - g) / (omega / (1 + omega)).sum(-1)
        partition = partition + step
        if bool((step.abs() <= 1e-14 * (1 + partition.abs())).all()):
            break
    # Not g y less omega, which would be a small difference of large numbers.
    logits = _log_wright_omega(exponent - partition.unsqueeze(-1))
    return logits - logits.mean(-1, keepdim=True)


def free_strength(num_classes: int, length: float, feature_decay: float) -> float:
    r"""The strength g of :func:`free_logits`: :math:`a^2 C / ((C - 1) \, \lambda)` for rows of length a."""
    if num_classes < 2 or not feature_decay > 0:
        raise ValueError(f"{num_classes=} must be at least 2, and {feature_decay=} above zero.")
    return length**2 * num_classes / ((num_classes - 1) * feature_decay)


def free_mixed_features(targets: Tensor, weight: Tensor, feature_decay: float) -> Tensor:
    """The features ``(..., D)`` float64 whose logits :func:`free_logits` gives, above a simplex.

    Args:
        targets: ``(..., C)``, shares of classes.
        weight: ``(C, D)``, rows of one length with cosines of ``-1 / (C - 1)``.
        feature_decay: weight of half the squared length of a feature, beside its cross-entropy.

    Raises:
        ValueError: if the rows are no simplex.
    """
    check_shapes(targets=(targets, "*C"), weight=(weight, "CD"))
    w_CD = to_float64(weight.detach())
    num_classes = len(w_CD)
    length = float(w_CD.square().sum(1).mean().sqrt())
    identity_CC = torch.eye(num_classes, dtype=w_CD.dtype, device=w_CD.device)
    simplex_CC = (num_classes * identity_CC - 1) * length**2 / (num_classes - 1)
    error = float((w_CD @ w_CD.T - simplex_CC).abs().max()) / length**2
    if not error < 1e-4:  # far above the rounding of float32
        raise ValueError(f"weight is no simplex: its inner products are off by {error:.2g} of the squared length.")
    logits = free_logits(targets, free_strength(num_classes, length, feature_decay))
    return logits @ w_CD * (num_classes - 1) / (num_classes * length**2)


def strength_of_margin(margin: Tensor, num_classes: int) -> Tensor:
    r"""The strength g at which a free feature of one class has this logit above the mean of the others; nan where it is
    not above zero.

    :math:`g = m \, (C - 1) / (C \, (1 - p))` with p the softmax share of the class.
    """
    m = to_float64(margin.detach())
    others = (num_classes - 1) * torch.exp(-m)
    strength = m * (num_classes - 1) / num_classes * (1 + others) / others
    return torch.where(m > 0, strength, torch.nan)


def free_slope(margin: Tensor, shares: Tensor, num_classes: int) -> Tensor:
    """The slope of :class:`MixSums` that free features would have: those whose mixes of one class have this margin.

    Args:
        margin: ``()``, mean logit of the class above the mean of the others.
        shares: ``(L,)``, the shares of the first class that were mixed, each as often.
        num_classes: C, of which all but two get nothing.
    """
    check_shapes(margin=(margin, ""), shares=(shares, "L"))
    share_L = to_float64(shares)
    strength = strength_of_margin(margin, num_classes)
    if not bool(strength.isfinite()):
        return strength.new_full((), torch.nan)
    target_LC = share_L.new_zeros(len(share_L), num_classes)
    target_LC[:, 0], target_LC[:, 1] = share_L, 1 - share_L
    z_LC = free_logits(target_LC, strength)
    x_L = share_L.logit()
    return (x_L * (z_LC[:, 0] - z_LC[:, 1])).sum() / x_L.square().sum()


def mix_sums(
    features: Tensor, logits: Tensor, weight: Tensor, first: Tensor, second: Tensor, shares: Tensor
) -> MixSums:
    """Sum a batch of mixes into what :func:`mix_measures` needs, in float64.

    Args:
        features: ``(N, D)`` of the mixes, less a common centre.
        logits: ``(N, C)``, what the classifier made of them.
        weight: ``(C, D)``, rows of the classifier, or prototypes; centred here.
        first: ``(N,)`` class indices.
        second: ``(N,)`` class indices of what was mixed in; where they are those of ``first``, a mix of one class.
        shares: ``(N,)`` of the first, between 0 and 1, neither of them.

    Raises:
        ValueError: if the shapes do not fit, or a share is not between 0 and 1.
    """
    check_shapes(features=(features, "ND"), logits=(logits, "NC"), weight=(weight, "CD"))
    for name, classes in (("first", first), ("second", second)):
        check_shapes(features=(features, "ND"), shares=(shares, "N"), **{name: (classes, "N", int)})
        if classes.device.type == "cpu":  # elsewhere it would make every batch wait for the device
            check_target_range(classes, len(weight))
    if len(features) and not bool(((shares > 0) & (shares < 1)).all()):
        raise ValueError("shares must lie between 0 and 1, and be neither: such samples are not mixed.")
    h_ND, z_NC, w_CD = (to_float64(entry.detach()) for entry in (features, logits, weight))
    w_CD = w_CD - w_CD.mean(0)  # softmax does not see what all rows share
    first, second = first.long(), second.long()  # as an index, uint8 is a mask
    same = first == second
    one, two = torch.where(same)[0], torch.where(~same)[0]
    own_n = z_NC[one].gather(1, first[one, None])[:, 0]
    margin_n = own_n - (z_NC[one].sum(1) - own_n) / (len(w_CD) - 1)
    cosine_n = torch.nn.functional.cosine_similarity(h_ND[one], w_CD[first[one]], dim=1, eps=_TINY)
    x_n = to_float64(shares)[two].logit()
    y_n = (z_NC[two].gather(1, first[two, None]) - z_NC[two].gather(1, second[two, None]))[:, 0]
    return MixSums(
        counts=h_ND.new_tensor([len(one), len(two)]),
        cosines=cosine_n.sum(),
        margins=margin_n.sum(),
        residuals=plane_residual(h_ND[two], w_CD[first[two]], w_CD[second[two]]).sum(),
        products=torch.stack([(x_n * y_n).sum(), x_n.square().sum()]),
    )


def draw_pairs(targets: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Positions of pairs of samples, ``(P, 2)`` int64: ``count`` of one class, then ``count`` of two classes.

    Every sample is as likely to be the first as any other that has a partner; samples of a pair differ. There are none
    of a kind for which the targets have no pair.

    Args:
        targets: ``(N,)`` class indices.
        count: of each kind.
        generator: on the CPU, for draws that repeat.
    """
    check_shapes(targets=(targets, "N", int))
    order_N = targets.cpu().argsort(stable=True)  # a class is a run of places in this order
    _, class_N, size_C = targets.cpu()[order_N].unique(return_inverse=True, return_counts=True)
    size_N, start_N = size_C[class_N], (size_C.cumsum(0) - size_C)[class_N]

    def draw(partners_N: Tensor) -> tuple[Tensor, Tensor]:
        """Places of first samples, and for each a number below that of its partners."""
        possible = torch.where(partners_N > 0)[0]
        first = possible[torch.randint(max(len(possible), 1), (count * (len(possible) > 0),), generator=generator)]
        drawn = torch.rand(len(first), generator=generator, dtype=torch.float64) * partners_N[first]
        return first, drawn.long()

    first, drawn = draw(size_N - 1)
    same = start_N[first] + (first - start_N[first] + 1 + drawn) % size_N[first]  # around the run
    other_first, drawn = draw(len(targets) - size_N)
    other = (start_N[other_first] + size_N[other_first] + drawn) % len(targets)  # from its end on, around all
    return order_N[torch.stack([torch.cat([first, other_first]), torch.cat([same, other])], 1)]


def plane_residual(features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Share of the squared length of each feature outside the plane of two vectors: ``(N,)`` in [0, 1].

    A random direction in R dimensions has ``1 - 2 / R`` in the mean; R is C - 1 for features in the span of a simplex.

    Args:
        features: ``(N, D)``.
        first: ``(N, D)``, with
        second: ``(N, D)`` not parallel to it.
    """
    check_shapes(features=(features, "ND"), first=(first, "ND"), second=(second, "ND"))
    h_ND, u_ND, v_ND = (to_float64(entry) for entry in (features, first, second))
    u_ND, v_ND = (torch.nn.functional.normalize(entry, eps=_TINY) for entry in (u_ND, v_ND))
    v_ND = torch.nn.functional.normalize(v_ND - (v_ND * u_ND).sum(1, keepdim=True) * u_ND)
    inside_N = (h_ND * u_ND).sum(1).square() + (h_ND * v_ND).sum(1).square()
    return (1 - inside_N / h_ND.square().sum(1)).clamp(min=0)  # rounding can dip below zero


def mix_measures(totals: MixSums, shares: Tensor, num_classes: int) -> dict[str, Tensor]:
    """What the sums say, as scalars, float64; nan where there are no mixes of the kind.

    - ``same_class_cosine``: of the feature with the row of its class, mean over mixes of one class; 1 in theory.
    - ``plane_residual``: see :func:`plane_residual`, mean over mixes of two classes; 0 in theory.
    - ``slope``: of the difference of the two logits against ``log(s / (1 - s))``, by least squares through the origin,
      over mixes of two classes. One where the network is as sure of the classes as their shares; above, it jumps from
      one class to the other.
    - ``slope_free``: of :func:`free_slope`, at the mean margin of the mixes of one class.

    Args:
        totals: over all mixes.
        shares: ``(L,)``, the shares that were mixed, each as often.
        num_classes: C.
    """
    check_shapes(shares=(shares, "L"))
    one, two = totals.counts
    return {
        "same_class_cosine": totals.cosines / one,
        "plane_residual": totals.residuals / two,
        "slope": totals.products[0] / totals.products[1],
        "slope_free": free_slope(totals.margins / one, shares, num_classes),
    }


def _log_wright_omega(x: Tensor) -> Tensor:
    """The root v of ``v + exp(v) = x``, the logarithm of omega."""
    # Newton on a convex rising function, from above the root.
    v = torch.where(x > 1, x.clamp(min=1).log(), x)
    for _ in range(_ITERATIONS):
        step = (v + v.exp() - x) / (1 + v.exp())
        v = v - step
        if bool((step.abs() <= 1e-15 * (1 + v.abs())).all()):
            break
    return v
