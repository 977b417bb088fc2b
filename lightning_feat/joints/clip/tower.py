"""One tower of a CLIP-like model: its blocks, and hooks at its embeddings, blocks and features.

A hook is any picklable object that is called with tokens ``(N, T, D)`` or features ``(N, E)``, whatever the library
does inside, and returns what shall stand in their place, or None. ``clip_towers`` finds the towers of a model.

Shapes: N images or texts, T tokens, L token ids of a text, D width of a tower, E width of its features.
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_feat.joints.clip.hooks import (
    Call,
    Hook,
    HookHandle,
    Order,
    calls_on,
    hook_encode_text,
    hook_input,
    hook_output,
)

EndOfText: TypeAlias = int | Literal["argmax"] | None  # the id at which features are read, the largest, or another rule


class Places(NamedTuple):
    """Where a tower keeps what is hooked; ``root`` is the module that was searched, of which a part may be compiled."""

    root: nn.Module
    embedding: nn.Module | None
    blocks: nn.Module
    blocks_name: str
    features: nn.Module | None  # puts out the projected feature; or has encode_text, which does
    num_features: int | None
    by_encode_text: bool = False


class _Tower:
    """What both towers have in common.

    Attributes:
        width: D.
        num_features: E; None where the layer does not say.
        blocks: the transformer blocks, in order.
        block_names: their dotted names in the module that was searched, as a ``FeatureTap`` takes them.
    """

    kind: Literal["text", "image"]

    def __init__(self, places: Places, batch_first: bool | None) -> None:
        self.blocks = [plain(block) for block in places.blocks.children()]
        if not self.blocks:
            raise ValueError(f"{places.blocks_name} holds no blocks: name the ModuleList or Sequential that does.")
        self.block_names = [f"{places.blocks_name}.{name}" for name, _ in places.blocks.named_children()]
        self.width = _width(self.blocks[0], self.block_names[0])
        self.num_features = places.num_features
        self._places = places
        self._order = Order(_declared_order(self.blocks[0]) if batch_first is None else batch_first)

    def on_block_input(self, index: int, hook: Call) -> HookHandle:
        """Call ``hook(tokens)`` before block ``index``, ahead of its first norm."""
        return hook_input(self._places.root, self.blocks[index], Hook(hook, self._order))

    def on_block_output(self, index: int, hook: Call) -> HookHandle:
        """Call ``hook(tokens)`` after block ``index``."""
        return hook_output(self._places.root, self.blocks[index], Hook(hook, self._order))

    def on_features(self, hook: Call) -> HookHandle:
        """Call ``hook(features)`` on the projected features, before they are normalised."""
        root, features = self._places.root, self._places.features
        if features is None:
            raise ValueError(f"which layer gives the {self.kind} features? Name it as {self.kind}_features.")
        return (hook_encode_text if self._places.by_encode_text else hook_output)(root, features, Hook(hook))

    def hooks(self) -> list[Call]:
        """What is called at the places of this tower."""
        layers = dict.fromkeys([self._places.embedding, *self.blocks, self._places.features])
        return [call for layer in layers if layer is not None for call in calls_on(layer)]


class TextTower(_Tower):
    """The text tower; its positions are 0 for SOS, then the words, EOS, and padding."""

    kind = "text"

    def __init__(self, places: Places, batch_first: bool | None, end: EndOfText) -> None:
        super().__init__(places, batch_first)
        self._end = end

    def on_embeddings(self, hook: Call, slots: int = 0) -> HookHandle:
        """Call ``hook(tokens)`` on the word embeddings, before positions are added.

        A text that ends within positions 1 to ``slots``, which the hook overwrites, is refused by a ``ValueError``: on
        the CPU in every pass, elsewhere in the first, as one must wait for the device; not in compiled code.
        """
        return hook_output(self._places.root, self._words(), _WordHook(hook, self._order, self._end, slots))

    def eos_positions(self, token_ids: Tensor) -> Tensor:
        """Positions ``(N,)`` at which the tower reads the features of the texts ``(N, L)``."""
        if self._end is None:
            raise ValueError("this text tower does not read its features at EOS, so where a text ends is not known.")
        return _end_of_text(token_ids, self._end)

    def comparable_tokens(self, token_ids: Tensor, num_prompts: int = 0) -> Tensor:
        """Mask ``(N, L)`` of the tokens that mean the same with learned prompts as without: SOS, the words after the
        prompts, EOS; not positions 1 to ``num_prompts``, where prompts stand in place of words, and not the padding.
        """
        position_L = torch.arange(token_ids.shape[-1], device=token_ids.device)
        within_NL = position_L <= self.eos_positions(token_ids)[..., None]
        return within_NL & ((position_L == 0) | (position_L > num_prompts))

    def word_embeddings(self, token_ids: Tensor, length: int) -> Tensor:
        """Embeddings ``(length, D)`` of the first words of a text ``(L,)`` that begins with SOS, without gradient."""
        ids = token_ids.reshape(-1)
        known = len(ids) - 1 if self._end is None else int(_end_of_text(ids, self._end)) - 1
        if known < length:
            raise ValueError(
                f"the template has {known} words, fewer than the {length} prompts: lengthen it, or start at random."
            )
        table: Any = self._words().weight
        first: Tensor = table.detach()[ids[1 : 1 + length].to(table.device)].clone()
        return first

    def _words(self) -> nn.Module:
        if self._places.embedding is None:
            raise ValueError("which layer embeds the words? Name it as text_embedding.")
        return self._places.embedding


class ImageTower(_Tower):
    """The image tower; its tokens are the class token, the patches, and prompts, if any, at the end."""

    kind = "image"

    def on_embeddings(self, hook: Call, slots: int = 0) -> HookHandle:
        """Call ``hook(tokens)`` on class token and patches with their positions, before the norm ahead of the blocks.
        ``slots`` matters to the text tower only.
        """
        root, norm = self._places.root, self._places.embedding
        if norm is None:
            return hook_input(root, self.blocks[0], Hook(hook, self._order))
        return hook_input(root, norm, Hook(hook, self._order, enters=True))

    def comparable_tokens(self, num_tokens: int, num_prompts: int = 0) -> Tensor:
        """Mask ``(num_tokens,)`` of all tokens but the last ``num_prompts``."""
        return torch.arange(num_tokens) < num_tokens - num_prompts


class _WordHook(Hook):
    """A hook on word embeddings, which knows the ids that these came from."""

    def __init__(self, call: Call, order: Order, end: EndOfText, slots: int) -> None:
        super().__init__(call, order, enters=True)
        self.end, self.slots, self.checked = end, slots, False

    def on_output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.active and self.slots and args and self.end is not None and not torch.compiler.is_compiling():
            self._check_room(args[0], self.end)
        return super().on_output(layer, args, output)

    def _check_room(self, token_ids: Tensor, end: EndOfText) -> None:
        if self.checked and token_ids.device.type != "cpu":
            return
        self.checked = True
        shortest = int(_end_of_text(token_ids, end).min())
        if shortest <= self.slots:
            raise ValueError(
                f"a text ends at position {shortest}, but {self.slots} prompts take positions 1 to {self.slots}: begin "
                "each text with as many words as there are prompts ('a photo of a ...'); they are replaced."
            )


def _end_of_text(token_ids: Tensor, end: Any) -> Tensor:
    marked: Tensor = token_ids if end == "argmax" else torch.eq(token_ids, end).int()
    return marked.argmax(dim=-1)


def _declared_order(block: nn.Module) -> bool | None:
    declared = (getattr(part, "batch_first", None) for part in block.modules())
    return next((flag for flag in declared if isinstance(flag, bool)), None)


def _width(block: nn.Module, name: str) -> int:
    weights = (getattr(part, "weight", None) for part in block.modules())
    width = next((len(weight) for weight in weights if isinstance(weight, Tensor) and weight.ndim == 1), None)
    if width is None:
        raise ValueError(f"{name} ({type(block).__name__}) has no norm that tells the width of its tokens.")
    return width


def plain(part: nn.Module) -> nn.Module:
    """The module itself, where ``part`` is a ``torch.compile`` wrapper of it."""
    inner: nn.Module = getattr(part, "_orig_mod", part)
    return inner
