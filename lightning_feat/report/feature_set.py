"""What a page is about: features with whatever is known of their samples.

Shapes: N samples (rows: images, or tokens), D features, C classes, K target values of a regression.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

Kind: TypeAlias = Literal["classes", "values", "none"]
MOST_ROWS = 20_000  # of one page: each is a point with its neighbours, and the page stays under 15 MB
TOKENS = 2**20  # more than a sample has
_MOST_VALUES = 64  # columns of a target; more is a picture or a sequence, by which nothing can be coloured


@dataclass
class Head:
    """The classifier, as far as it is known.

    Attributes:
        layer: dotted name.
        feeds: label of the layer whose features it gets, where that is one of those on the page.
        weight: ``(C, D)``.
        bias: ``(C,)``.
        basis: ``(C, k, D)`` orthonormal rows, where the classes are subspaces.
    """

    layer: str = ""
    feeds: str | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    basis: Tensor | None = None


@dataclass
class Pictures:
    """Small pictures of samples, in the range of bytes.

    Attributes:
        tiles: ``(P, H, W, 3)`` uint8.
        of_row: ``(N,)`` which tile shows a row; -1 for none.
    """

    tiles: Tensor
    of_row: Tensor


Value = TypeVar("Value")


def known(value: Value | None, what: str) -> Value:
    """The value, which is there wherever a panel that needs it is drawn. ``RuntimeError`` where it is not."""
    if value is None:
        raise RuntimeError(f"these features came without {what}, which this panel shows.")
    return value


@dataclass
class FeatureSet:
    """Features of the same samples in one or more layers.

    Attributes:
        features: ``(N, D)`` float32 by layer, in the memory of the host.
        targets: ``(N,)`` class indices, ``(N, K)`` float values, or None.
        logits: ``(N, C)`` what the network put out in the end, or None.
        indices: ``(N,)`` place of the sample in its data set.
        tokens: ``(N,)`` place of the token in its sample, where rows are tokens.
        total: rows there were before a sample of them was taken.
        pictures: of the samples, or None.
        names: file name of each row, or None.
        class_names: of class 0, 1, ...; empty where classes have no names.
        head: the classifier.
        source: what the features are of, in words: checkpoint, data.
        notes: what a reader must know, in sentences.
    """

    features: dict[str, Tensor]
    targets: Tensor | None = None
    logits: Tensor | None = None
    indices: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    tokens: Tensor | None = None
    total: int = 0
    pictures: Pictures | None = None
    names: list[str] | None = None
    class_names: list[str] = field(default_factory=list)
    head: Head = field(default_factory=Head)
    source: str = ""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_features(self.features)
        size = len(self)
        if not len(self.indices):
            self.indices = torch.arange(size)
        self.total = max(self.total, size)
        for name in ("targets", "logits", "indices", "tokens", "names"):
            value = getattr(self, name)
            if value is not None and len(value) != size:
                raise ValueError(f"{name} has {len(value)} rows, but the features have {size}: give one for each.")
        if self.logits is not None:
            self.logits = self.logits.float().reshape(size, -1)
        if self.targets is not None:
            self.targets, said = plain_targets(self.targets, self.logits)
            self.notes += [said] if said else []
        if self.class_names and self.kind == "classes" and len(self.class_names) < self.num_classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names, but the targets or logits have {self.num_classes} "
                "classes: give a name for each."
            )

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    @property
    def layers(self) -> list[str]:
        """Their labels, in the order of the page."""
        return [*self.features]

    @property
    def ids(self) -> Tensor:
        """``(N,)`` a number for each row, of sample and token."""
        return self.indices if self.tokens is None else self.indices * TOKENS + self.tokens

    @property
    def kind(self) -> Kind:
        """Whether the targets are classes, values of a regression, or not there."""
        if self.targets is None:
            return "none"
        return "values" if self.targets.is_floating_point() else "classes"

    @cached_property
    def num_classes(self) -> int:
        """C, by targets, logits and names."""
        if self.targets is None or self.kind != "classes":
            return 0
        seen = int(self.targets.max()) + 1 if len(self.targets) else 0
        scores = self.class_scores
        return max(seen, 0 if scores is None else scores.shape[1])

    @property
    def class_scores(self) -> Tensor | None:
        """``(N, C)`` logits of the classes: of a single logit those of no and yes; None where there are none."""
        z, t = self.logits, self.targets
        if z is None or t is None or t.is_floating_point():
            return None
        if z.shape[1] == 1:
            z = torch.cat([torch.zeros_like(z), z], dim=1)
        return z if not len(t) or int(t.max()) < z.shape[1] else None

    @cached_property
    def predicted(self) -> Tensor | None:
        """``(N,)`` class of the largest logit, or ``(N, K)`` values; None where not known."""
        if self.kind == "values":
            fits = self.logits is not None and self.targets is not None and self.logits.shape == self.targets.shape
            return self.logits if fits else None
        return None if self.class_scores is None else self.class_scores.argmax(1)

    @cached_property
    def losses(self) -> Tensor | None:
        """``(N,)`` cross-entropy in nats, or the squared error summed over the values; None where not known."""
        if self.targets is None or self.predicted is None:
            return None
        if self.kind == "values":
            return (self.predicted.double() - self.targets.double()).square().sum(1)
        scores = known(self.class_scores, "logits")
        return torch.nn.functional.cross_entropy(scores.double(), self.targets, reduction="none")

    def label(self, index: int) -> str:
        """What a class is called."""
        return self.class_names[index] if index < len(self.class_names) else str(index)

    def labels(self) -> list[str]:
        """What all classes are called; two of one name are told apart by their indices."""
        found = [self.label(c) for c in range(self.num_classes)]
        return [f"{name} [{c}]" if found.count(name) > 1 else name for c, name in enumerate(found)]

    def take(self, rows: Tensor) -> "FeatureSet":
        """The set of these rows alone."""
        some = self.pictures
        pictures = None if some is None else Pictures(some.tiles, some.of_row[rows])
        return FeatureSet(
            {layer: h[rows] for layer, h in self.features.items()},
            None if self.targets is None else self.targets[rows],
            None if self.logits is None else self.logits[rows],
            self.indices[rows],
            None if self.tokens is None else self.tokens[rows],
            self.total,
            pictures,
            None if self.names is None else [self.names[i] for i in rows.tolist()],
            self.class_names,
            self.head,
            self.source,
            [*self.notes],
        )


def as_layers(features: Any, layer: str = "features") -> dict[str, Tensor]:
    """Arrays of any library as ``(N, D)`` float32 by layer; what is not ``(N, D)`` is refused by ``FeatureSet``."""
    named = features if isinstance(features, Mapping) else {layer: features}
    return {str(name): as_tensor(value, f"features of {name!r}") for name, value in named.items()}


def as_tensor(value: Any, what: str) -> Tensor:
    """An array of numpy, a list or a tensor, as a tensor in the memory of the host."""
    try:
        return value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what}: {type(value).__name__} is no array of numbers ({error}).") from None


def plain_targets(targets: Tensor, logits: Tensor | None) -> tuple[Tensor | None, str]:
    """Targets as class indices ``(N,)`` int64 or values ``(N, K)`` float32, and a sentence where that needed a choice.

    Rows of shares that sum to one are classes, the largest share decides; numbers with a point that are all zero or one
    are classes, too; whole numbers beside a single output are values, where they are more than two.
    """
    t = targets.detach()
    if t.ndim > 1 and t.shape[1:].numel() == 1:
        t = t.reshape(len(t))
    if t.ndim > 2 or (t.ndim == 2 and t.shape[1] > _MOST_VALUES and not _are_shares(t)):
        return None, f"The targets, of shape {tuple(targets.shape)}, are neither classes nor a few values: left out."
    if t.is_complex():
        raise ValueError(f"targets are {t.dtype}: give class indices, or numbers for a regression.")
    if t.ndim == 2:
        if _are_shares(t):
            soft = bool(((t > 0) & (t < 1)).any())
            return t.argmax(1), "The targets are shares of classes; here the largest decides." if soft else ""
        return _finite(t), f"The targets have {t.shape[1]} values for each sample."
    whole = not t.is_floating_point()
    if whole or bool(((t == 0) | (t == 1)).all()):
        t = t.long()
        single = logits is not None and logits.shape[1] == 1
        if single and len(t.unique()) > 2:
            return _finite(t[:, None]), ""
        if len(t) and int(t.min()) < 0:
            raise ValueError(f"targets: {int(t.min())} is no class index: leave such samples out.")
        if len(t) and int(t.max()) >= 100_000:
            raise ValueError(f"targets: {int(t.max())} is too large for a class index; of a regression give floats.")
        return t, ""
    return _finite(t[:, None]), ""


def _finite(targets: Tensor) -> Tensor:
    values = targets.float()
    if not values.isfinite().all():
        raise ValueError("targets: some are not finite: leave such samples out.")
    return values


def _are_shares(targets: Tensor) -> bool:
    if targets.ndim != 2 or targets.shape[1] < 2 or not len(targets):
        return False
    values = targets.double()
    return bool((values >= 0).all() and ((values.sum(1) - 1).abs() < 2e-2).all())


def check_features(features: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` unless these are real features ``(N, D)`` of the same samples, two at least."""
    if not features:
        raise ValueError("features: there are none; give an array (N, D), or a dict of them by layer.")
    sizes = {name: len(h) if h.ndim else 0 for name, h in features.items()}
    for name, h in features.items():
        if h.ndim != 2 or h.is_complex():
            raise ValueError(
                f"features of {name!r} have shape {tuple(h.shape)} and dtype {h.dtype}; they must be real and (N, D): "
                "pool or flatten feature maps first."
            )
    if len({*sizes.values()}) > 1:
        raise ValueError(f"features of the layers have different numbers of rows: {sizes}.")
    size, width = min(sizes.values()), min(h.shape[1] for h in features.values())
    if size < 2 or width < 1:
        raise ValueError(f"features: {size} samples of {width} features are too few for a page: give two at least.")


def sequence_of_names(names: Sequence[Any] | None) -> list[str]:
    """Names as strings."""
    return [] if names is None else [str(name) for name in names]
