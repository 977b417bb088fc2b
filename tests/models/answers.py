"""What the library says of a model: its classifier, by name and by running, and whether a head can stand for it."""

from typing import Any

import torch
from torch import nn

from lightning_feat.callbacks import SimplexETFHead
from lightning_feat.joints.features.heads import find_classifier
from lightning_feat.joints.features.last_layers import LastLayers
from lightning_feat.joints.module.head_swap import HeadSwap
from tests.models.libraries import Model, built


class Stub(nn.Module):
    """A new head, without the work of drawing one."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.in_features, self.num_classes = old.in_features, old.out_features
        self.register_buffer("prototypes", torch.empty(old.out_features, old.in_features, device="meta"))


class Holder(nn.Module):
    """What stands for the user's LightningModule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def answer(model: Model, run: bool = False) -> str:
    """In a few words: the name of the classifier below the model, its kind, and what stands against it.

    ``asked`` is the question which layer it is. With ``run`` the model is run, where it can be on ``meta``, and
    ``made by`` says which layers make its output where that is another, or more than one.
    """
    try:
        holder = Holder(built(model))
    except Exception as error:  # it asks for files, packages or arguments
        return f"not built ({type(error).__name__})"
    try:
        name, head = find_classifier(holder)
    except ValueError as error:
        return "asked" if "several" in str(error) else "none"
    said = f"{name.removeprefix('net.')} ({type(head).__name__})"
    if run and (last := _last(holder, model, name)) and not all(_within(layer, name) for layer in last):
        said += f", made by {' + '.join(layer.removeprefix('net.') for layer in sorted(last))}"
    try:
        swap = HeadSwap(None, Stub, Stub, {}, SimplexETFHead, False)
        swap.swap(holder)
    except ValueError:
        return f"{said}, stays"
    again = find_classifier(holder)
    if not isinstance(again[1], Stub) or again[1] is not _only(holder):
        return f"{said}, LOST"
    return said


def _only(holder: nn.Module) -> nn.Module | None:
    heads = [part for part in holder.modules() if isinstance(part, Stub)]
    return heads[0] if len(heads) == 1 else None


def _last(holder: Holder, model: Model, name: str) -> frozenset[str]:
    inputs = model.inputs(holder.net)
    if inputs is None:
        return frozenset()
    try:
        with torch.no_grad(), LastLayers(holder, (name,)).following() as follower:
            out = holder.net(inputs)
            if isinstance(out, dict):
                out = out["out"]  # torchvision's segmenters have an auxiliary output beside
            return follower.of(out)
    except (RuntimeError, NotImplementedError, TypeError, AssertionError, ValueError, AttributeError):
        return frozenset()  # it asks for values, which meta has not


def _within(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")
