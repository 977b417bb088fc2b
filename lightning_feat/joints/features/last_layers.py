"""Which layers made the logits, seen by running: those with weights that come last on the way to what the loss gets."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# What a loss is made of; "of classes" first, for a step that has others beside
_OF_CLASSES = ("cross_entropy", "nll_loss", "multi_margin_loss")
_OF_OTHERS = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "multilabel_soft_margin_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "kl_div",
)
_LOSSES = {getattr(functional, name): name for name in (*_OF_CLASSES, *_OF_OTHERS)}


class LossCall(NamedTuple):
    """A loss function that was called."""

    function: str
    layers: frozenset[str]  # the last layers with weights before its input
    target: Any
    predicted: Any  # what it got, without its graph


class LastLayers(TorchFunctionMode):
    """While it is active, follows every tensor to the layers with weights that it comes from last.

    Args:
        module: whose layers count.
        heads: dotted names of layers that count as a whole, whatever is in them.

    Attributes:
        calls: the loss functions that were called.
    """

    def __init__(self, module: nn.Module, heads: Collection[str] = ()) -> None:
        super().__init__()
        self.module, self.heads = module, heads
        self.calls: list[LossCall] = []
        self._made_by: Any = WeakIdKeyDictionary()

    def of(self, value: Any) -> frozenset[str]:
        """The layers that come last before the tensors in ``value``."""
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return frozenset().union(*(self._made_by.get(tensor, frozenset()) for tensor in tensors))

    @contextmanager
    def following(self) -> Iterator["LastLayers"]:
        """Active inside the block."""
        handles = [
            part.register_forward_hook(_Made(self, name))
            for name, part in _layers_with_weights(self.module, self.heads)
        ]
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def mark(self, value: Any, layers: frozenset[str]) -> None:
        """Note that ``layers`` made the tensors in ``value``."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self._made_by[leaf] = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        layers = self.of((args, kwargs))
        if layers:
            self.mark(out, layers)
        if func in _LOSSES:
            given = [*args, *kwargs.values()]
            predicted = kwargs.get("input", args[0] if args else None)
            target = kwargs.get("target", given[1] if len(given) > 1 else None)
            detached = predicted.detach() if isinstance(predicted, Tensor) else None
            self.calls.append(LossCall(_LOSSES[func], self.of(predicted), target, detached))
        return out


class _Made:
    def __init__(self, follower: LastLayers, name: str) -> None:
        self.follower, self.name = follower, name

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.follower.mark(list(output.values()) if isinstance(output, dict) else output, frozenset([self.name]))


def last_of_forward(module: Any) -> frozenset[str] | None:
    """The last layers before what ``module`` puts out for its ``example_input_array``; None without one, or where it
    does not run.
    """
    example = getattr(module, "example_input_array", None)
    if example is None:
        return None
    modes = [(part, part.training) for part in module.modules()]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    moved = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in _entries(example)]
    generator = torch.get_rng_state()
    try:
        module.eval()
        with torch.no_grad(), LastLayers(module).following() as follower:
            out = module(**dict(zip(example, moved, strict=True))) if isinstance(example, dict) else module(*moved)
            return follower.of(list(out.values()) if isinstance(out, dict) else out)
    except Exception:  # an example that does not fit is no reason to stop: the question is asked
        return None
    finally:
        torch.set_rng_state(generator)
        for part, training in modes:
            part.training = training


def _entries(example: Any) -> list[Any]:
    if isinstance(example, dict):
        return list(example.values())
    return list(example) if isinstance(example, (tuple, list)) else [example]


def _layers_with_weights(module: nn.Module, heads: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    for wrapped, part in module.named_modules():
        name = wrapped.replace("_orig_mod.", "")
        own = [t for t in [*part._parameters.values(), *part._buffers.values()] if t is not None]
        inner = any(child._parameters or child._buffers for child in part.modules() if child is not part)
        whole = isinstance(part, (nn.Linear, nn.MultiheadAttention, nn.RNNBase)) or name in heads
        if name and own and (whole or not inner):
            yield name, part
