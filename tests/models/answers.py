"""What the library says of a model: its classifier, by name and by running, and whether a head can stand for it."""

import re
from typing import Any

import torch
from torch import nn

from lightning_feat.callbacks import SimplexETFHead
from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.joints.features.heads import find_heads
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
    if model.is_clip:
        return towers(holder)
    try:
        heads = find_heads(holder)
    except ValueError as error:
        return "asked" if "several" in str(error) else "none"
    names = tuple(name for name, _ in heads)
    said = f"{' + '.join(name.removeprefix('net.') for name in names)} ({type(heads[0][1]).__name__})"
    if run and (last := _last(holder, model, names)) and not all(_within(layer, names) for layer in last):
        said += f", made by {' + '.join(layer.removeprefix('net.') for layer in sorted(last))}"
    try:
        swap = HeadSwap(None, Stub, Stub, {}, SimplexETFHead, False)
        swap.swap(holder)
    except ValueError:
        return f"{said}, stays"
    again = [head for _, head in find_heads(holder)]
    put_in = [part for part in holder.modules() if isinstance(part, Stub)]
    if len(put_in) != len(heads) or {id(head) for head in again} != {id(head) for head in put_in}:
        return f"{said}, LOST"
    return said


def towers(holder: Holder) -> str:
    """Of a CLIP-like model: where prompts go in its towers, or why not."""
    try:
        found = find_clip_towers(holder)
    except ValueError:
        return "layers are asked for"
    said = []
    try:
        end, start = found.text.reading.end, found.text.first_word
        said.append(f"text from position {start}, read at {f'id {end}' if isinstance(end, int) else end}")
    except ValueError:
        said.append("text: layers are asked for")
    try:
        said.append(f"{found.image.kind}, prompts beside the patches")
    except ValueError as error:
        kind = re.search(r"has a (\w+)|is a (\w+)|a decoder|masks patches", str(error))
        said.append(f"image refused: {kind.group(0) if kind else 'no place for prompts'}")
    return "; ".join(said)


def _last(holder: Holder, model: Model, names: tuple[str, ...]) -> frozenset[str]:
    inputs = model.inputs(holder.net)
    if inputs is None:
        return frozenset()
    try:
        with torch.no_grad(), LastLayers(holder, names).following() as follower:
            out = holder.net(inputs)
            if isinstance(out, dict):
                out = out["out"]  # torchvision's segmenters have an auxiliary output beside
            return follower.of(out)
    except (RuntimeError, NotImplementedError, TypeError, AssertionError, ValueError, AttributeError):
        return frozenset()  # it asks for values, which meta has not


def _within(layer: str, names: tuple[str, ...]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in names)
