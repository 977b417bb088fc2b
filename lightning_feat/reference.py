"""What a network is compared with: itself at the start of the run, or itself without its prompts.

A *reference* gives the features that some layers would have for the batch of this step. ``FrozenStart`` runs a frozen
copy of the network, ``CachedStart`` looks them up, ``WithoutPrompts`` runs the network itself with its prompts switched
off; ``StartWeights`` keeps weights alone. The start is that of the run, and stays so when the run resumes: it is part
of the callback's checkpoint.

A copy lives outside the module. As a submodule it would enter the optimizer and the checkpoint, averaging callbacks
would double it, and the user's own ``train()`` would switch its dropout on.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_feat.batches import TargetKey, inputs_of, targets_of
from lightning_feat.clip_towers import find_clip_towers
from lightning_feat.functional.feature_shift import relative_shift
from lightning_feat.heads import find_classifier, forget_compiled_code
from lightning_feat.passes import Forward, clean_batches, clean_loader, forward_inputs, run_forward, without_trace
from lightning_feat.taps import FeatureTap, Pooling, Read, TapError, _Ear, find_layer

_KINDS: tuple[Literal["text"], Literal["image"]] = ("text", "image")
_MOST_APART = 0.01  # share of their length by which cached features may differ: rounding, in another batch, of bfloat16


class Reference(Protocol):
    """Gives features to compare those of this step with."""

    labels: list[str]

    def features(self, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        """By label of the layer, what it would put out for ``batch``; without gradient."""


class Compared(NamedTuple):
    """Features of a layer and those of the reference, of the same tokens."""

    features: Tensor  # (R, D)
    reference: Tensor  # (R, D)
    mask: Tensor | None = None  # (R,) which of them count, None for all


class Comparison:
    """Taps on some layers, and a reference to compare them with.

    Args:
        layers: dotted names; None for the input of the classifier.
        reference: gives the features of the same layers.
        read: the ``"output"`` or the ``"input"`` of the layers.
        pooling: see ``lightning_feat.taps.pool``; that of the reference.
        mask_key: where a batch keeps which tokens count, bool or 0 and 1, ``(N, T)``: see ``lightning_feat.batches``.
        keep_graph: keep the features differentiable, and hear only passes with gradient.
    """

    def __init__(
        self,
        layers: Sequence[str | None],
        reference: Reference,
        read: Read | None,
        pooling: Pooling | None,
        mask_key: TargetKey,
        keep_graph: bool,
    ) -> None:
        self.taps = [FeatureTap(layer, read, pooling, keep_graph) for layer in layers]
        self.labels = [tap.label for tap in self.taps]
        self.reference, self.mask_key = reference, mask_key

    @property
    def all_taps(self) -> list[FeatureTap]:
        """What must listen in a step, and be attached before."""
        return [*self.taps, *([self.reference.calls] if isinstance(self.reference, FrozenStart) else [])]

    def take(self, module: LightningModule, batch: Any) -> dict[str, Compared]:
        """What the taps have heard of this batch, beside its reference."""
        heard = {tap.label: tap.take() for tap in self.taps}
        reference = self.reference.features(module, batch)
        mask = None if self.mask_key is None else targets_of(batch, self.mask_key).bool().flatten()
        return {label: Compared(features, reference[label], mask) for label, features in heard.items()}


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
        pooling: see ``lightning_feat.taps.pool``.
        trunk: dotted name of the submodule to copy; ``""`` for the whole module. None takes the child of the module
            that holds all layers, and the whole module where there is none or ``forward`` is given.
        forward: ``forward(module, batch)``, for a copy of the whole module; None calls it with the first entry of the
            batch.
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
        self._frozen = _Frozen()

    def begin(self) -> None:
        """Forget an earlier run: the next ``attach`` takes the start anew."""
        self._frozen.clear()

    def attach(self, module: nn.Module, like: "FrozenStart | None" = None) -> None:
        """Copy what is not copied yet, and hear what the trunk is called with; ``like`` may lend its copy."""
        names = [find_classifier(module)[0] if layer is None else layer for layer in self._layers]
        for name in names:
            find_layer(module, name)
        trunk = self._find_trunk(names, module)
        if like is not None and like.path == self.path:
            self._frozen.borrow(like._frozen, trunk)
        self._frozen.make(module, trunk, self.path)
        start = len(trunk) + 1 if trunk else 0
        reads = [tap.read for tap in self._student_taps()]
        self._frozen.hear([_AskedTap(name[start:], r, self._pooling) for name, r in zip(names, reads, strict=True)])
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
                    (self.forward or forward_inputs)(net, batch)  # type: ignore[arg-type]
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


class _Frozen:
    """The copy and the taps on it. Copies of a module that is being trained share it: nobody changes it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.net: nn.Module | None = None
        self.trunk = ""
        self.weights: dict[str, Tensor] | None = None  # of the start, while there is no copy
        self.taps: list[_AskedTap] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Frozen":
        return self

    def make(self, module: nn.Module, trunk: str, path: str | None) -> None:
        if self.net is None:
            if self.weights is not None and self.trunk != trunk:
                raise ValueError(
                    f"the checkpoint has a reference of {self.trunk or 'the whole module'!r}, but the layers lie in "
                    f"{trunk or 'the whole module'!r}: resume with the layers that the run began with, or set trunk."
                )
            original = find_layer(module, trunk) if trunk else module
            net = copy.deepcopy(getattr(original, "_orig_mod", original))
            weights = self.weights if path is None else _read_weights(path, trunk, net)
            if weights is not None:
                net.load_state_dict(weights)
            self.net, self.trunk, self.weights = net.requires_grad_(False).eval(), trunk, None
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        # Once and not each step: what is moved later than this, the user moves himself.
        self.net.to(device)

    def borrow(self, other: "_Frozen", trunk: str) -> None:
        """One copy for two callbacks, unless this one's start is another."""
        if self.net is None and other.net is not None and other.trunk == trunk:
            theirs = other.net.state_dict()
            mine = theirs if self.weights is None else self.weights
            if mine.keys() == theirs.keys() and all(torch.equal(mine[n].cpu(), w.cpu()) for n, w in theirs.items()):
                self.net, self.trunk, self.weights = other.net, trunk, None

    def hear(self, taps: "list[_AskedTap]") -> None:
        for tap in self.taps:
            tap.remove()
        self.taps = taps
        if self.net is not None:
            for tap in taps:
                tap.attach(self.net)

    def to_host(self) -> None:
        for tap in self.taps:
            tap.remove()
        if self.net is not None:
            self.weights = {name: value.cpu() for name, value in self.net.state_dict().items()}
            self.net, self.taps = None, []


class _AskedTap(FeatureTap):
    """Says whether it has heard."""

    @property
    def has_heard(self) -> bool:
        return self._ear is not None and bool(self._ear.heard)


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


class _CallEar(_Ear):
    def hear_call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.listening and (torch.is_grad_enabled() or not self.keep_graph):
            self.heard.append((args, kwargs))


class CachedStart:
    """The features of the start for every training example, in host memory; no second network, no second pass.

    Valid only where an example is the same in every epoch. Before the first batch the network, still at its start, is
    run on it in eval mode, as the module gets it: features that differ from the cached ones are refused. What a
    ``training_step`` itself does to its inputs is not seen.

    Memory: examples x features x 2 or 4 bytes for each layer, on every process and in every checkpoint (tokens and
    positions count each). 50,000 examples of 512 features take 51 MB in float16.
    Time: one pass over the training data when the run begins.

    Args:
        layers: dotted names; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of the layers.
        pooling: see ``lightning_feat.taps.pool``.
        index_key: where a batch keeps the index of each example, int64 ``(N,)``: see ``lightning_feat.batches``.
        dtype: ``"float16"`` or ``"float32"``; values beyond 65504 need the latter.
        forward: ``forward(module, batch)`` that runs the network.
    """

    def __init__(
        self,
        layers: Sequence[str | None],
        read: Read | None,
        pooling: Pooling | None,
        index_key: TargetKey,
        dtype: Literal["float16", "float32"] = "float32",
        forward: Forward | None = None,
    ) -> None:
        if index_key is None:
            raise ValueError(
                "cached features are looked up by the index of an example: set index_key to where a batch keeps it "
                "(lightning_feat.data.IndexedDataset adds it), or reference='live'."
            )
        if dtype not in ("float16", "float32"):
            raise ValueError(f"cache_dtype={dtype!r}: choose 'float16' or 'float32'.")
        self.taps = [FeatureTap(layer, read, pooling) for layer in layers]
        self.labels = [tap.label for tap in self.taps]
        self.index_key, self.forward = index_key, forward
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.cache = _Cache()

    def begin(self) -> None:
        """Forget an earlier run."""
        self.cache = _Cache()

    def remove(self) -> None:
        """Nothing was put on the module."""

    def fill(self, trainer: Trainer, module: LightningModule) -> None:
        """Run the network over the training data; nothing happens where that is done."""
        if self.cache.rows:
            return
        if trainer.global_step > 0:
            raise RuntimeError("the network has been trained, and its features at the start are not known any more.")
        loader = clean_loader(trainer, trainer.train_dataloader, "training")
        parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        with self._attached(module), without_trace(trainer, module):
            for batch in clean_batches(trainer, module, loader):
                index = self._indices(batch)
                rows = {label: self._by_example(h, index) for label, h in self._run(trainer, module, batch).items()}
                parts.append((index.cpu(), {label: h.to(self.dtype).cpu() for label, h in rows.items()}))
        index = torch.cat([part for part, _ in parts])
        rows = {label: torch.cat([part[label] for _, part in parts]) for label in self.labels}
        self.cache.rows = {label: _of_all_processes(trainer, module, index, rows[label]) for label in self.labels}
        for label, h in self.cache.rows.items():
            if not bool(h.isfinite().all()):
                raise ValueError(
                    f"cached features of {label} are not finite, or an index below {len(h)} is missing: set "
                    "cache_dtype='float32', and give every example an index, from 0 on."
                )
        self.cache.is_fresh = True

    def features(self, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        if not self.cache.rows:
            self.fill(module.trainer, module)
        return self._look_up(module, batch)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.cache.rows} if self.cache.rows else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo ``state``."""
        if state:
            if sorted(state["rows"]) != sorted(self.labels):
                raise ValueError(
                    f"the checkpoint has cached features of {sorted(state['rows'])}, not of {sorted(self.labels)}: "
                    "resume with the layers that the run began with."
                )
            self.cache.rows = state["rows"]

    def _look_up(self, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        index = self._indices(batch).cpu()
        size = min(len(rows) for rows in self.cache.rows.values())
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(f"an example has the index {int(index.max())}, but features of {size} are cached.")
        found = {label: rows[index] for label, rows in self.cache.rows.items()}
        return {label: rows.flatten(0, 1).to(module.device) for label, rows in found.items()}

    def check(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Refuse features that are not those of the first batch, before the network has run on it (which changes
        BatchNorm's statistics); nothing happens in later batches.
        """
        if not self.cache.is_fresh:
            return
        self.cache.is_fresh = False
        with self._attached(module), without_trace(trainer, module):
            now = self._run(trainer, module, batch)
        for label, cached in self._look_up(module, batch).items():
            apart = float(relative_shift(now[label], cached)) if now[label].shape == cached.shape else float("inf")
            if apart > _MOST_APART:
                raise ValueError(
                    f"the features of {label} in the first batch are not those that were cached, by {apart:.2g} of "
                    "their length: the training data are augmented, or index_key is wrong. Use reference='live'."
                )

    def _run(self, trainer: Trainer, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        for tap in self.taps:
            tap.listen()
        run_forward(trainer, module, batch, self.forward)
        return {tap.label: tap.take() for tap in self.taps}

    @contextmanager
    def _attached(self, module: LightningModule) -> Iterator[None]:
        with silence(module):  # the pass is nobody else's
            for tap in self.taps:
                tap.attach(module)
            try:
                yield
            finally:
                for tap in self.taps:
                    tap.remove()

    def _indices(self, batch: Any) -> Tensor:
        index = targets_of(batch, self.index_key)
        if index.is_floating_point() or index.ndim != 1:
            raise ValueError(
                f"index_key={self.index_key!r} leads to {index.dtype} of shape {tuple(index.shape)}, not to one "
                "integer for each example."
            )
        return index

    def _by_example(self, features: Tensor, index: Tensor) -> Tensor:
        if len(features) % len(index):
            raise ValueError(f"{len(features)} features do not divide by {len(index)} examples: choose a pooling.")
        return features.unflatten(0, (len(index), -1))


class _Cache:
    """Shared by copies of a module that is being trained."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}  # by label, (examples, tokens, D)
        self.is_fresh = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Cache":
        return self


def _of_all_processes(trainer: Trainer, module: LightningModule, index: Tensor, rows: Tensor) -> Tensor:
    """The rows of all processes in the order of their indices, on every one; piece by piece, by way of the device."""
    shares = [(index, rows)]
    if trainer.world_size > 1:
        shares = []
        for source in range(trainer.world_size):
            mine = source == trainer.global_rank
            size = torch.tensor(len(index), device=module.device)
            torch.distributed.broadcast(size, source)
            for start in range(0, int(size), 4096):
                stop = min(start + 4096, int(size))
                pieces = (
                    [index[start:stop], rows[start:stop]]
                    if mine
                    else [index.new_empty(stop - start), rows.new_empty(stop - start, *rows.shape[1:])]
                )
                on_device = [piece.to(module.device).contiguous() for piece in pieces]
                for piece in on_device:
                    torch.distributed.broadcast(piece, source)
                shares.append((on_device[0].cpu(), on_device[1].cpu()))
    everything = torch.cat([index for index, _ in shares])
    ordered = rows.new_full((int(everything.max()) + 1, *rows.shape[1:]), torch.nan)
    ordered[everything] = torch.cat([rows for _, rows in shares])
    return ordered


class StartWeights:
    """The weights that a run begins with, for ``functional.feature_shift.l2_sp``.

    Memory: as many bytes as these weights, on the device and in every checkpoint.

    Args:
        layers: dotted names of the submodules whose trained parameters are meant; None for the whole module.
        new_layers: of these, the submodules whose parameters have no start worth keeping, such as a new head.
    """

    def __init__(self, layers: Sequence[str] | None, new_layers: Sequence[str]) -> None:
        self.layers, self.new_layers = layers, list(new_layers)
        self.tap = _Bring(self)
        self._kept = _KeptWeights()

    def begin(self) -> None:
        """Forget an earlier run."""
        self._kept.start = {}

    def attach(self, module: nn.Module) -> None:
        """Keep the weights, where they are not kept yet."""
        for name in [*(self.layers or []), *self.new_layers]:
            find_layer(module, name)
        weights = self._meant(module)
        if not self._kept.start:
            self._kept.start = {name: weight.detach().clone() for name, weight in weights.items()}
        if missing := [name for name in weights if name not in self._kept.start]:
            raise ValueError(
                f"the checkpoint has no start for {missing[0]} and {len(missing) - 1} more: resume with the layers "
                "that the run began with."
            )
        self._kept.start = {name: self._kept.start[name].to(weight.device) for name, weight in weights.items()}

    def split(self, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By name, the parameters trained at present: those that have a start, and those that are new."""
        named = {name: weight for name, weight in _parameters_of(module).items() if weight.requires_grad}
        new = {name: weight for name, weight in named.items() if _is_within(name, self.new_layers)}
        return {name: weight for name, weight in named.items() if name in self._kept.start}, new

    def _meant(self, module: nn.Module) -> dict[str, Tensor]:
        """Also those that do not train: some are let go later."""
        weights = {
            name: weight
            for name, weight in _parameters_of(module).items()
            if not _is_within(name, self.new_layers) and (self.layers is None or _is_within(name, self.layers))
        }
        if not weights:
            raise ValueError(f"there is no parameter in {self.layers or 'the module'} to hold: name other layers.")
        return weights

    @property
    def start(self) -> dict[str, Tensor]:
        return self._kept.start

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"weights": self._kept.start} if self._kept.start else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo ``state``, before ``attach``."""
        if state:
            self._kept.start = state["weights"]

    def remove(self) -> None:
        """Nothing was put on the module."""


class _KeptWeights:
    """Shared by copies of a module that is being trained."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_KeptWeights":
        return self


class _Bring(FeatureTap):
    """Stands among the taps of a loss term and hears nothing: by it a reference is there in time for the optimizer."""

    def __init__(self, brought: Any) -> None:
        super().__init__(layer="")
        self.brought = brought

    def attach(self, module: nn.Module) -> None:
        self.brought.attach(module)

    def listen(self) -> None:
        pass

    def remove(self) -> None:
        self.brought.remove()


class BringsPrompts(Protocol):
    """What a callback, or the LightningModule itself, offers so that the network can be run without its prompts."""

    def without_prompts(self) -> AbstractContextManager[Any]:
        """Inside, the network runs as if there were no prompts."""

    def prompt_length(self, kind: Literal["text", "image"]) -> int:
        """Tokens that the prompts of this tower take up, zero if it has none."""


class WithoutPrompts:
    """The same two towers with their prompts switched off, for the same images and class names.

    Costs one pass of the image tower a batch. The text tower runs again only when its token ids change; kept are the
    features of the tokens that count, of J layers, K texts with C such tokens each: ``4 J K C D`` bytes.

    Args:
        text_layers: dotted names of blocks of the text tower.
        image_layers: of the image tower.
        forward: ``forward(module, batch)`` that runs both towers; None calls ``module.encode_text(ids)`` and
            ``module.encode_image(inputs)``. With it nothing is kept, and both towers run in each batch.
    """

    def __init__(self, text_layers: Sequence[str], image_layers: Sequence[str], forward: Forward | None = None) -> None:
        self._text = [FeatureTap(layer, pooling="tokens") for layer in text_layers]
        self._image = [FeatureTap(layer, pooling="tokens") for layer in image_layers]
        self.forward = forward
        self._kept: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None

    def begin(self) -> None:
        """Forget an earlier run."""
        self._kept = None

    def attach(self, module: nn.Module) -> None:
        """Hook the layers; the taps hear the reference alone."""
        for tap in [*self._text, *self._image]:
            tap.attach(module)

    def remove(self) -> None:
        """Take the hooks away."""
        for tap in [*self._text, *self._image]:
            tap.remove()

    def tower_features(
        self, module: LightningModule, batch: Any, brings: BringsPrompts, text: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """Of the image layers all tokens; of the text layers, for ids ``(K, L)`` and a mask of all their tokens, those
        in the mask; ``(tokens, D)`` each. Without ids no text layers.
        """
        with silence(module), brings.without_prompts(), torch.no_grad(), precision_of(module):
            if self.forward is not None:
                run = self.forward
                heard = _run([*self._text, *self._image], lambda: run(module, batch))
                masked = {tap.label: heard.pop(tap.label)[text[1]] for tap in self._text if text is not None}
                return {**masked, **{tap.label: heard[tap.label] for tap in self._image}}
            images = _run(self._image, lambda: _method(module, "encode_image")(inputs_of(batch)))
            return images if text is None else {**self._text_features(module, *text), **images}

    def _text_features(self, module: LightningModule, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if self._kept is None or not _same(self._kept[0], ids) or not _same(self._kept[1], mask):
            heard = _run(self._text, lambda: _method(module, "encode_text")(ids))
            self._kept = ids.clone(), mask.clone(), {label: rows[mask] for label, rows in heard.items()}
        return self._kept[2]


class TowerComparison:
    """Taps on blocks of two towers, and what they are compared with: their start, or the towers without prompts.

    Only tokens that mean the same in both count: of texts SOS, words and EOS, not the slots of prompts nor the padding;
    of images not the prompts, which stand at the end.

    Args:
        text_layers: dotted names of blocks of the text tower.
        image_layers: of the image tower, as many.
        reference: what to compare with.
        keep_graph: keep the features differentiable, and hear only passes with gradient.
    """

    def __init__(
        self,
        text_layers: Sequence[str],
        image_layers: Sequence[str],
        reference: "FrozenStart | WithoutPrompts",
        keep_graph: bool,
    ) -> None:
        if len(text_layers) != len(image_layers) or not text_layers:
            raise ValueError(
                f"{len(text_layers)} text_layers and {len(image_layers)} image_layers: name as many of the one tower "
                "as of the other, block by block."
            )
        self.text = [_TokenTap(layer, keep_graph) for layer in text_layers]
        self.image = [_TokenTap(layer, keep_graph) for layer in image_layers]
        self.ids = _AskedTap("", read="input", keep_graph=keep_graph)
        self.labels = [*text_layers, *image_layers]
        self.reference = reference
        self.brings: BringsPrompts | None = None
        self._known: tuple[int, Tensor, Tensor] | None = None  # slots, ids and mask of the last batch

    @property
    def pairs(self) -> "tuple[list[_TokenTap], list[_TokenTap]]":
        """The taps of the text and of the image tower, block by block."""
        return self.text, self.image

    @property
    def all_taps(self) -> list[FeatureTap]:
        """What must listen in a step, and be attached before."""
        reference = self.reference
        last = reference.calls if isinstance(reference, FrozenStart) else _Bring(reference)
        return [*self.text, *self.image, self.ids, last]

    def begin(self, module: nn.Module, brings: BringsPrompts | None) -> None:
        """Before a fit: find where the text tower gets its token ids, and know who brings prompts."""
        self.ids.layer = _embedding_of(module)
        self._known = None
        self.brings = brings

    def take(self, module: LightningModule, batch: Any) -> dict[str, Compared]:
        """What the taps have heard of this batch, beside its reference; no text layers where their tower has not run.

        Raises:
            TapError: if a tower that must have run has not.
        """
        text = None
        reference = self.reference
        text_slots, image_slots = (
            0 if self.brings is None or isinstance(reference, FrozenStart) else self.brings.prompt_length(kind)
            for kind in _KINDS
        )
        if self.ids.has_heard or (text_slots and self.ids.keep_graph):  # in evaluation its features may be kept
            ids = self.ids.take()
            heard = {tap.label: tap.take() for tap in self.text}
            mask = self.text[0].spread(self._tokens(module, ids, text_slots))
            heard = {label: rows[mask] for label, rows in heard.items()}
            text = ids, mask
        else:
            heard = {}
        images = {tap.label: tap.take() for tap in self.image}
        if isinstance(reference, FrozenStart):
            found = reference.features(module, batch)
            found = {**found, **{label: found[label][mask] for label in heard}}
        elif self.brings is None:
            raise RuntimeError("nobody brings prompts: call begin before a fit.")
        else:
            found = reference.tower_features(module, batch, self.brings, text)
        if image_slots:
            kept = self.image[0].without_last(image_slots, inputs_of(batch))
            images = {label: rows[kept] for label, rows in images.items()}
        return {label: Compared(rows, found[label]) for label, rows in {**heard, **images}.items()}

    def _tokens(self, module: nn.Module, ids: Tensor, slots: int) -> Tensor:
        if self._known is None or self._known[0] != slots or not _same(self._known[1], ids):
            self._known = slots, ids.clone(), text_tokens(module, ids, slots)
        return self._known[2]


class _TokenTap(_AskedTap):
    """Hears tokens as one row each, and remembers how they were arranged."""

    def __init__(self, layer: str, keep_graph: bool) -> None:
        super().__init__(layer, pooling="tokens", keep_graph=keep_graph)
        self.shape: tuple[int, ...] = ()
        self.times = 1

    def take(self) -> Tensor:
        heard = self._attached().heard
        self.times = len(heard)
        self.shape = tuple(heard[0].shape[:2]) if heard and isinstance(heard[0], Tensor) else ()
        return super().take()

    def spread(self, mask: Tensor) -> Tensor:
        """A mask ``(N, T)`` as rows ``(R,)``, whether samples or tokens come first."""
        if self.shape[1:] == mask.shape[1:]:
            return mask.flatten()
        if self.shape == mask.shape[::-1]:
            return mask.T.flatten()
        raise ValueError(f"layer {self.layer} gives tokens {self.shape}, which do not fit texts {tuple(mask.shape)}.")

    def without_last(self, count: int, inputs: Any) -> Tensor:
        """Which rows ``(R,)`` are not the last ``count`` tokens of a sample."""
        samples_last = isinstance(inputs, Tensor) and self.shape[0] != len(inputs) and self.shape[1] == len(inputs)
        size, samples = self.shape if samples_last else self.shape[::-1]
        kept = torch.arange(size) < size - count
        return (kept.repeat_interleave(samples) if samples_last else kept.repeat(samples)).repeat(self.times)


def text_tokens(module: nn.Module, ids: Tensor, num_prompts: int) -> Tensor:
    """Mask ``(K, L)`` of the tokens that mean the same with prompts as without, for the ids ``(K, L)`` of texts. EOS is
    where the tower looks for it, and the largest id where the tower is not known.
    """
    try:
        tower = find_clip_towers(module).text
    except ValueError:
        place = torch.arange(ids.shape[1], device=ids.device)
        return (place <= ids.argmax(1, keepdim=True)) & ((place == 0) | (place > num_prompts))
    return tower.comparable_tokens(ids, num_prompts)


def _embedding_of(module: nn.Module) -> str:
    found = [name for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    found = [name for name in found if name.endswith("token_embedding")] or found
    if len(found) != 1:
        raise ValueError(
            f"{type(module).__name__} has {len(found)} layers that could embed the words{': ' if found else ''}"
            f"{', '.join(found)}: the text tower's nn.Embedding must be called token_embedding, to tell its padding."
        )
    return found[0].replace("_orig_mod.", "")


def _run(taps: Sequence[FeatureTap], run: Callable[[], Any]) -> dict[str, Tensor]:
    try:
        for tap in taps:
            tap.listen()
        run()
        return {tap.label: tap.take() for tap in taps}
    finally:
        for tap in taps:
            tap.drop()


@contextmanager
def silence(module: nn.Module) -> Iterator[None]:
    """Inside, no tap of anybody on ``module`` hears anything that was listening before."""
    ears = {id(ear): ear for part in module.modules() for ear in _ears_on(part) if ear.listening}
    for ear in ears.values():
        ear.listening = False
    try:
        yield
    finally:
        for ear in ears.values():
            ear.listening = True


def precision_of(module: LightningModule) -> AbstractContextManager[Any]:
    """The precision that the module's training step runs in."""
    trainer = module._trainer  # None where the step is called by hand
    return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()


def compare_towers(
    module: nn.Module,
    text_layers: Sequence[str] | None,
    image_layers: Sequence[str] | None,
    without_prompts: bool,
    forward: Forward | None,
    trunk: str | None,
    path: str | None,
    keep_graph: bool,
) -> TowerComparison:
    """Two towers beside themselves without prompts, or beside their start; None stands for all blocks of a tower."""
    if text_layers is None or image_layers is None:
        towers = find_clip_towers(module)
        text_layers = towers.text.block_names if text_layers is None else text_layers
        image_layers = towers.image.block_names if image_layers is None else image_layers
    reference: FrozenStart | WithoutPrompts
    if without_prompts:
        reference = WithoutPrompts(text_layers, image_layers, forward)
    else:
        both = [*text_layers, *image_layers]
        reference = FrozenStart(both, None, "tokens", trunk, forward, path, keep_graph)
    return TowerComparison(text_layers, image_layers, reference, keep_graph)


def find_brings(trainer: Trainer, module: LightningModule) -> BringsPrompts:
    """Who can switch the prompts off: the module, or a callback.

    Raises:
        ValueError: if nobody can.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for candidate in [module, *callbacks]:
        if all(callable(getattr(candidate, name, None)) for name in ("without_prompts", "prompt_length")):
            brings: BringsPrompts = candidate
            return brings
    raise ValueError(
        "reference='without_prompts', but neither the module nor a callback has without_prompts() and "
        "prompt_length(kind): add the callback that brings the prompts, or take the start of the run as the reference."
    )


def is_new_run(trainer: Trainer, module: LightningModule, of: weakref.ref[LightningModule] | None) -> bool:
    """Whether this fit begins anew, rather than going on with what was begun on the module that ``of`` points to."""
    return trainer.global_step == 0 or of is None or of() is not module


def refuse_sharding(trainer: Trainer, owner: str) -> None:
    """Raise a ``ValueError`` under a strategy that spreads one parameter over processes."""
    strategy = type(trainer.strategy).__name__
    if strategy in ("ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(f"{owner} keeps a copy of whole parameters, which {strategy} shards: use DDP.")


def warn_of_missing_start(owner: str) -> None:
    """Say that a checkpoint knows no start."""
    rank_zero_warn(
        f"the checkpoint has no reference for {owner}: its weights, and not those that the run began with, are taken "
        "as the start. Give the file of the start (argument `start`), or resume with the callbacks of the first run."
    )


def _method(module: LightningModule, name: str) -> Callable[..., Any]:
    method: Any = getattr(module, name, None)
    if not callable(method):
        raise ValueError(
            f"{type(module).__name__} has no {name}, so that its towers cannot be run one by one: give a "
            "forward(module, batch) that runs both."
        )
    return method  # type: ignore[no-any-return]


def _ears_on(part: nn.Module) -> Iterator[_Ear]:
    for hook in [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]:
        ear = getattr(hook, "__self__", None)
        if isinstance(ear, _Ear):
            yield ear


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors_in(entry)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """By plain name; what callbacks bring along is not the user's."""
    named = {name.replace("_orig_mod.", ""): parameter for name, parameter in module.named_parameters()}
    return {name: parameter for name, parameter in named.items() if not name.startswith("_feat_own.")}


def _is_within(name: str, layers: Sequence[str]) -> bool:
    return any(name.startswith(f"{layer}.") or name == layer for layer in layers)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def _read_weights(path: str, trunk: str, net: nn.Module) -> dict[str, Tensor]:
    """The weights of ``net``, the trunk, in a file that has them by their names in the module or in the trunk."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    stored = stored.get("state_dict", stored)
    wanted = net.state_dict()
    prefix = f"{trunk}." if trunk and all(f"{trunk}.{name}" in stored for name in wanted) else ""
    missing = [name for name in wanted if f"{prefix}{name}" not in stored]
    if missing:
        raise ValueError(
            f"{path} has no weights {missing[0]!r} and {len(missing) - 1} more of {trunk or 'the module'}: give a "
            "state dict of it, or a trunk that the file knows."
        )
    return {name: stored[f"{prefix}{name}"] for name in wanted}
