"""One tower of a CLIP-like model: its blocks, and hooks at its embeddings, blocks and features.

A hook is any picklable object that is called with tokens ``(N, T, D)`` or features ``(N, E)``, whatever the library
does inside, and returns what shall stand in their place, or None. ``clip_towers`` finds the towers of a model.

Shapes: N images or texts, T tokens, L token ids of a text, D width of a tower, E width of its features.
"""

from collections.abc import MutableSequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_feat.joints.clip.hooks import (
    Call,
    Handles,
    Hook,
    HookHandle,
    Order,
    TurnHook,
    calls_on,
    hook_encode_text,
    hook_ids,
    hook_input,
    hook_output,
    installed_on,
)
from lightning_feat.joints.clip.placing import Placed, Placing
from lightning_feat.joints.clip.reading import Reading


class Places(NamedTuple):
    """Where a tower keeps what is hooked; ``root`` is the module that was searched, of which a part may be compiled."""

    root: nn.Module
    embedding: nn.Module | None
    blocks: nn.Module
    blocks_name: str
    features: nn.Module | None  # puts out the projected feature; or has encode_text, which does
    num_features: int | None
    by_encode_text: bool = False
    after_blocks: tuple[nn.Module, Literal["input", "output"]] | None = None  # all tokens pass here, to be pooled
    turned_after: int | None = None  # tokens that attention turns by their places are those after as many; None: none
    entrance: nn.Module | None = None  # gets the ids of whole texts, and gives what is read from them
    longest: int | None = None  # text in tokens, where it need not have this length


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
    """The text tower; its positions are 0 for SOS, if there is one, then the words, EOS, and padding.

    Attributes:
        reading: how it reads a text.
        first_word: position of the first word.
    """

    kind = "text"

    def __init__(self, places: Places, batch_first: bool | None, reading: Reading) -> None:
        super().__init__(places, batch_first)
        self.reading, self.first_word = reading, reading.start

    def say(self, eos_token_id: int | None = None, start_token: bool | None = None) -> None:
        """Say at which id texts are read, and whether they begin with a token that is no word; None: as it is."""
        if eos_token_id is not None:
            self.reading = self.reading._replace(end=eos_token_id)
        if start_token is not None:
            self.reading = self.reading._replace(start=int(start_token))
        self.first_word = self.reading.start

    def on_embeddings(self, hook: Call, slots: int = 0, words: MutableSequence[int] | None = None) -> Handles:
        """Call ``hook(tokens)`` on the word embeddings, before positions are added.

        The hook overwrites the ``slots`` positions from ``first_word``. Texts get room for that where their ids enter
        the tower, see ``placing``: those that begin with ``words`` have these replaced, all others keep their words. A
        text without room, and two that would become one, are refused by a ``ValueError``: on the CPU in every pass,
        elsewhere in the first hundred, as one must wait for the device; not in compiled code. Where it is not known
        what gets the ids of whole texts, the first words are replaced, whatever they are.
        """
        places = self._places
        placing = Placing(self.reading, slots, [] if words is None else words, places.longest, places.root)
        enter = hook_ids(places.root, places.entrance, placing, places.by_encode_text) if slots else None
        covered = _WordHook(hook, self._order, placing)
        return Handles([hook_output(places.root, self._words(), covered), *([] if enter is None else [enter])])

    def placed(self, token_ids: Tensor) -> Placed | None:
        """The texts of which ``token_ids``, as the embeddings got them in the last pass, were made; None for others."""
        for hook in installed_on(self._words()):
            known = hook.placing.last if isinstance(hook, _WordHook) and hook.active else None
            if known is not None and known.ids.shape == token_ids.shape and torch.equal(known.ids, token_ids):
                return known
        return None

    def eos_positions(self, token_ids: Tensor) -> Tensor:
        """Positions ``(N,)`` at which the tower reads the features of the texts ``(N, L)``; L where it appends a token
        to read them from.
        """
        return self.reading.positions(token_ids)

    def comparable_tokens(self, token_ids: Tensor, num_prompts: int = 0) -> Tensor:
        """Mask ``(N, L)`` of the tokens that mean the same with learned prompts as without: SOS, the words after the
        prompts, EOS; not where prompts stand in place of words, and not the padding, unless the features are read with
        it. ``(N, L + 1)`` where the tower appends a token.
        """
        return self.reading.comparable(token_ids, num_prompts)

    def word_embeddings(self, token_ids: Tensor, length: int) -> Tensor:
        """Embeddings ``(length, D)`` of the first words of a text ``(L,)``, without gradient."""
        ids = token_ids.reshape(-1)
        known = self.reading.count_words(ids)
        if known < length:
            raise ValueError(
                f"the template has {known} words, fewer than the {length} prompts: lengthen it, or start at random."
            )
        table: Any = self._words().weight
        first: Tensor = table.detach()[ids[self.first_word : self.first_word + length].to(table.device)].clone()
        return first

    def _words(self) -> nn.Module:
        if self._places.embedding is None:
            raise ValueError("which layer embeds the words? Name it as text_embedding.")
        return self._places.embedding


class ImageTower(_Tower):
    """The image tower; its tokens are the class token, the patches, and prompts, if any, at the end."""

    kind = "image"

    def on_embeddings(
        self, hook: Call, slots: int = 0, words: MutableSequence[int] | None = None
    ) -> HookHandle | Handles:
        """Call ``hook(tokens)`` on class token and patches with their positions, before the norm ahead of the blocks.
        Tokens that it adds are turned by no attention. ``slots`` and ``words`` matter to the text tower only.
        """
        root, norm = self._places.root, self._places.embedding
        before = norm is not None
        tokens = hook_input(root, norm or self.blocks[0], Hook(hook, self._order, enters=before))
        if self._places.turned_after is None:
            return tokens
        turns = [hook_input(root, block, TurnHook(self._places.turned_after)) for block in self.blocks]
        return Handles([tokens, *turns])

    def after_blocks(self, hook: Call) -> HookHandle | None:
        """Call ``hook(tokens)`` after the last block, where all tokens go on to be pooled; None where the feature is
        read from the class token.
        """
        if self._places.after_blocks is None:
            return None
        layer, side = self._places.after_blocks
        return (hook_input if side == "input" else hook_output)(self._places.root, layer, Hook(hook, self._order))

    def comparable_tokens(self, num_tokens: int, num_prompts: int = 0) -> Tensor:
        """Mask ``(num_tokens,)`` of all tokens but the last ``num_prompts``."""
        return torch.arange(num_tokens) < num_tokens - num_prompts


class _WordHook(Hook):
    """A hook on word embeddings, which knows the ids that these came from."""

    def __init__(self, call: Call, order: Order, placing: Placing) -> None:
        super().__init__(call, order, enters=True)
        self.placing = placing

    def on_output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.active and self.placing.slots and args and not torch.compiler.is_compiling():
            self.placing.check_covered(args[0])
        return super().on_output(layer, args, output)


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
