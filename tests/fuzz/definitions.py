"""The definitions, computed slowly in float64: one loop for each sum, and NaN where the docstring says so."""

import itertools
import math

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import ClassSums

NAN = torch.tensor(math.nan, dtype=torch.float64)


def _mean(values: list[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64)) / len(values) if values else NAN


def _length(vector: Tensor) -> Tensor:
    largest = vector.abs().max() if len(vector) else torch.zeros((), dtype=torch.float64)
    return largest * (vector / largest).square().sum().sqrt() if largest > 0 else largest * 0


def _angle(a: Tensor, b: Tensor) -> Tensor:
    a, b = a / _length(a), b / _length(b)
    return 2 * torch.atan2(_length(a - b), _length(a + b))


def class_sums(features: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    members = [[h for h, t in zip(features, targets, strict=True) if t == c] for c in range(num_classes)]
    zero = torch.zeros(features.shape[1], dtype=torch.float64)
    return (
        torch.tensor([float(len(part)) for part in members], dtype=torch.float64),
        torch.stack([sum(part, zero) for part in members]),
        torch.stack([sum((h.square().sum() for h in part), torch.zeros((), dtype=torch.float64)) for part in members]),
    )


def class_means(totals: ClassSums) -> Tensor:
    return torch.stack([s / n if n > 0 else s * math.nan for n, s in zip(totals.counts, totals.sums, strict=True)])


def pair_angle_sums(features: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    angles, pairs = torch.zeros(num_classes).double(), torch.zeros(num_classes).double()
    for i, j in itertools.combinations(range(len(features)), 2):
        if targets[i] == targets[j] and _length(features[i]) > 0 and _length(features[j]) > 0:
            angles[int(targets[i])] += _angle(features[i], features[j])
            pairs[int(targets[i])] += 1
    return angles, pairs


def nc3(weight: Tensor, means: Tensor) -> Tensor:
    a, b = weight / _length(weight.flatten()), means / _length(means.flatten())
    return _length((a - b).flatten()) if not (a - b).isnan().any() else NAN


def nc3_cosine(weight: Tensor, means: Tensor) -> Tensor:
    return _mean([(w / _length(w) * (m / _length(m))).sum() for w, m in zip(weight, means, strict=True)])


def cosine_matrix(vectors: Tensor) -> Tensor:
    return torch.stack([torch.stack([(a / _length(a) * (b / _length(b))).sum() for b in vectors]) for a in vectors])


def nc2_etf_error(vectors: Tensor) -> Tensor:
    if len(vectors) < 2:
        return NAN
    gram = vectors @ vectors.T
    return nc3(gram, torch.eye(len(gram), dtype=torch.float64) - 1 / len(gram))


def nc2_equinorm(vectors: Tensor) -> Tensor:
    lengths = [_length(v) for v in vectors]
    if len(lengths) < 2:
        return NAN
    mean = _mean(lengths)
    variance = _mean([(length - mean).square() for length in lengths]) * len(lengths) / (len(lengths) - 1)
    return variance.sqrt() / mean


def nc2_distance_mean(vectors: Tensor) -> Tensor:
    return _mean([_length(a / _length(a) - b / _length(b)) for a, b in itertools.combinations(vectors, 2)])


def _seen(totals: ClassSums) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    rows = [row for row in zip(*totals, strict=True) if row[0] > 0]
    means = [total / n for n, total, _ in rows]
    variances = [
        (square / n - mean.square().sum()).clamp(min=0) for (n, _, square), mean in zip(rows, means, strict=True)
    ]
    return [n for n, _, _ in rows], means, variances


def nc1_quotient(totals: ClassSums) -> Tensor:
    counts, means, variances = _seen(totals)
    if len(counts) < 2 or sum(counts) <= len(counts):
        return NAN
    center = sum(means) / len(means)
    within = sum(n * v for n, v in zip(counts, variances, strict=True)) / sum(counts)
    return within / _mean([(mean - center).square().sum() for mean in means])


def cdnv(totals: ClassSums) -> Tensor:
    counts, means, variances = _seen(totals)
    if sum(counts) <= len(counts):  # no spread is known
        return NAN
    pairs = itertools.combinations(range(len(means)), 2)
    return _mean([(variances[i] + variances[j]) / (2 * (means[i] - means[j]).square().sum()) for i, j in pairs])


def dot_regression(features: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
    errors = []
    for h, t in zip(features, targets, strict=True):
        length, prototype = _length(h), prototypes[int(t)]
        cosine = (h / length * prototype).sum() if length > 1e-8 else torch.zeros((), dtype=torch.float64)
        errors.append((cosine - _length(prototype)).square())
    return _mean(errors) / 2


def balanced_lengths(counts: Tensor) -> Tensor:
    mean = _mean([n.double() for n in counts if n > 0])
    return torch.stack([(mean / n).sqrt() if n > 0 else torch.ones((), dtype=torch.float64) for n in counts])


def within_class_pull(features: Tensor, targets: Tensor, means: Tensor) -> Tensor:
    classes = [
        _mean([(h - v).square().sum() for h, t in zip(features, targets, strict=True) if t == c])
        for c, v in enumerate(means)
    ]
    return sum((value for value in classes if not value.isnan()), torch.zeros(()).double()) / len(means)


def length(vectors: Tensor) -> Tensor:
    return torch.stack([_length(v) for v in vectors]) if len(vectors) else torch.zeros(0).double()


def relative_shift(features: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    rows = [row for row, counts in zip(zip(features, reference, strict=True), mask, strict=True) if counts]
    if not rows:
        return NAN
    return sum(_length(h - r) for h, r in rows) / sum(_length(r) for _, r in rows)


def cosine_shift(features: Tensor, reference: Tensor) -> Tensor:
    return _mean(
        [1 - (h / _length(h) * (r / _length(r))).sum() for h, r in zip(features, reference, strict=True)],
    )


def subspace_logits(features: Tensor, basis: Tensor) -> Tensor:
    rows = []
    for h in features:
        unit = h / _length(h) if _length(h) > 0 else h
        rows.append([_length(s @ unit) * 25 for s in basis])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(features), len(basis))


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    cosines = torch.linalg.svdvals(a @ b.mT).clamp(max=1)
    outside = a - a @ b.mT @ b
    sines = torch.linalg.svdvals(outside).flip(-1)[..., : cosines.shape[-1]].clamp(max=1)
    return torch.where(cosines > 0.7, sines.asin(), cosines.acos())


def chordal_distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a.mT @ a - b.mT @ b) / math.sqrt(2)


def plane_residual(features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    shares = []
    for h, u, v in zip(features, first, second, strict=True):
        plane = torch.linalg.qr(torch.stack([u / _length(u), v / _length(v)], 1)).Q
        unit = h / _length(h)
        shares.append((unit - plane @ (plane.T @ unit)).square().sum())
    return torch.stack(shares) if shares else torch.zeros(0).double()


def target_covariance(targets: Tensor) -> Tensor:
    mean = targets.sum(0) / len(targets)
    total = torch.zeros(targets.shape[1], targets.shape[1]).double()
    for y in targets:
        total = total + torch.outer(y - mean, y - mean)
    return total / len(targets)


def two_neighbor_dimension(features: Tensor) -> Tensor:
    if len(features) < 3:
        return NAN
    logs = []
    for i, h in enumerate(features):
        near = sorted(_length(h - other) for j, other in enumerate(features) if j != i)[:2]
        if near[0] > 0:
            logs.append((near[1] / near[0]).log())
    return len(logs) / sum(logs, torch.zeros(()).double())


def binary_auc(scores: Tensor, targets: Tensor) -> Tensor:
    pairs = [
        (a, b) for a, s in zip(scores, targets, strict=True) for b, t in zip(scores, targets, strict=True) if s > t
    ]
    return _mean([(a > b).double() + (a == b).double() / 2 for a, b in pairs])


def realigned_lengths(weight: Tensor) -> Tensor:
    lengths = [_length(row) for row in weight]
    filled = [length for length in lengths if length > 0]
    mean = sum(filled, torch.zeros(()).double()) / len(filled) if filled else torch.ones(()).double()
    return torch.stack([mean / length if length > 0 else torch.ones(()).double() for length in lengths])


def prior_shift(frequencies: Tensor, train_frequencies: Tensor) -> Tensor:
    new, old = sum(frequencies), sum(train_frequencies)
    return torch.stack([((f / new) / (g / old)).log() for f, g in zip(frequencies, train_frequencies, strict=True)])
