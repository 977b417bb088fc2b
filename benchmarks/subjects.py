"""What a callback spends its time in, each at any number of classes, width of features and number of samples.

A new one joins with one entry of ``SUBJECTS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import grassmann
import torch
from torch import Tensor
from turns import Step

from lightning_feat.functional.feature_shift import relative_shift
from lightning_feat.functional.neural_collapse.losses import between_class_push, within_class_pull
from lightning_feat.functional.simplicity_bias.clusters import two_means
from lightning_feat.functional.transfer.probe import linear_probe
from lightning_feat.metrics import NeuralCollapse

Axis = Literal["classes", "width", "samples"]


class Sizes(NamedTuple):
    """Of classes, of features, and of samples."""

    classes: int
    width: int
    samples: int


@dataclass(frozen=True)
class Subject:
    """Something to time.

    Args:
        name: in tables and in the legend.
        make: the step at some sizes on a device.
        base: where it is profiled; of the axis that grows, one size is half of it, others twice and four times.
        grows: in which sizes it is measured.
    """

    name: str
    make: Callable[[Sizes, str], Step]
    base: Sizes
    grows: tuple[Axis, ...] = ("classes", "width", "samples")

    def sizes(self, axis: Axis, factors: tuple[float, ...]) -> list[Sizes]:
        return [self.base._replace(**{axis: max(2, int(getattr(self.base, axis) * factor))}) for factor in factors]


def features_of(sizes: Sizes, device: str) -> tuple[Tensor, Tensor]:
    """Features ``(N, D)`` about class means, and targets ``(N,)``."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(sizes.samples) % sizes.classes
    means = torch.randn(sizes.classes, sizes.width, generator=generator)
    features = means[targets] + torch.randn(sizes.samples, sizes.width, generator=generator)
    return features.to(device), targets.to(device)


def grassmann_step(sizes: Sizes, device: str) -> Step:
    step = grassmann.our_step(grassmann.parameter((sizes.classes, sizes.width, 8), device, torch.float32))
    return lambda: [step() for _ in range(8)]  # one of eight repairs the basis


def collapse_update(sizes: Sizes, device: str) -> Step:
    metric = NeuralCollapse(sizes.classes, sizes.width, second_moment=False).to(device)
    features, targets = features_of(sizes, device)
    return lambda: metric.update(features, targets)


def collapse_measures(sizes: Sizes, device: str) -> Step:
    metric = NeuralCollapse(sizes.classes, sizes.width, second_moment=False).to(device)
    features, targets = features_of(sizes._replace(samples=4 * sizes.classes), device)
    metric.update(features, targets)

    def step() -> object:
        metric._computed = None  # torchmetrics keeps the last result
        return metric.compute()

    return step


def collapse_terms(sizes: Sizes, device: str) -> Step:
    features, targets = features_of(sizes, device)
    means = torch.nn.Parameter(torch.randn(sizes.classes, sizes.width, device=device))
    features.requires_grad_()

    def step() -> None:
        features.grad = means.grad = None
        (within_class_pull(features, targets, means) + between_class_push(means, "per_class")).backward()

    return step


def shift(sizes: Sizes, device: str) -> Step:
    features, _ = features_of(sizes, device)
    start = features + torch.randn_like(features)
    features.requires_grad_()

    def step() -> None:
        features.grad = None
        relative_shift(features, start).backward()

    return step


def selection(sizes: Sizes, device: str) -> Step:
    features, targets = features_of(sizes, device)
    return lambda: two_means(features, targets, sizes.classes)


def probe(sizes: Sizes, device: str) -> Step:
    features, targets = features_of(sizes, device)
    part = features, targets
    return lambda: linear_probe(*part, *part, *part, penalties=[0.1])


SUBJECTS = [
    Subject("Grassmann, eight steps", grassmann_step, Sizes(100, 512, 0), ("classes", "width")),
    Subject("neural collapse, sums of a batch", collapse_update, Sizes(100, 512, 512)),
    Subject("neural collapse, all measures", collapse_measures, Sizes(100, 512, 0), ("classes", "width")),
    Subject("neural collapse, loss terms", collapse_terms, Sizes(100, 512, 512)),
    Subject("feature shift, loss term", shift, Sizes(2, 512, 4096), ("width", "samples")),
    Subject("selection, clusters of outputs", selection, Sizes(20, 50, 4000)),
    Subject("linear probe, one penalty", probe, Sizes(10, 128, 1000)),
]
