"""Use checkpoints when the training is over."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from lightning_feat.joints.features.heads import replace_layer
from lightning_feat.joints.features.taps import find_layer
from lightning_feat.joints.module.head_swap import HEADS_KEY
from lightning_feat.layers import GrassmannLinear, SimplexETF, SparseETF

_Module = TypeVar("_Module", bound=LightningModule)


def load_with_head(cls: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """``cls.load_from_checkpoint(path, **kwargs)`` of a run whose classifier a head callback had replaced: the module
    comes with that head, and needs no callback to be used.

    Args:
        cls: the user's class, which knows nothing of the head.
        path: the checkpoint.
        kwargs: as for ``load_from_checkpoint``; ``weights_only=False`` for a file of your own that holds other objects
            too.

    Raises:
        ValueError: if the checkpoint says of no head that was put in.
        RuntimeError: if other weights than those of the head are missing, or too many.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=kwargs.get("weights_only", True))
    heads: dict[str, Any] = checkpoint.get(HEADS_KEY, {})
    if not heads:
        raise ValueError(
            f"{path} says of no head that a callback put in: use {cls.__name__}.load_from_checkpoint, with the head "
            "built in __init__ where the weights have one."
        )
    module = cls.load_from_checkpoint(path, **{**kwargs, "strict": False})
    weights = {name.replace("_orig_mod.", ""): value for name, value in checkpoint["state_dict"].items()}
    for label, head in heads.items():
        old: Any = find_layer(module, label)
        options = head["options"]
        if head["kind"] == "GrassmannLinear":
            new: Any = GrassmannLinear(old.in_features, old.out_features, **options)
        elif head["kind"] == "SparseETF":
            new = SparseETF(old.in_features, old.out_features, **options)
        else:
            new = SimplexETF(old.in_features, old.out_features, **{k: v for k, v in options.items() if k != "sparsity"})
        replace_layer(module, old, new.to(old.weight.device).train(old.training))
    there = {name.replace("_orig_mod.", "") for name in module.state_dict()}
    if kwargs.get("strict", True) and there != weights.keys():
        raise RuntimeError(
            f"{path} and {cls.__name__} have other weights beside the head: {sorted(there ^ weights.keys())[:5]}."
        )
    for label in heads:
        prefix = f"{label}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        find_layer(module, label).load_state_dict(own)
    return module
