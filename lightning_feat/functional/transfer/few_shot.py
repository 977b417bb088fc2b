"""How well collapsed features serve for classes they were not trained on: nearest-mean error from a few shots.

Shapes: N samples, D features, C classes of one episode, n shots of each class.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import ClassSums, class_means, class_variances, to_float64
from lightning_feat.functional.common.shapes import check_shapes


class FewShotError(NamedTuple):
    """Error rate over random episodes."""

    mean: Tensor  # () float64
    half_width: Tensor  # () half of the 95 % interval of the mean, 1.96 standard errors; nan for a single episode
    episodes: Tensor  # (episodes,) error rate of each


def few_shot_error(
    features: Tensor,
    targets: Tensor,
    shots: int,
    episodes: int = 100,
    classes_per_episode: int | None = None,
    generator: torch.Generator | None = None,
) -> FewShotError:
    """Error of the nearest class mean, with each mean taken from ``shots`` samples and tested on the others.

    Every class weighs the same, however many samples it is tested on. Classes of no more than ``shots`` samples are
    left out. Chance is ``1 - 1 / classes``. An episode costs ``2 N D C`` operations.

    Args:
        features: ``(N, D)``.
        targets: ``(N,)`` class indices, any integers.
        shots: samples n that make a class mean.
        episodes: random draws of classes and shots.
        classes_per_episode: classes drawn for an episode; None takes all.
        generator: on the CPU, for draws that repeat.

    Raises:
        ValueError: if shapes or numbers do not fit, or fewer than two classes (or than asked for) have samples enough.
    """
    check_shapes(features=(features, "ND"), targets=(targets, "N", int))
    if shots < 1 or episodes < 1:
        raise ValueError(f"shots={shots} and episodes={episodes}: both must be at least 1")
    h_ND, target_N = to_float64(features), targets.cpu()
    members = [(target_N == c).nonzero()[:, 0] for c in target_N.unique()]
    members = [member for member in members if len(member) > shots]
    drawn = len(members) if classes_per_episode is None else classes_per_episode
    if not 2 <= drawn <= len(members):
        raise ValueError(
            f"{drawn} classes an episode, but {len(members)} have more than shots={shots} samples: take at least two, "
            f"fewer shots, or more samples."
        )
    h_ND = h_ND - h_ND.mean(0)  # distances around the mean do not cancel
    errors = []
    for _ in range(episodes):
        chosen = [members[int(c)] for c in torch.randperm(len(members), generator=generator)[:drawn]]
        chosen = [member[torch.randperm(len(member), generator=generator)] for member in chosen]
        mean_CD = torch.stack([h_ND[member[:shots].to(h_ND.device)].mean(0) for member in chosen])
        threshold_C = mean_CD.square().sum(1) / 2
        wrong = [
            ((h_ND[member[shots:].to(h_ND.device)] @ mean_CD.T - threshold_C).argmax(1) != c).double().mean()
            for c, member in enumerate(chosen)
        ]
        errors.append(torch.stack(wrong).mean())
    error = torch.stack(errors)
    spread = error.std() if episodes > 1 else error.new_full((), torch.nan)
    return FewShotError(error.mean(), 1.96 * spread / math.sqrt(episodes), error)


def few_shot_error_bound(totals: ClassSums, shots: int | None = None) -> Tensor:
    r"""A bound on the error of the nearest class mean from means and variances alone, for any distribution; at most 1.

    A sample of class i is nearer to the estimated mean of j only if
    :math:`2 \lVert h - \mu_i \rVert + \lVert \hat\mu_i - \mu_i \rVert + \lVert \hat\mu_j - \mu_j \rVert \ge d_{ij}`.
    The root mean square of the left is at most :math:`(2 + n^{-1/2}) \sigma_i + n^{-1/2} \sigma_j`, so by Markov's
    inequality its square over :math:`d_{ij}^2` bounds the probability; these add up over j and are averaged over i.
    With exact means that is ``4 (C - 1)`` times the CDNV: why a small CDNV transfers, as Galanti, Gyorgy and Hutter
    (ICLR 2022) found with constants of their own. Derived here; loose, and meant for comparing layers or epochs.

    Args:
        totals: sums over the samples of the new classes.
        shots: samples n in each mean; None for exact means.

    Returns:
        Scalar, float64; nan with fewer than two classes.
    """
    seen_C = totals.counts > 0
    mean_CD, variance_C = class_means(totals)[seen_C], class_variances(totals)[seen_C]
    if len(mean_CD) < 2:
        return mean_CD.new_full((), torch.nan)
    # The root has no slope at zero: a class without spread gets the gradient zero.
    deviation_C = torch.where(variance_C == 0, 0.0, torch.where(variance_C == 0, 1.0, variance_C).sqrt())
    share = 0.0 if shots is None else shots**-0.5
    reach_CC = (2 + share) * deviation_C[:, None] + share * deviation_C
    distance_CC = torch.cdist(mean_CD, mean_CD, compute_mode="donot_use_mm_for_euclid_dist")
    # Filled before the division: the gradient of x / 0 is nan, whatever becomes of the result.
    same_CC = torch.eye(len(mean_CD), dtype=torch.bool, device=mean_CD.device)
    wrong_CC = (reach_CC / distance_CC.masked_fill(same_CC, torch.inf)).square()
    return wrong_CC.sum(1).mean().clamp(max=1)
