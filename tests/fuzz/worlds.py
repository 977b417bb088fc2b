"""A world is a small data set, drawn whole: the arguments of any function come from it, in any guise.

What it gives depends on its fields and on the name asked for alone, so that a world which differs in one field
(``replace(world, scale=...)``) gives the same numbers scaled, permuted, in another dtype or in another layout.

Shapes: N samples, D features, C classes, k dimensions of a subspace.
"""

import zlib
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_feat.functional.common.class_sums import ClassSums, class_sums, second_moment
from lightning_feat.functional.common.second_pass import CenterSums, ClassCenters, center_sums, class_centers
from lightning_feat.functional.grassmann import random_basis
from lightning_feat.functional.neural_collapse.simplex import simplex_prototypes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FINITE = ("normal", "some_zero", "doubled", "whole")  # each class with directions of its own, as a rule
EXTREME = ("zero", "equal", "wild", "nan", "inf")
LAYOUTS = ("contiguous", "transposed", "strided")
SCALES = (2.0**-100, 2.0**-50, 1.0, 2.0**50, 2.0**100)  # 1e-30 to 1e30, exactly


@dataclass(frozen=True)
class World:
    """See the top of the file."""

    num_samples: int = 7
    num_features: int = 4
    num_classes: int = 3
    subspace_dim: int = 2
    seed: int = 0
    kind: str = "normal"
    classes: str = "all"
    dtype: torch.dtype = torch.float64
    index_dtype: torch.dtype = torch.int64
    layout: str = "contiguous"
    scale: float = 1.0  # of all that has the unit of the features or of the classifier
    order: int | None = None  # seed of another order of the samples
    part: int | None = None  # 0 or 1: the samples before or after the middle
    grad: bool = False
    nudge: float = 0.0  # along a direction drawn for each floating tensor
    tape: list[Tensor] = field(default_factory=list, compare=False, repr=False)  # the floating tensors made so far

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{name} {self.seed}".encode()))

    def whole_number(self, name: str, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator(name)))

    def permutation(self) -> Tensor:
        if self.order is None:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(self.order))

    def per_sample(self, values: Tensor) -> Tensor:
        values = values[self.permutation()]
        middle = self.num_samples // 2
        return values if self.part is None else (values[:middle], values[middle:])[self.part]

    def finish(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """In the dtype and layout of the world, and a leaf that wants a gradient where it does."""
        values = values.to(self.dtype if dtype is None else dtype)
        if self.layout == "transposed" and values.ndim > 1:
            values = values.mT.contiguous().mT
        elif self.layout != "contiguous" and values.ndim:
            values = torch.stack([values, values], -1)[..., 0]
        if not values.is_floating_point():
            return values
        if self.nudge:
            values = values + self.nudge * self.direction(len(self.tape), values)
        self.tape.append(values.detach().requires_grad_(self.grad))
        return self.tape[-1]

    def direction(self, place: int, values: Tensor) -> Tensor:
        return torch.randn(values.shape, generator=self.generator(f"direction {place}"), dtype=values.dtype)

    def raw(self, name: str, *shape: int) -> Tensor:
        """Float64 numbers of the kind of the world, not scaled."""
        values = torch.randn(shape, generator=self.generator(name), dtype=torch.float64)
        if self.kind == "zero":
            return values * 0
        if self.kind == "whole":
            values = (2 * values).round()
        elif self.kind == "equal" and shape[0]:
            values = values[:1].expand(shape).clone()
        elif self.kind == "wild":  # rows from 1e-30 to 1e30
            exponent = torch.randint(-100, 101, (shape[0], *[1] * (len(shape) - 1)), generator=self.generator(name))
            values = values * torch.exp2(exponent.double())
        elif self.kind == "doubled":
            values[1:2] = values[:1].expand_as(values[1:2])
        elif values.numel() and self.kind != "normal":
            values[0] = {"some_zero": 0.0, "nan": torch.nan, "inf": torch.inf}[self.kind]
        return values

    def features(self, name: str = "features") -> Tensor:
        return self.finish(self.per_sample(self.scale * self.raw(name, self.num_samples, self.num_features)))

    def outputs(self) -> Tensor:
        """Targets of a regression, (N, C)."""
        return self.finish(self.per_sample(self.scale * self.raw("outputs", self.num_samples, self.num_classes)))

    def logits(self) -> Tensor:
        return self.finish(self.per_sample(self.raw("logits", self.num_samples, self.num_classes)))

    def losses(self) -> Tensor:
        return self.finish(self.per_sample(self.raw("losses", self.num_samples).abs()))

    def scores(self) -> Tensor:
        return self.finish(self.per_sample(self.scale * self.raw("scores", self.num_samples)))

    def targets(self, name: str = "targets") -> Tensor:
        places = torch.arange(self.num_samples)
        if self.classes == "all":  # as many of each class as of any other, or one more
            values = (places + self.whole_number(name, self.num_classes)) % self.num_classes
        elif self.classes == "last":
            values = torch.full_like(places, self.num_classes - 1)
        else:
            values = torch.randint(self.num_classes, (self.num_samples,), generator=self.generator(name))
        return self.finish(self.per_sample(values), self.index_dtype)

    def soft_targets(self) -> Tensor:
        values = torch.rand(self.num_samples, self.num_classes, generator=self.generator("soft"), dtype=torch.float64)
        return self.finish(self.per_sample(values / values.sum(1, keepdim=True)))

    def mask(self, name: str = "mask") -> Tensor:
        values = torch.rand(self.num_samples, generator=self.generator(name)) > 0.4
        return self.finish(self.per_sample(values), torch.bool)

    def weights(self) -> Tensor:
        values = torch.rand(self.num_samples, generator=self.generator("weights"), dtype=torch.float64)
        return self.finish(self.per_sample((4 * values).round() / 4))

    def vectors(self, name: str = "vectors") -> Tensor:
        return self.finish(self.scale * self.raw(name, self.num_classes, self.num_features))

    def per_class(self, name: str = "bias") -> Tensor:
        return self.finish(self.raw(name, self.num_classes))

    def lengths(self, name: str = "lengths") -> Tensor:
        return self.finish(self.scale * self.raw(name, self.num_classes).abs())

    def counts(self) -> Tensor:
        values = torch.randint(1, 50, (self.num_classes,), generator=self.generator("counts"))
        return self.finish(values, torch.int64)

    def basis(self, name: str = "basis") -> Tensor:
        """(C, k, D) in float32 or float64: a basis is kept in nothing less."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        k = min(self.subspace_dim, self.num_features)
        if k == 0:
            return self.finish(torch.zeros(self.num_classes, 0, self.num_features), dtype)
        shape = (self.num_classes, k, self.num_features)
        values = random_basis(*shape, generator=self.generator(name), dtype=torch.float64)
        if self.kind == "doubled" and self.num_classes > 1:
            values[1] = values[0]
        if self.kind in ("nan", "inf"):
            values[0] = torch.nan if self.kind == "nan" else torch.inf
        return self.finish(values, dtype)

    def matrices(self, name: str = "matrices") -> Tensor:
        k = min(self.subspace_dim, self.num_features)
        return self.finish(self.scale * self.raw(name, self.num_classes, k, self.num_features))

    def simplex(self) -> Tensor:
        """(C, D) in float32 or float64, wide enough for the classes of the world; of two classes at least."""
        classes = max(self.num_classes, 2)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.finish(self.scale * simplex_prototypes(classes, max(self.num_features, classes), self.seed), dtype)

    def totals(self) -> ClassSums:
        return class_sums(self.features(), self.targets(), self.num_classes)

    def moment(self) -> Tensor:
        return second_moment(self.features())

    def centers(self) -> ClassCenters:
        return class_centers(self.totals())

    def residuals(self) -> CenterSums:
        return center_sums(self.features(), self.targets(), self.logits(), self.centers())

    def covariance(self) -> Tensor:
        values = self.outputs().double()
        values = values - values.mean(0)
        return values.T @ values / max(len(values), 1)


_seeds = st.integers(0, 1000)

regular_worlds = st.builds(
    World,
    num_samples=st.integers(6, 9),
    num_features=st.integers(3, 5),
    num_classes=st.integers(2, 3),
    subspace_dim=st.integers(1, 2),
    seed=_seeds,
)

finite_worlds = st.builds(
    World,
    num_samples=st.sampled_from([0, 1, 2, 3, 6, 9]),
    num_features=st.integers(1, 5),
    num_classes=st.integers(1, 4),
    subspace_dim=st.integers(1, 2),
    seed=_seeds,
    kind=st.sampled_from(FINITE),
    classes=st.sampled_from(["all", "last", "some"]),
    scale=st.sampled_from(SCALES),
)

any_worlds = st.builds(
    World,
    num_samples=st.sampled_from([0, 1, 2, 5, 9]),
    num_features=st.sampled_from([0, 1, 3]),
    num_classes=st.integers(1, 3),
    subspace_dim=st.integers(1, 2),
    seed=_seeds,
    kind=st.sampled_from(FINITE + EXTREME),
    classes=st.sampled_from(["all", "last", "some"]),
    dtype=st.sampled_from(FLOATS),
    index_dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from(SCALES),
    grad=st.booleans(),
)
