"""Learned tokens for the towers of a CLIP, at the embeddings and again at the inputs of the first blocks.

Shapes: N images or texts, T tokens, D width of a tower, n prompts (``length``), J blocks with prompts (``depth``).
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_feat.functional.feature_shift.prompt_gram import (
    exact_dtype,
    gram_consistency_loss,
    gram_discrepancy,
    gram_norm,
    gram_ratio,
)
from lightning_feat.joints.arguments import checked
from lightning_feat.layers.feature_shift.insertion import Towers

Coupling: TypeAlias = Literal["maple", "independent", "text", "vision"]
Kind: TypeAlias = Literal["text", "image"]

_KINDS: dict[Coupling, tuple[Kind, ...]] = {
    "maple": ("text", "image"),
    "independent": ("text", "image"),
    "text": ("text",),
    "vision": ("image",),
}
_LEARNED: dict[Coupling, tuple[Kind, ...]] = {**_KINDS, "maple": ("text",)}
_STD = 0.02  # of prompts that no word gives, in MaPLe and RESTORE


class DeepPrompts(nn.Module):
    """Prompts of one or both towers, each ``(length, width)``, one for each of the first ``depth`` blocks.

    In the text tower they stand where the first n words would, after SOS where there is one, and get positions; in the
    image tower they come after the patches, without positions, and leave before tokens are pooled. At the inputs of
    blocks 1 to J - 1 new ones replace what the block before made of the old; from block J on they are carried along.
    This is the insertion of MaPLe (Khattak et al., "MaPLe: Multi-modal prompt learning", CVPR 2023) and of RESTORE
    (Yang et al., arXiv 2403.06136).

    ``coupling`` says which prompts are learned:

    * ``"maple"``: text prompts, and a ``Linear`` for each depth that makes an image prompt of each of them. Those of
      depth 1 to J - 1 start equal;
    * ``"independent"``: text and image prompts (IVLP); depth and length may differ;
    * ``"text"``: text prompts only; with ``depth=1`` those of CoOp (Zhou et al., IJCV 2022);
    * ``"vision"``: image prompts only.

    The module only holds the prompts: :func:`insert_prompts` puts them into a model. They are float32 with a model in
    half precision too, unless you move them.

    Args:
        coupling: see above.
        text_width: D of the text tower; not needed for ``"vision"``.
        image_width: D of the image tower; not needed for ``"text"``.
        depth: J, at least one.
        length: n, at least one.
        image_depth: J of the image tower if ``"independent"``; by default ``depth``.
        image_length: n of the image tower if ``"independent"``; by default ``length``.
        first: ``(length, text_width)``, where the text prompt of block 0 starts: word embeddings of a template, as
            :meth:`for_towers` takes them. All else starts from a normal distribution of standard deviation 0.02.

    Attributes:
        kinds: the prompted towers, of ``"text"`` and ``"image"``.
        words: ids of the n words that text prompts replace; a text that begins with others keeps them, behind the
            prompts. Those of the template; without one, what all texts of the first pass begin with, if they do, and
            ``[-1]`` if they do not.
        text_gram_start, image_gram_start: buffers ``(J - 1,)``, the Gram norms at construction. They are saved, so that
            a resumed run has the same loss, bit for bit.

    Example:
        >>> prompts = DeepPrompts("maple", text_width=512, image_width=768, depth=9, length=2)
        >>> prompts.prompt("image", 3).shape
        torch.Size([2, 768])
        >>> prompts.gram_consistency_loss()
        tensor(0., grad_fn=<SumBackward0>)
    """

    kinds: tuple[Kind, ...]
    text_gram_start: Tensor
    image_gram_start: Tensor

    @checked
    def __init__(
        self,
        coupling: Coupling = "maple",
        text_width: int | None = None,
        image_width: int | None = None,
        depth: int = 9,
        length: int = 2,
        image_depth: int | None = None,
        image_length: int | None = None,
        first: Tensor | None = None,
    ) -> None:
        super().__init__()
        if coupling != "independent" and (image_depth is not None or image_length is not None):
            raise ValueError(
                f"image_depth={image_depth}, image_length={image_length} with coupling={coupling!r}: only "
                "'independent' image prompts have a depth and a length of their own. Leave these out."
            )
        self.coupling = coupling
        self.kinds = _KINDS[coupling]
        self.words: list[int] = []
        sizes = {
            "text": (depth, length, text_width or 0),
            "image": (
                depth if image_depth is None else image_depth,
                length if image_length is None else image_length,
                image_width or 0,
            ),
        }
        for kind in self.kinds:
            if min(sizes[kind]) < 1:
                raise ValueError(
                    f"{kind} prompts need depth, length and {kind}_width of one or more, got {sizes[kind]}."
                )
        for kind in _LEARNED[coupling]:
            blocks, n, width = sizes[kind]
            prompts = [nn.Parameter(torch.empty(n, width).normal_(std=_STD)) for _ in range(blocks)]
            self.add_module(kind, nn.ParameterList(prompts))
        if coupling == "maple":
            outer, deep = (nn.Linear(sizes["text"][2], sizes["image"][2]) for _ in range(2))
            self.projections = nn.ModuleList([outer, *(copy.deepcopy(deep) for _ in range(depth - 1))])
        if first is not None:
            self._start_from(first)
        for kind in self.kinds:
            self.register_buffer(f"{kind}_gram_start", torch.ones(self.depth_of(kind) - 1, dtype=torch.float32))
        self.reset_gram_start()

    @classmethod
    def for_towers(
        cls,
        towers: Towers,
        coupling: Coupling = "maple",
        depth: int = 9,
        length: int = 2,
        image_depth: int | None = None,
        image_length: int | None = None,
        template_ids: Tensor | None = None,
    ) -> "DeepPrompts":
        """Prompts of the widths of these towers, on their device.

        Args:
            towers: what ``clip_towers.find_clip_towers`` gives.
            coupling: as in the class.
            depth: as in the class.
            length: as in the class.
            image_depth: as in the class.
            image_length: as in the class.
            template_ids: token ids ``(L,)`` of a text that begins with SOS, "a photo of a" say, of whose first
                ``length`` words the embeddings are the start of the first text prompt, and which they replace.
        """
        text = towers.text if coupling != "vision" else None
        image = towers.image if coupling != "text" else None
        first = None if template_ids is None or text is None else text.word_embeddings(template_ids, length).float()
        text_width, image_width = (None if tower is None else tower.width for tower in (text, image))
        prompts = cls(coupling, text_width, image_width, depth, length, image_depth, image_length, first)
        if text is not None and template_ids is not None:
            start = text.first_word
            prompts.words.extend(template_ids.reshape(-1)[start : start + length].tolist())
        return prompts.to(next(towers.model.parameters()).device)

    def depth_of(self, kind: Kind) -> int:
        """Number of blocks of this tower that get prompts, J."""
        return len(self._learned(kind))

    def length_of(self, kind: Kind) -> int:
        """Number of prompts in each of them, n."""
        return len(self._learned(kind)[0])

    def prompt(self, kind: Kind, index: int) -> Tensor:
        """The prompts ``(n, D)`` of one block."""
        learned = self._learned(kind)[index]
        projected: Tensor = self.projections[index](learned) if self._is_projected(kind) else learned
        return projected

    def deep_prompts(self, kind: Kind) -> Tensor:
        """Those of blocks 1 to J - 1, ``(J - 1, n, D)``, in float64 (float32 where there is none), also in autocast."""
        if self.depth_of(kind) < 2:
            raise ValueError("prompts of depth 1 have no deep prompts: set depth to 2 or more.")
        learned = [*self._learned(kind)][1:]
        dtype = exact_dtype(learned[0].device)
        with torch.autocast(learned[0].device.type, enabled=False):
            prompts_JnD = torch.stack(learned).to(dtype)
            if not self._is_projected(kind):
                return prompts_JnD
            maps: Any = [*self.projections][1:]
            weights = torch.stack([linear.weight for linear in maps]).to(dtype)
            biases = torch.stack([linear.bias for linear in maps]).to(dtype)
            return torch.baddbmm(biases[:, None], prompts_JnD, weights.mT)

    def gram_norms(self, kind: Kind) -> Tensor:
        """``functional.feature_shift.gram_norm`` of the deep prompts, ``(J - 1,)``: an absolute scale, to log."""
        return gram_norm(self.deep_prompts(kind))

    def gram_ratios(self, kind: Kind) -> Tensor:
        """These norms as multiples of those at the start: the s of RESTORE."""
        return gram_ratio(self.gram_norms(kind), self.get_buffer(f"{kind}_gram_start"))

    def gram_consistency_loss(self) -> Tensor:
        """``functional.feature_shift.gram_consistency_loss`` over the blocks that are prompted in both towers."""
        return gram_consistency_loss(*self._both())

    def gram_discrepancy(self) -> Tensor:
        """``|s_t - s_v|`` of these blocks."""
        return gram_discrepancy(*self._both())

    @torch.no_grad()
    def reset_gram_start(self) -> None:
        """Take the norms as they are for those at the start. Only after other start values were written by hand."""
        for kind in self.kinds:
            if self.depth_of(kind) > 1:
                norms = self.gram_norms(kind)
                if not bool((norms > 0).all()):
                    raise ValueError(f"{kind} prompts that are all zero have no Gram norm to compare with: {norms}.")
                self.get_buffer(f"{kind}_gram_start").copy_(norms)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{kind}: depth {self.depth_of(kind)}, length {self.length_of(kind)}" for kind in self.kinds)
        return f"{self.coupling}; {sizes}"

    def _both(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if len(self.kinds) < 2:
            raise ValueError(f"coupling={self.coupling!r} prompts one tower: there is nothing to be consistent with.")
        shared = min(self.depth_of("text"), self.depth_of("image")) - 1
        norms = (self.gram_norms("text")[:shared], self.gram_norms("image")[:shared])
        return *norms, self.text_gram_start[:shared], self.image_gram_start[:shared]

    def _is_projected(self, kind: Kind) -> bool:
        return self.coupling == "maple" and kind == "image"

    def _learned(self, kind: Kind) -> nn.ParameterList:
        if kind not in self.kinds:
            raise ValueError(
                f"coupling={self.coupling!r} has no {kind} prompts, only those of: {', '.join(self.kinds)}."
            )
        learned: Any = self.get_submodule("text" if self._is_projected(kind) else kind)
        return learned  # type: ignore[no-any-return]

    @torch.no_grad()
    def _start_from(self, first: Tensor) -> None:
        start = self._learned("text")[0]
        if first.shape != start.shape:
            raise ValueError(f"first must be (length, text_width)={tuple(start.shape)}, got {tuple(first.shape)}.")
        start.copy_(first)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeepPrompts":
        starts = [self.get_buffer(f"{kind}_gram_start") for kind in self.kinds]

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if any(tensor is start for start in starts) else moved

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call, no-any-return]
