"""Prompts in their places: the hooks that put them into the towers of a CLIP-like model.

Shapes: N samples, T tokens, D width, n prompts of a block.
"""

import torch
from torch import Tensor

from lightning_feat.layers.feature_shift.insertion import Insertion, Tower, Towers
from lightning_feat.layers.feature_shift.prompts import DeepPrompts, Kind


class PromptTokens:
    """The hook of one block: ``(N, T, D)`` with its prompts in their places. For block 0 of the image tower they are
    appended, otherwise what stands there is replaced; those of a text begin at position ``first``.
    """

    def __init__(self, prompts: DeepPrompts, kind: Kind, index: int, first: int = 1) -> None:
        self.prompts, self.kind, self.index, self.first = prompts, kind, index, first

    def __call__(self, tokens: Tensor) -> Tensor:
        prompt_nD = self.prompts.prompt(self.kind, self.index).to(tokens.dtype)
        prompt_NnD = prompt_nD.expand(*tokens.shape[:-2], *prompt_nD.shape)
        n = len(prompt_nD)
        if self.kind == "text":
            first = self.first
            return torch.cat([tokens[..., :first, :], prompt_NnD, tokens[..., first + n :, :]], dim=-2)
        kept = tokens if self.index == 0 else tokens[..., :-n, :]
        return torch.cat([kept, prompt_NnD], dim=-2)


class _WithoutPrompts:
    """The hook after the blocks of an image tower that pools over tokens: they are not to be averaged in."""

    def __init__(self, prompts: DeepPrompts) -> None:
        self.prompts = prompts

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens[..., : -self.prompts.length_of("image"), :]


def insert_prompts(towers: Towers, prompts: DeepPrompts) -> Insertion:
    """Put the prompts into the towers of a model, by hooks; its class and its parameters stay as they are.

    The prompts are not registered in the model: register them where your parameters live, so that optimizer, devices
    and DDP know them. Texts that begin with ``prompts.words`` have these replaced; any other keeps its words, which
    move on by n where the tower has room for it. So do the end of a text and masks inside the tower: who reads its
    tokens outside finds them n places later.

    Args:
        towers: what ``clip_towers.find_clip_towers`` gives.
        prompts: of the widths of these towers, on their device.

    Raises:
        ValueError: if they do not fit the towers, or a prompted tower has prompts already. Nothing is inserted then.
    """
    insertion = Insertion()
    try:
        for kind in prompts.kinds:
            tower: Tower = towers.text if kind == "text" else towers.image
            _check(tower, prompts, kind)
            first = towers.text.first_word if kind == "text" else 0
            hook = PromptTokens(prompts, kind, 0, first)
            insertion.add(tower.on_embeddings(hook, prompts.length_of(kind), prompts.words))
            for index in range(1, prompts.depth_of(kind)):
                insertion.add(tower.on_block_input(index, PromptTokens(prompts, kind, index, first)))
            removed = towers.image.after_blocks(_WithoutPrompts(prompts)) if kind == "image" else None
            if removed is not None:
                insertion.add(removed)
    except Exception:
        insertion.remove()
        raise
    return insertion


def _check(tower: Tower, prompts: DeepPrompts, kind: Kind) -> None:
    width, depth = prompts.prompt(kind, 0).shape[1], prompts.depth_of(kind)
    if width != tower.width:
        raise ValueError(
            f"the {kind} prompts are {width} wide, the {kind} tower {tower.width}: set {kind}_width to it."
        )
    if depth > len(tower.blocks):
        raise ValueError(f"prompts for {depth} blocks, but the {kind} tower has {len(tower.blocks)}: lower the depth.")
    if any(isinstance(hook, PromptTokens) for hook in tower.hooks()):
        raise ValueError(f"the {kind} tower has prompts already: remove those first.")
