"""Read what a layer put out, in any LightningModule; every callback gets its features and targets here.

A tap hears only while it listens: callbacks listen from the start of a batch to the first ``on_before_backward``, so
that validation stays out, no graph outlives its batch, and a forward that runs again (the second closure of SAM, a
block recomputed in backward) is not heard twice.
"""

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_feat.joints.arguments import checked
from lightning_feat.joints.features.heads import find_classifier, forget_compiled_code
from lightning_feat.joints.features.pooling import Pooling, check_pooling, pool

Read: TypeAlias = Literal["input", "output"]


class TapError(RuntimeError):
    """A tapped layer did not run, or put out something that is not features."""


class FeatureTap:
    """Hear the features of one layer.

    Args:
        layer: dotted name of a submodule; None means the input of the classifier (see ``find_classifier``), for timm
            models the penultimate features.
        read: the ``"output"`` of the layer (default), or its first ``"input"`` (default where ``layer`` is None).
        pooling: how features that are not ``(N, D)`` become so, see ``pool``. None refuses them.
        keep_graph: keep the features differentiable (for a loss term) instead of detaching them (for a monitor).
        classifier: dotted name of the classifier, where ``layer`` is None and it cannot be found.
        pools: whether the owner lets its user choose a pooling; else an error does not tell him to.
        asks: by which argument of its owner a user names the layer, for an error.
    """

    says_read = False  # else its user may have named the classifier, and want what it gets
    _by_sample = True  # of a head over positions hear maps, whose positions know their sample

    @checked
    def __init__(
        self,
        layer: str | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        keep_graph: bool = False,
        classifier: str | None = None,
        pools: bool = True,
        asks: str = "",
    ) -> None:
        self.layer = layer
        self.read: Read = read or ("input" if layer is None else "output")
        if read is not None or layer is None:
            self.says_read = True
        # Named as `layer` alone it would be its output that is read: the logits.
        self.asks = asks or ("layer" if read is not None else "layer` with `read='input'")
        self._pools = pools
        self.pooling = pooling
        self.keep_graph = keep_graph
        self.classifier = classifier
        self._ear: Ear | None = None
        self._handle: RemovableHandle | None = None

    @property
    def label(self) -> str:
        """The name that logged values carry: the layer's, with ``.input`` where that is read; of a classifier without
        a name ``penultimate``, or ``logits`` for its output.
        """
        if self.layer is None:
            return "penultimate" if self.read == "input" else "logits"
        return self.layer if self.read == "output" else f"{self.layer}.input"

    def attach(self, module: nn.Module) -> None:
        """Hook the layer of ``module``; an earlier hook is removed. Raises ``ValueError`` if there is no such layer."""
        self.remove()
        layer = self.find(module)
        around = around_positions(module, layer) if self._by_sample else None
        layer = layer if around is None else around
        self._ear = Ear(self.keep_graph, around is not None)
        if self.read == "input":
            self._handle = layer.register_forward_pre_hook(self._ear.hear_input, with_kwargs=True)
        else:
            self._handle = layer.register_forward_hook(self._ear.hear_output)
        forget_compiled_code(module)

    def find(self, module: nn.Module) -> nn.Module:
        """The layer of ``module``. Raises ``ValueError`` if there is no such layer."""
        if self.layer is None and self.classifier is None:
            return find_classifier(module, self.asks)[1]
        return find_layer(module, self.layer if self.layer is not None else str(self.classifier))

    def listen(self) -> None:
        """Begin to hear; what was heard before is dropped."""
        ear = self._attached()
        ear.heard.clear()
        ear.listening, ear.without_gradient = True, 0

    def hold(self) -> None:
        """Stop hearing, keep what was heard. Without effect if the tap does not listen."""
        if self._ear is not None:
            self._ear.listening = False

    def take(self, mask: Tensor | None = None) -> Tensor:
        """Stop hearing and give the features ``(N, D)``; those of several forwards are concatenated in their order.

        Args:
            mask: ``(N, T)`` which tokens count, for ``pooling`` that takes their mean, the largest or the last.

        Raises:
            TapError: if the layer did not run since ``listen``, or gave no tensor.
            ValueError: if the shape needs a pooling that was not chosen, or the mask does not fit it.
        """
        ear = self._attached()
        ear.listening = False
        heard, ear.heard = ear.heard, []
        if not heard:
            raise TapError(self._why_nothing(ear))
        for entry in heard:
            if not isinstance(entry, Tensor):
                raise TapError(
                    f"the {self.read} of layer {self.layer or '(classifier)'} is a {type(entry).__name__}, not a "
                    "tensor: name a layer that gives a tensor, or read='input' of the layer that follows."
                )
        return torch.cat([pool(entry, self.pooling, f"layer {self.label}", mask, self._pools) for entry in heard])

    def check(self) -> None:
        """Raise the ``ValueError`` of ``take`` where the pooling does not fit what was heard, which stays."""
        for entry in self._attached().heard:
            if isinstance(entry, Tensor):
                check_pooling(entry, self.pooling, f"layer {self.label}", self._pools)

    def _why_nothing(self, ear: "Ear") -> str:
        layer = f"the layer {self.layer or '(classifier)'}"
        if ear.without_gradient:
            return (
                f"{layer} ran in this batch without gradient alone, so that a loss on its features would train "
                "nothing. Does it stand in a block that is checkpointed with use_reentrant=True, which runs without "
                "gradient first? Set use_reentrant=False. Is it called under torch.no_grad? Name a layer that trains."
            )
        compiled = ""
        if "torch._dynamo" in sys.modules:
            compiled = (
                " Or was the function that calls it compiled, and run, before this callback came? Compiled code calls "
                "no hook that came later: compile after, or call torch.compiler.reset() before fit."
            )
        return (
            f"{layer} did not run in this batch, so there are no features. Is its weight used functionally "
            f"(F.linear(x, layer.weight)), or is it skipped in this step? Name a layer that is called.{compiled}"
        )

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of what was heard and not taken yet, call by call."""
        heard = [] if self._ear is None else self._ear.heard
        return [tuple(entry.shape) for entry in heard if isinstance(entry, Tensor)]

    def drop(self) -> None:
        """Stop hearing and forget what was heard."""
        if self._ear is not None:
            self._ear.listening = False
            self._ear.heard.clear()

    def remove(self) -> None:
        """Take the hook away. Without effect if there is none."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._ear = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside the block; afterwards nothing is kept that was not taken."""
        self.listen()
        try:
            yield
        finally:
            self.drop()

    def _attached(self) -> "Ear":
        if self._ear is None:
            raise RuntimeError("the tap is not attached to a module: call attach(module) first.")
        return self._ear


class Ear:
    """The hook: an object reachable from the layer, so that a copy of the module gets an ear, and a memory, of its
    own.
    """

    def __init__(self, keep_graph: bool, maps: bool = False) -> None:
        self.keep_graph = keep_graph
        self.maps = maps  # channels first, of any number of axes, to be heard as tokens
        self.listening = False
        self.heard: list[Any] = []
        self.without_gradient = 0  # what was not heard for that reason

    def hear_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.listening:
            self._store(args[0] if args else next(iter(kwargs.values()), None))

    def hear_output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.listening:
            self._store(output)

    def _store(self, value: Any) -> None:
        if self.keep_graph and not torch.is_grad_enabled():
            self.without_gradient += 1
            return  # a pass for a target or a teacher: a loss on it would have no gradient, and thin out the others
        if self.maps and isinstance(value, Tensor):
            value = value.flatten(2).transpose(1, 2)  # (N, positions, D)
            value = value[:, 0] if value.shape[1] == 1 else value
        self.heard.append(value.detach() if isinstance(value, Tensor) and not self.keep_graph else value)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"keep_graph": self.keep_graph, "maps": self.maps}
        return {**kept, "listening": False, "heard": [], "without_gradient": 0}


def around_positions(module: nn.Module, layer: nn.Module) -> nn.Module | None:
    """What stands around ``layer`` where it is a head that a callback put in the place of a convolution, which gets the
    positions of all samples as samples; else None.
    """
    around = (part for part in module.modules() if getattr(part, "over_positions", False))
    return next((part for part in around if part.head is layer), None)


def find_layer(module: nn.Module, name: str) -> nn.Module:
    """The submodule with this dotted name, through ``torch.compile`` wrappers too.

    Raises:
        ValueError: if there is none; the message names the nearest ones.
    """
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [known.replace("_orig_mod.", "") for known, _ in module.named_modules() if known]
        nearest = _nearest(name, names)
        raise ValueError(
            f"{type(module).__name__} has no layer {name!r}. "
            + (f"Nearest: {', '.join(nearest)}." if nearest else f"It has: {', '.join(names[:8])}.")
        ) from None


def _nearest(name: str, names: list[str], most: int = 4) -> list[str]:
    same_end = [known for known in names if known.endswith(f".{name}")]
    similar = difflib.get_close_matches(name, names, n=most, cutoff=0.5)
    return list(dict.fromkeys([*same_end, *similar]))[:most]
