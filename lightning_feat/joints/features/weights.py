"""Read weights that are computed when they are read, or when their layer runs."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_feat.joints.features.kept import remember


def read_weight(layer: nn.Module, name: str = "weight") -> Any:
    """The attribute ``name`` of a layer, without gradient; None if it has none. Nothing of the layer changes.

    A weight with a parametrisation is computed anew at each reading: in training mode spectral normalisation takes a
    step of its power iteration, and a random one draws numbers. Read here, it is that of eval mode. What torch's older
    ``weight_norm`` and ``spectral_norm``, and pruning, leave on the layer is of its last run, before the last step of
    the optimizer or the loading of a checkpoint: it is computed anew, too.
    """
    parametrized: Any = getattr(layer, "parametrizations", {})
    if name in parametrized:
        return _parametrized(layer, parametrized[name], name)
    for hook in layer._forward_pre_hooks.values():
        with torch.no_grad():
            if isinstance(hook, SpectralNorm) and hook.name == name:
                return hook.compute_weight(layer, do_power_iteration=False)
            if isinstance(hook, WeightNorm) and hook.name == name:
                return hook.compute_weight(layer)
            if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
                return hook.apply_mask(layer)
    return getattr(layer, name, None)


def _parametrized(layer: nn.Module, parametrization: nn.Module, name: str) -> Any:
    modes = [(part, part.training) for part in parametrization.modules()]
    with ExitStack() as stack:
        stack.callback(remember(parametrization))
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.no_grad())
        for part, training in modes:
            part.training = False
            stack.callback(setattr, part, "training", training)
        return getattr(layer, name).detach().clone()
