"""Two towers, of texts and of images, beside their reference, token by token."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_feat.joints.clip.placing import Placed
from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.features.batches import inputs_of
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.reference.comparison import Compared, Listening
from lightning_feat.joints.reference.frozen_start import FrozenStart
from lightning_feat.joints.reference.hearing import AskedTap, DeafTap
from lightning_feat.joints.reference.without_prompts import BringsPrompts, WithoutPrompts, are_equal

_KINDS: tuple[Literal["text"], Literal["image"]] = ("text", "image")


class TowerComparison(Listening):
    """Taps on blocks of two towers, and what they are compared with: their start, or the towers without prompts.

    Only tokens that mean the same in both count: of texts SOS, words and EOS, not the slots of prompts nor the padding;
    of images not the prompts, which stand at the end.

    Args:
        text_layers: dotted names of blocks of the text tower.
        image_layers: of the image tower, as many.
        reference: what to compare with.
        keep_graph: keep the features differentiable, and hear only passes with gradient.
    """

    def __init__(
        self,
        text_layers: Sequence[str],
        image_layers: Sequence[str],
        reference: FrozenStart | WithoutPrompts,
        keep_graph: bool,
    ) -> None:
        if len(text_layers) != len(image_layers) or not text_layers:
            raise ValueError(
                f"{len(text_layers)} text_layers and {len(image_layers)} image_layers: name as many of the one tower "
                "as of the other, block by block."
            )
        self.text = [_TokenTap(layer, keep_graph) for layer in text_layers]
        self.image = [_TokenTap(layer, keep_graph) for layer in image_layers]
        self.ids = AskedTap("", read="input", keep_graph=keep_graph)
        self.labels = [*text_layers, *image_layers]
        self.reference = reference
        self.brings: BringsPrompts | None = None
        self._known: tuple[int, Tensor, Tensor] | None = None  # slots, ids and mask of the last batch

    @property
    def pairs(self) -> "tuple[list[_TokenTap], list[_TokenTap]]":
        """The taps of the text and of the image tower, block by block."""
        return self.text, self.image

    @property
    def all_taps(self) -> list[FeatureTap]:
        reference = self.reference
        last = reference.calls if isinstance(reference, FrozenStart) else DeafTap(reference)
        return [*self.text, *self.image, self.ids, last]

    def begin(self, module: nn.Module, brings: BringsPrompts | None) -> None:
        """Before a fit: find where the text tower gets its token ids, and know who brings prompts."""
        self.ids.layer = _embedding_of(module)
        self._known = None
        self.brings = brings

    def take(self, module: LightningModule, batch: Any) -> dict[str, Compared]:
        """What the taps have heard of this batch, beside its reference; no text layers where their tower has not run.

        Raises:
            TapError: if a tower that must have run has not.
        """
        text = None
        reference = self.reference
        text_slots, image_slots = (
            0 if self.brings is None or isinstance(reference, FrozenStart) else self.brings.prompt_length(kind)
            for kind in _KINDS
        )
        if self.ids.has_heard or (text_slots and self.ids.keep_graph):  # in evaluation its features may be kept
            ids = self.ids.take()
            heard = {tap.label: tap.take() for tap in self.text}
            counted = self._tokens(module, ids, text_slots)
            mask = self.text[0].spread(counted)
            heard = {label: rows[mask] for label, rows in heard.items()}
            text = ids, mask
            placed = placed_texts(module, ids) if text_slots else None
            if placed is not None:  # without prompts the words stand elsewhere
                text = placed.given, self.text[0].rows_of(counted, placed.source, placed.given.shape[1])
        else:
            heard = {}
        images = {tap.label: tap.take() for tap in self.image}
        if isinstance(reference, FrozenStart):
            found = reference.features(module, batch)
            found = {**found, **{label: found[label][mask] for label in heard}}
        elif self.brings is None:
            raise RuntimeError("nobody brings prompts: call begin before a fit.")
        else:
            found = reference.tower_features(module, batch, self.brings, text)
        if image_slots:
            kept = self.image[0].without_last(image_slots, inputs_of(batch))
            images = {label: rows[kept] for label, rows in images.items()}
        return {label: Compared(rows, found[label]) for label, rows in {**heard, **images}.items()}

    def _tokens(self, module: nn.Module, ids: Tensor, slots: int) -> Tensor:
        if self._known is None or self._known[0] != slots or not are_equal(self._known[1], ids):
            self._known = slots, ids.clone(), text_tokens(module, ids, slots)
        return self._known[2]


class _TokenTap(AskedTap):
    """Hears tokens as one row each, and remembers how they were arranged."""

    def __init__(self, layer: str, keep_graph: bool) -> None:
        super().__init__(layer, pooling="tokens", keep_graph=keep_graph)
        self.shape: tuple[int, ...] = ()
        self.times = 1

    def take(self, mask: Tensor | None = None) -> Tensor:
        heard = self._attached().heard
        self.times = len(heard)
        self.shape = tuple(heard[0].shape[:2]) if heard and isinstance(heard[0], Tensor) else ()
        return super().take(mask)

    def spread(self, mask: Tensor) -> Tensor:
        """A mask ``(N, T)`` as rows ``(R,)``, whether samples or tokens come first."""
        if self.shape[1:] == mask.shape[1:]:
            return mask.flatten()
        if self.shape == mask.shape[::-1]:
            return mask.T.flatten()
        raise ValueError(f"layer {self.layer} gives tokens {self.shape}, which do not fit texts {tuple(mask.shape)}.")

    def rows_of(self, mask: Tensor, source: Tensor, length: int) -> Tensor:
        """For each true entry of ``mask`` ``(N, T)`` the row of the same token in texts ``(N, L)`` as they were, of
        which ``source`` ``(N, L')`` are the positions; a token that the tower appends stays the last.
        """
        appended = mask.shape[1] - source.shape[1]
        end_a = torch.arange(length, length + appended, device=source.device)
        source = torch.cat([source, end_a.expand(len(source), -1)], dim=-1)
        text_N1 = torch.arange(len(source), device=source.device)[:, None]
        if self.shape[1:] == mask.shape[1:]:
            return (text_N1 * (length + appended) + source)[mask]
        return (source * len(source) + text_N1).T[mask.T]

    def without_last(self, count: int, inputs: Any) -> Tensor:
        """Which rows ``(R,)`` are not the last ``count`` tokens of a sample."""
        samples_last = isinstance(inputs, Tensor) and self.shape[0] != len(inputs) and self.shape[1] == len(inputs)
        size, samples = self.shape if samples_last else self.shape[::-1]
        kept = torch.arange(size) < size - count
        return (kept.repeat_interleave(samples) if samples_last else kept.repeat(samples)).repeat(self.times)


def text_tokens(module: nn.Module, ids: Tensor, num_prompts: int) -> Tensor:
    """Mask ``(K, L)`` of the tokens that mean the same with prompts as without, for the ids ``(K, L)`` of texts. EOS is
    where the tower looks for it, and the largest id where the tower is not known.
    """
    try:
        tower = find_clip_towers(module).text
    except ValueError:
        place = torch.arange(ids.shape[1], device=ids.device)
        return (place <= ids.argmax(1, keepdim=True)) & ((place == 0) | (place > num_prompts))
    return tower.comparable_tokens(ids, num_prompts)


def placed_texts(module: nn.Module, ids: Tensor) -> Placed | None:
    """The texts of which these ids were made in the last pass, where prompts have made room in them."""
    try:
        return find_clip_towers(module).text.placed(ids)
    except ValueError:
        return None


def _embedding_of(module: nn.Module) -> str:
    found = [name for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    found = [name for name in found if name.endswith("token_embedding")] or found
    if len(found) != 1:
        raise ValueError(
            f"{type(module).__name__} has {len(found)} layers that could embed the words{': ' if found else ''}"
            f"{', '.join(found)}: the text tower's nn.Embedding must be called token_embedding, to tell its padding."
        )
    return found[0].replace("_orig_mod.", "")


def compare_towers(
    module: nn.Module,
    text_layers: Sequence[str] | None,
    image_layers: Sequence[str] | None,
    without_prompts: bool,
    forward: Forward | None,
    trunk: str | None,
    path: str | None,
    keep_graph: bool,
) -> TowerComparison:
    """Two towers beside themselves without prompts, or beside their start; None stands for all blocks of a tower."""
    if text_layers is None or image_layers is None:
        towers = find_clip_towers(module)
        text_layers = towers.text.block_names if text_layers is None else text_layers
        image_layers = towers.image.block_names if image_layers is None else image_layers
    reference: FrozenStart | WithoutPrompts
    if without_prompts:
        reference = WithoutPrompts(text_layers, image_layers, forward)
    else:
        both = [*text_layers, *image_layers]
        reference = FrozenStart(both, None, "tokens", trunk, forward, path, keep_graph)
    return TowerComparison(text_layers, image_layers, reference, keep_graph)
