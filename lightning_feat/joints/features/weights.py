"""Read weights that are computed when they are read."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn


def read_weight(layer: nn.Module, name: str = "weight") -> Any:
    """The attribute ``name`` of a layer, without gradient; None if it has none. Nothing of the layer changes.

    A weight with a parametrisation is computed anew at each reading: in training mode spectral normalisation takes a
    step of its power iteration, and a random one draws numbers. Read here, it is that of eval mode.
    """
    parametrized: Any = getattr(layer, "parametrizations", {})
    if name not in parametrized:
        return getattr(layer, name, None)
    parametrization = parametrized[name]
    modes = [(part, part.training) for part in parametrization.modules()]
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.no_grad())
        for part, training in modes:
            part.training = False
            stack.callback(setattr, part, "training", training)
        return getattr(layer, name).detach().clone()
