"""A profile by operators: how many run, how long each takes, what it reads and writes, what it computes.

Operators are counted where they reach the device, below autograd, forward and backward: views among them, and nothing
twice. Each is timed by itself, from Python, which adds a few microseconds to each; on a GPU each is waited for. The
profiler of torch tells the same, but keeps every event, and a fit has a hundred thousand.
"""

from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from turns import now

LOOKS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select")  # a value goes to the host, or a size does


class Counter(TorchDispatchMode):
    """Sums over the operators that run inside.

    Attributes:
        calls: by operator, without ``aten::``.
        seconds: by operator.
        bytes: of the tensors that are read and written, each once for each operator.
        operations: floating-point operations of matrix products and convolutions, by whether in double precision.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes = 0.0
        self.operations = {True: 0.0, False: 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = now(self.device)
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self.seconds[name] += now(self.device) - began
        self.calls[name] += 1
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not func.is_view:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(_bytes(tensor) for tensor in [*given, *made])
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            double = any(tensor.dtype == torch.float64 for tensor in made)
            self.operations[double] += count(*args, **kwargs, out_val=out)
        return out

    @property
    def looks(self) -> int:
        return sum(self.calls.get(name, 0) for name in LOOKS)


def largest(seconds: dict[str, float], most: int = 3) -> str:
    """The operators that take most of the time, in words."""
    whole = sum(seconds.values())
    names = sorted(seconds, key=seconds.__getitem__, reverse=True)[:most]
    return ", ".join(f"{name} {seconds[name] / whole:.0%}" for name in names) or "none"


def _bytes(tensor: torch.Tensor) -> int:
    """That its elements take; what a broadcast repeats counts once."""
    repeated = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 0]
    return tensor.element_size() * tensor.numel() // max(1, torch.Size(repeated).numel())
