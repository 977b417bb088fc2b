"""Weights that are used without a call of their layer: prototypes, projections, ``F.linear(x, layer.weight)``."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_PRODUCTS = {
    functional.linear,
    functional.bilinear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.cosine_similarity,
    torch.cdist,
    torch.einsum,
    torch.tensordot,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    *(getattr(kind, name) for kind in (torch, Tensor) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm")),
}
_BY_ENTRY = {  # of each sample with each row, where more comes out than went in: distances written by hand
    Tensor.__add__,
    Tensor.__sub__,
    Tensor.__rsub__,
    Tensor.__mul__,
    *(getattr(kind, name) for kind in (torch, Tensor) for name in ("add", "sub", "mul")),
}


class BareWeights:
    """Knows the matrices of weights of a module, and what is computed of weights alone.

    Args:
        module: whose weights count.
        layers: its layers with weights and their names; a weight in none of them goes by its own name.
    """

    def __init__(self, module: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
        self._own = {id(weight) for weight in (*module.parameters(), *module.buffers())}
        self._names: dict[int, str] = {}
        for name, layer in layers:
            for weight in (*layer.parameters(), *layer.buffers()):
                self._names.setdefault(id(weight), name)
        for name, weight in (*module.named_parameters(), *module.named_buffers()):
            self._names.setdefault(id(weight), name.replace("_orig_mod.", ""))
        self._derived: Any = WeakIdKeyDictionary()

    def passed_by(self, func: Any, args: Any, out: Any) -> frozenset[str]:
        """The layers whose weights this function multiplied data with, or compared them with; none else."""
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        weights = [tensor for tensor in given if self._is_of_weights(tensor)]
        if not weights or not isinstance(out, Tensor):
            return frozenset()
        if len(weights) == len(given):
            self._derived[out] = self._named(weights)
            return frozenset()
        grows = func in _BY_ENTRY and out.numel() > max(t.numel() for t in given if not self._is_of_weights(t))
        return self._named(weights) if grows or func in _PRODUCTS else frozenset()

    def _is_of_weights(self, tensor: Tensor) -> bool:
        return id(tensor) in self._own or tensor in self._derived

    def _named(self, weights: Collection[Tensor]) -> frozenset[str]:
        of_derived = frozenset().union(*(self._derived.get(tensor, frozenset()) for tensor in weights))
        matrices = [t for t in weights if t.ndim > 1 and t.numel() > max(t.shape) and id(t) in self._names]
        return of_derived | {self._names[id(tensor)] for tensor in matrices}
