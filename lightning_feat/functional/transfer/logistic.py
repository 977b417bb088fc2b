r"""Multinomial logistic regressions of one data set, one for each penalty, minimised side by side by Newton's method.

Shapes: N samples, R features, S = R + 1 inputs (the last is one for every sample: its weight is the bias), L penalties,
C classes. The logits of all penalties are one product ``(N, S) @ (S, L * C)``, which reads the features once; so is a
product with all Hessians.

Each Newton step solves for its direction by some iterations of conjugate gradients, in float32, as the direction need
not be exact; objective and gradient, on which the result depends, are float64 once the minimum is near. Logits are
taken relative to that of the sample's own class, so that the loss ``log(1 + sum of exp)`` and the curvature of a sample
that is nearly sure keep all their digits: at weak penalties such samples are all there is. Along a direction logits are
linear, and the step's length takes no product with the features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# What is still to be gained, over the objective. At 1e-9 gradients are about 1e-5 where curvatures are one.
_TOLERANCE = 1e-9
_MOST_STEPS = 60  # of Newton's; ten are usual
# With the Hessian, in a step. What else a step takes costs as much as four.
_FEWEST_PRODUCTS, _MOST_PRODUCTS = 4, 128
_TOO_ROUGH, _TOO_EXACT = (
    0.1,
    0.01,
)  # residual of a direction over that of none: the next step gets more products, or less
_FAR, _NEAR = 1e-2, 1e-3  # gains over the objective: above, float32 will do; below, a step of one is right
_LENGTHS = 4  # of a step that are tried


class Point(NamedTuple):
    """All penalties at some weights."""

    relative: Tensor  # (N, L, C) logits less that of the own class
    chance: Tensor  # (N, L, C) softmax, that of the own class being one less the sum of the others
    missing: Tensor  # (N, L, 1) that sum
    loss: Tensor  # (L,) mean cross entropy


def _minimise(
    z_NR: Tensor, target_N: Tensor, num_classes: int, penalties: list[float], of_penalty_R: Tensor
) -> tuple[Tensor, list[float]]:
    """Weights ``(S, L, C)`` in float64, and an estimate of what is still to be gained, over each objective.

    ``z_NR`` holds centred columns of a deviation near one, in float64; the penalty of a weight is divided by
    ``of_penalty_R``, and the bias has none. Costs one look at the device a step.
    """
    size = len(z_NR)
    z_NS = torch.cat([z_NR, z_NR.new_ones(size, 1)], 1)
    decay_SL = z_NR.new_tensor(penalties) / torch.cat([of_penalty_R, of_penalty_R.new_full((1,), torch.inf)])[:, None]
    weight_SLC = z_NS.new_zeros(z_NS.shape[1], len(penalties), num_classes)
    weight_SLC[-1] = (target_N.bincount(minlength=num_classes) / size + 1e-12).log()
    own_N11 = target_N[:, None, None]
    z32_NS = z_NS.float()
    square_NS = z32_NS.square()
    gains, going, products = [0.0] * len(penalties), list(range(len(penalties))), _FEWEST_PRODUCTS
    most = torch.inf  # that the last step gained, over an objective
    for _ in range(_MOST_STEPS):
        w_SLC, decay_SL1 = weight_SLC[:, going], decay_SL[:, going, None]
        there_NS = z_NS if most < _FAR else z32_NS
        here = _point(_relative(there_NS, w_SLC.to(there_NS.dtype), own_N11), own_N11)
        objective_L = here.loss + 0.5 * (decay_SL1 * w_SLC.square()).sum((0, 2))
        residual_NLC = here.chance.scatter(2, own_N11.expand(-1, len(going), 1), -here.missing)
        gradient_SLC = _back(there_NS, residual_NLC) / size + decay_SL1 * w_SLC
        hessian = _Hessian(z32_NS, square_NS, here, own_N11, decay_SL1.float())
        step_SLC, left_L = _solve(hessian, -gradient_SLC.float(), products)
        step_SLC = step_SLC.double()
        gain_L = -0.5 * (gradient_SLC * step_SLC).sum((0, 2)) / objective_L
        if most > _NEAR:
            ahead_NLC = _relative(z32_NS, step_SLC.float(), own_N11)
            length_L = _lengths(here, ahead_NLC, own_N11, w_SLC, step_SLC, decay_SL1)
            step_SLC *= torch.where(gain_L < _NEAR, 1.0, length_L)[:, None]
        weight_SLC[:, going] = w_SLC + step_SLC
        told = torch.stack([gain_L, left_L.double()], 1).tolist()  # the one look
        for place, (gain, left) in zip(going, told, strict=True):
            # Of the quadratic model the square of the residual is left, and of the objective what it leaves out.
            gains[place] = gain * (left**2 + 100 * gain)
        most, roughest = max(gain for gain, _ in told), max(left for _, left in told)
        if roughest > _TOO_ROUGH:
            products = min(2 * products, _MOST_PRODUCTS)
        elif roughest < _TOO_EXACT:
            products = max(products // 2, _FEWEST_PRODUCTS)
        going = [place for place in going if gains[place] > _TOLERANCE]  # and none that is nan
        if not going:
            break
    return weight_SLC, gains


class _Hessian:
    """Of all objectives at a point, as products with directions ``(S, L, C)``; in float32."""

    def __init__(self, z_NS: Tensor, square_NS: Tensor, here: Point, own_N11: Tensor, decay_SL1: Tensor) -> None:
        self.z_NS, self.own_N11, self.decay_SL1 = z_NS, own_N11, decay_SL1
        self.chance_NLC = here.chance.float()
        rest_NLC = (1 - here.chance).scatter(2, own_N11.expand(-1, here.chance.shape[1], 1), here.missing)
        spread_NLC = (here.chance * rest_NLC).float()
        self.diagonal_SLC = (_back(square_NS, spread_NLC) / len(z_NS) + decay_SL1).clamp(min=1e-30)

    def __matmul__(self, v_SLC: Tensor) -> Tensor:
        logit_NLC = _relative(self.z_NS, v_SLC, self.own_N11)
        logit_NLC -= (self.chance_NLC * logit_NLC).sum(2, keepdim=True)
        logit_NLC *= self.chance_NLC
        return torch.addcmul(_back(self.z_NS, logit_NLC) / len(self.z_NS), self.decay_SL1, v_SLC)


def _solve(hessian: _Hessian, right_SLC: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """Conjugate gradients from zero, preconditioned by the diagonal, and the share of the residual that is left."""
    x_SLC, r_SLC = torch.zeros_like(right_SLC), right_SLC
    y_SLC = r_SLC / hessian.diagonal_SLC
    p_SLC, ry_L = y_SLC, (r_SLC * y_SLC).sum((0, 2))
    first_L = ry_L
    for _ in range(products):
        hp_SLC = hessian @ p_SLC
        curvature_L = (p_SLC * hp_SLC).sum((0, 2))
        # What is solved to the digits of float32 stands still.
        solved_L = (curvature_L <= 0) | (ry_L <= 1e-8 * first_L)
        a_L = torch.where(solved_L, 0.0, ry_L / curvature_L)[:, None]
        x_SLC = torch.addcmul(x_SLC, a_L, p_SLC)
        r_SLC = torch.addcmul(r_SLC, -a_L, hp_SLC)
        y_SLC = r_SLC / hessian.diagonal_SLC
        before_L, ry_L = ry_L, (r_SLC * y_SLC).sum((0, 2))
        p_SLC = torch.addcmul(y_SLC, torch.where(solved_L, 0.0, ry_L / before_L)[:, None], p_SLC)
    return x_SLC, (ry_L / first_L).nan_to_num(0.0).sqrt()


def _lengths(
    here: Point, ahead_NLC: Tensor, own_N11: Tensor, weight_SLC: Tensor, step_SLC: Tensor, decay_SL1: Tensor
) -> Tensor:
    """Multiples ``(L,)`` of the step that end near the minimum along it: Newton on the slope, kept in a bracket."""
    start_NLC = here.relative.float()
    slope_L, bend_L = (
        (decay_SL1 * factor_SLC * step_SLC).sum((0, 2)) for factor_SLC in (weight_SLC, step_SLC)
    )  # of the penalty
    low_L, high_L = torch.zeros_like(slope_L), torch.full_like(slope_L, torch.inf)
    length_L = torch.ones_like(slope_L)
    for _ in range(_LENGTHS):
        there = _point(torch.addcmul(start_NLC, length_L.float()[:, None], ahead_NLC), own_N11)
        mean_NL = (there.chance * ahead_NLC).sum(2)
        first_L = mean_NL.mean(0).double() + slope_L + length_L * bend_L
        second_L = ((there.chance * ahead_NLC.square()).sum(2) - mean_NL.square()).mean(0).double() + bend_L
        low_L = torch.where(first_L < 0, length_L, low_L)
        high_L = torch.where(first_L < 0, high_L, length_L)
        newton_L = length_L - first_L / second_L
        inside_L = (newton_L > low_L) & (newton_L < high_L) & (newton_L < 4 * length_L)
        between_L = torch.where(high_L.isinf(), 4 * length_L, (low_L + high_L) / 2)
        length_L = torch.where(inside_L, newton_L, between_L)
    # Never past the minimum by more than the last Newton step, where the slope had been seen to fall.
    return torch.where(high_L.isinf() | (length_L <= high_L), length_L, low_L)


def _point(relative_NLC: Tensor, own_N11: Tensor) -> Point:
    own_NL1 = own_N11.expand(-1, relative_NLC.shape[1], 1)
    most_NL1 = relative_NLC.amax(2, keepdim=True)  # zero at least: the own class
    odds_NLC = (relative_NLC - most_NL1).exp_().scatter_(2, own_NL1, 0.0)
    others_NL1, own_odds_NL1 = odds_NLC.sum(2, keepdim=True), (-most_NL1).exp()
    missing_NL1 = others_NL1 / (others_NL1 + own_odds_NL1)
    chance_NLC = odds_NLC / (others_NL1 + own_odds_NL1)
    chance_NLC.scatter_(2, own_NL1, own_odds_NL1 / (others_NL1 + own_odds_NL1))
    loss_NL1 = most_NL1 + (others_NL1 + torch.expm1(-most_NL1)).log1p()
    return Point(relative_NLC, chance_NLC, missing_NL1, loss_NL1.mean((0, 2)))


def _relative(z_NS: Tensor, weight_SLC: Tensor, own_N11: Tensor) -> Tensor:
    logit_NLC = (z_NS @ weight_SLC.flatten(1)).unflatten(1, weight_SLC.shape[1:])
    return logit_NLC - logit_NLC.gather(2, own_N11.expand(-1, weight_SLC.shape[1], 1))


def _back(z_NS: Tensor, of_logits_NLC: Tensor) -> Tensor:
    return (z_NS.mT @ of_logits_NLC.flatten(1)).unflatten(1, of_logits_NLC.shape[1:])
