"""Which layers made the logits, seen by running: those with weights that come last on the way to what the loss gets."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_feat.joints.features.bare_weights import BareWeights

# What a loss is made of; "of classes" first, for a step that has others beside
OF_CLASSES = ("cross_entropy", "nll_loss", "multi_margin_loss")
_OF_OTHERS = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "multilabel_soft_margin_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "gaussian_nll_loss",
    "poisson_nll_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "kl_div",
)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_SHAPED = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
_OF_ITS_KIND = ("new_zeros", "new_ones", "new_empty", "new_full")
# What takes the shape or the kind of a tensor, and none of its values
_MAKE_ANEW = {*(getattr(torch, name) for name in _SHAPED), *(getattr(Tensor, name) for name in _OF_ITS_KIND)}
_LOSSES = {getattr(functional, name): name for name in (*OF_CLASSES, *_OF_OTHERS)}


class LossCall(NamedTuple):
    """A loss function that was called."""

    function: str
    layers: frozenset[str]  # the last layers with weights before its input
    target: Any
    predicted: Any  # what it got, without its graph
    trains: bool  # whether a gradient goes back from it
    past: frozenset[str]  # the heads that its input has passed, last or not

    @property
    def num_classes(self) -> int | None:
        """The classes that it tells apart; None of a loss of another kind."""
        told = self.function in OF_CLASSES and isinstance(self.predicted, Tensor) and self.predicted.ndim > 1
        return self.predicted.shape[1] if told else None


class LastLayers(TorchFunctionMode):
    """While it is active, follows every tensor to the layers with weights that it comes from last.

    Args:
        module: whose layers count.
        heads: dotted names of layers that count as a whole, whatever is in them.

    Attributes:
        calls: the loss functions that were called.
        backwards: the last layers of what ``backward`` was called on inside the block, as manual optimization does.
        passed: the heads that this has passed, last or not.
    """

    def __init__(self, module: nn.Module, heads: Collection[str] = ()) -> None:
        super().__init__()
        self.module, self.heads = module, heads
        self.calls: list[LossCall] = []
        self.backwards: frozenset[str] = frozenset()
        self.passed: frozenset[str] = frozenset()
        self._made_by: Any = WeakIdKeyDictionary()
        self._past: Any = WeakIdKeyDictionary()
        self._bare = BareWeights(nn.Module(), [])

    def of(self, value: Any) -> frozenset[str]:
        """The layers that come last before the tensors in ``value``."""
        return _union(self._made_by, value)

    def past_of(self, value: Any) -> frozenset[str]:
        """The heads that the tensors in ``value`` have passed, last or not."""
        return _union(self._past, value)

    @contextmanager
    def following(self) -> Iterator["LastLayers"]:
        """Active inside the block."""
        layers = dict(_layers_with_weights(self.module, self.heads))
        self._bare = BareWeights(self.module, layers.items())
        # One hook for all, not one in each: copies made in the step stay without, and scripted parts take none.
        handle = register_module_forward_hook(_Made(self, layers))
        try:
            with self:
                yield self
        finally:
            handle.remove()

    def mark(self, value: Any, layers: frozenset[str]) -> None:
        """Note that ``layers`` made the tensors in ``value``."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self._made_by[leaf] = layers

    def pass_on(self, value: Any, past: frozenset[str]) -> None:
        """Note that the tensors in ``value`` come from these heads, last or not."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self._past[leaf] = past

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        layers, past = self.of((args, kwargs)), _union(self._past, (args, kwargs))
        layers = self._bare.passed_by(func, (args, kwargs), out) or layers
        if func in _MAKE_ANEW:
            return out
        filled = args[0] if func is Tensor.__setitem__ else out
        if layers:
            self.mark(filled, layers)
        if past:
            self.pass_on(filled, past)
        if func is Tensor.backward:
            self.backwards |= self.of(args[0])
            self.passed |= self.past_of(args[0])
        if func in _LOSSES:
            given = [*args, *kwargs.values()]
            predicted = kwargs.get("input", args[0] if args else None)
            target = kwargs.get("target", given[1] if len(given) > 1 else None)
            detached = predicted.detach() if isinstance(predicted, Tensor) else None
            trains = isinstance(predicted, Tensor) and predicted.requires_grad
            made_by, past = self.of(predicted), _union(self._past, predicted)
            self.calls.append(LossCall(_LOSSES[func], made_by, target, detached, trains, past))
        return out


def _union(noted: Any, value: Any) -> frozenset[str]:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return frozenset().union(*(noted.get(tensor, frozenset()) for tensor in tensors))


class _Made:
    def __init__(self, follower: LastLayers, layers: dict[str, nn.Module]) -> None:
        self.follower = follower
        self.names = {id(part): name for name, part in layers.items()}
        self.own = {id(part) for part in follower.module.modules()}

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():  # compiled code that is none of the module's
            return
        name = self.names.get(id(layer))
        made = list(output.values()) if isinstance(output, dict) else output
        if name is None:
            if id(layer) not in self.own and layer._parameters:
                self.follower.mark(made, frozenset())  # a copy, say, of a layer: made by none of the module
        elif name in self.follower.heads:
            self.follower.mark(made, frozenset([name]))
            self.follower.pass_on(made, frozenset([name]))
        elif not (_lets_pass(layer, args, made) and self.follower.of(made)):
            self.follower.mark(made, frozenset([name]))


def _lets_pass(layer: nn.Module, args: Any, output: Any) -> bool:
    """Whether what a layer puts out is its input but for numbers at each place, such as a learned temperature or the
    logarithms of the classes' shares, or is a loss.
    """
    if not isinstance(output, Tensor):
        return False
    if not output.ndim:
        return True
    own = [t for t in [*layer._parameters.values(), *layer._buffers.values()] if t is not None]
    same = bool(args) and isinstance(args[0], Tensor) and args[0].shape == output.shape
    return same and all(t.numel() == max(t.shape, default=1) for t in own) and not isinstance(layer, _NORMS)


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
