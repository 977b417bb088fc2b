"""Matrix products that no switch makes coarser."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever autocast and the TF32 switches say, and put them back after.

    TF32 keeps 10 bits: a basis that is repaired with it is orthonormal to 1e-3. Lightning itself advises to switch it
    on (``torch.set_float32_matmul_precision``). The switches belong to the process, not to the thread.
    """
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        matmul: Any = getattr(torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn, "matmul", None)
        if hasattr(matmul, "fp32_precision"):  # torch 2.9; the older switch cannot be read once this one was used
            stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
            matmul.fp32_precision = "ieee"
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
