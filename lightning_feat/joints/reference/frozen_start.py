"""The start of a run as a second network, which is run on what the trained one is run on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_feat.joints.data.calls import Forward, forward_inputs
from lightning_feat.joints.data.trace import silent_log, without_trace
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.heads import forget_compiled_code
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import Ear, FeatureTap, Read, TapError, find_layer
from lightning_feat.joints.reference.frozen_copy import FrozenCopy
from lightning_feat.joints.reference.hearing import AskedTap, find_compared, precision_of, silence


class FrozenStart:
    """The network as it was when the run began: a frozen copy in eval mode, run on what the network itself is run on.

    Copied is the *trunk*, a submodule that holds the layers and gets nothing that a trained layer put out. What it is
    called with in a step, the copy is called with: augmentation inside ``training_step`` is the same for both. Where
    there is no such submodule, the whole LightningModule is copied, and ``forward(copy, batch)`` run.

    Memory: the weights of the trunk once more, on the device and in every checkpoint; no gradients, no optimizer state.
    Time: one forward pass a batch, without the activations that a backward would need.

    Args:
        layers: dotted names; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of the layers.
        pooling: see ``joints.features.pooling.pool``.
        trunk: dotted name of the submodule to copy; ``""`` for the whole module. None takes the child of the module
            that holds all layers, and the whole module where there is none or ``forward`` is given.
        forward: ``forward(module, batch)``, for a copy of the whole module; None runs it as the module's own step does,
            see ``prepare``.
        path: a file with the weights of the reference, by ``torch.save`` of a state dict or a checkpoint of Lightning;
            None for those that the run begins with. The checkpoint of the run then holds none.
        keep_graph: hear only passes with gradient, as a loss term does.
    """

    def __init__(
        self,
        layers: Sequence[str | None],
        read: Read | None = None,
        pooling: Pooling | None = None,
        trunk: str | None = None,
        forward: Forward | None = None,
        path: str | None = None,
        keep_graph: bool = False,
    ) -> None:
        if trunk and forward is not None:
            raise ValueError(f"trunk={trunk!r} is called as the module calls it: leave out forward, or the trunk.")
        self._layers, self._read, self._pooling = list(layers), read, pooling
        self.labels = [FeatureTap(layer, read).label for layer in layers]
        self.trunk, self.forward, self.path = trunk, forward, path
        self.calls = _Calls(self, keep_graph)
        self.ways = Ways(forward, "the reference of the features")
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self._frozen = FrozenCopy()

    def begin(self) -> None:
        """Forget an earlier run: the next ``attach`` takes the start anew."""
        self._frozen.clear()
        self.ways.begin()

    def prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """On the first training batch, before its step: find how the whole module is run, where that is copied. Raises
        ``ValueError`` where there is no way, see ``joints.data.ways``.
        """
        if self._frozen.net is None or self._frozen.trunk or self.ways.of("training") is not None:
            return
        taps = self._student_taps()
        with silence(module), without_trace(trainer, module):
            try:
                for tap in taps:
                    tap.attach(module)
                self.ways.find(trainer, module, batch, "training", taps)
            finally:
                for tap in taps:
                    tap.remove()

    def attach(self, module: nn.Module, like: "FrozenStart | None" = None) -> None:
        """Copy what is not copied yet, and hear what the trunk is called with; ``like`` may lend its copy."""
        names = [find_compared(module)[0] if layer is None else layer for layer in self._layers]
        for name in names:
            find_layer(module, name)
        trunk = self._find_trunk(names, module)
        if like is not None and like.path == self.path:
            self._frozen.borrow(like._frozen, trunk)
        self._frozen.make(module, trunk, self.path)
        start = len(trunk) + 1 if trunk else 0
        reads = [tap.read for tap in self._student_taps()]
        self._frozen.hear([AskedTap(name[start:], r, self._pooling) for name, r in zip(names, reads, strict=True)])
        self.calls.hook(module, trunk)

    def listen(self) -> None:
        """Hear what the trunk is called with, and the copy, should another callback run it in this batch."""
        for tap in [self.calls, *self._frozen.taps]:
            tap.listen()

    def hold(self) -> None:
        """Stop hearing, keep what was heard."""
        for tap in [self.calls, *self._frozen.taps]:
            tap.hold()

    def drop(self) -> None:
        for tap in [self.calls, *self._frozen.taps]:
            tap.drop()

    def features(self, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        net, taps = self._frozen.net, self._frozen.taps
        if net is None:
            raise RuntimeError("the reference is made when a fit begins: call attach(module) first.")
        if not all(tap.has_heard for tap in taps):
            for tap in taps:
                tap.listen()
            with torch.no_grad(), precision_of(module):
                if self._frozen.trunk:
                    for args, kwargs in self.calls.take_calls():
                        net(*args, **kwargs)
                else:
                    with _as_if_trained(net, module) as copy:
                        (self.ways.of("training") or forward_inputs)(copy, batch)
        self.shapes = {label: [shape[1:] for shape in tap.shapes] for label, tap in zip(self.labels, taps, strict=True)}
        try:
            return {label: tap.take() for label, tap in zip(self.labels, taps, strict=True)}
        finally:
            self.drop()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty before the start is known, and where it is in a file."""
        net = self._frozen.net
        if self.path is not None:
            return {}
        weights = self._frozen.weights if net is None else net.state_dict()
        return {} if weights is None else {"trunk": self._frozen.trunk, "weights": weights}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo ``state``, before ``attach``."""
        if state and self.path is None:
            self._frozen.clear()
            self._frozen.trunk, self._frozen.weights = state["trunk"], state["weights"]

    def remove(self) -> None:
        """Let go of the module; the start is kept, in host memory."""
        self.calls.remove()
        self._frozen.to_host()

    def _student_taps(self) -> list[FeatureTap]:
        return [FeatureTap(layer, self._read, self._pooling) for layer in self._layers]

    def _find_trunk(self, names: list[str], module: nn.Module) -> str:
        inside = [
            f"{name}." if tap.read == "output" else name.rpartition(".")[0] + "."
            for name, tap in zip(names, self._student_taps(), strict=True)
        ]  # a layer whose input is read is not inside itself
        if self.trunk is None:
            children = {name.partition(".")[0] for name in inside}
            return children.pop() if len(children) == 1 and self.forward is None else ""
        if self.trunk:
            find_layer(module, self.trunk)
            for name, path in zip(names, inside, strict=True):
                if not path.startswith(f"{self.trunk}."):
                    raise ValueError(f"the layer {name!r} is not inside trunk={self.trunk!r}: name one that holds all.")
        return self.trunk


class _Calls(FeatureTap):
    """Hears with what a layer is called, all of it. Stands among the taps of a loss term, and brings the reference in
    and out with them.
    """

    def __init__(self, reference: FrozenStart, keep_graph: bool) -> None:
        super().__init__(layer="", keep_graph=keep_graph)
        self.reference = reference

    def attach(self, module: nn.Module) -> None:
        self.reference.attach(module)

    def hook(self, module: nn.Module, trunk: str) -> None:
        super().remove()
        self.layer = trunk
        if trunk:  # else the copy is run on the batch
            self._ear = ear = _CallEar(self.keep_graph)
            self._handle = find_layer(module, trunk).register_forward_pre_hook(ear.hear_call, with_kwargs=True)
            forget_compiled_code(module)

    def listen(self) -> None:
        if self._ear is not None:
            super().listen()

    def take_calls(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        heard, self._attached().heard = self._attached().heard, []
        if not heard:
            raise TapError(
                f"the submodule {self.layer!r} was not called in this batch, so that its frozen copy has no input. Is "
                "only a method of it used, or a part? Give a trunk that is called, or trunk='' and a forward(module, "
                "batch) that runs the network."
            )
        for args, kwargs in heard:
            if any(tensor.grad_fn is not None for tensor in _tensors_in((args, kwargs))):
                raise TapError(
                    f"the submodule {self.layer!r} gets what trained layers put out, so that a copy of it alone is no "
                    "reference: set trunk to a submodule that gets the data, or trunk='' for the whole module."
                )
        return heard


class _CallEar(Ear):
    def hear_call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.listening and (torch.is_grad_enabled() or not self.keep_graph):
            self.heard.append((args, kwargs))


@contextmanager
def _as_if_trained(net: Any, module: LightningModule) -> Iterator[Any]:
    """The copy of a whole module, with the Trainer that its steps may ask, and logging nothing."""
    net._trainer = module._trainer
    try:
        with silent_log(net):
            yield net
    finally:
        net._trainer = None


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors_in(entry)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
