"""Where prompts stand in a text: in place of the words that all texts begin with, or before the first word of a text,
whose words then move on and lose padding at the end.

The ids are changed where they enter the tower, so that it finds its end of text, its masks and its positions by itself.

Shapes: N texts, L token ids of each, n prompts (``slots``), L' ids with them.
"""

from collections.abc import MutableSequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_feat.joints.clip.reading import Reading, is_held

BEFORE = -1  # stands for words where none are replaced
_LOOKS = 100  # passes of which a device other than the CPU is asked: two classes have come by then


class Placed(NamedTuple):
    """Texts with room for prompts.

    Attributes:
        ids: ``(N, L')``.
        source: ``(N, L')``, the position of each in the text as it was; any where a prompt stands.
        given: ``(N, L)``, the texts as they were.
    """

    ids: Tensor
    source: Tensor
    given: Tensor


class Placing:
    """Makes room for n prompts in each text of a tower.

    A text that begins with ``words`` has them replaced. Any other keeps all its words: they move on by n, to the room
    that its padding leaves, or that the tower has beyond the length of these texts.

    Args:
        reading: how the tower reads a text.
        slots: n.
        words: n ids; ``[BEFORE]`` for none; if empty, the first pass says: what all its texts begin with, if they do.
            Filled in place, for the words belong to the prompts.
        longest: texts that the tower takes, in tokens; None if it takes none longer than these.
        root: the module that was searched, which holds the texts that are names of classes.
    """

    def __init__(
        self, reading: Reading, slots: int, words: MutableSequence[int], longest: int | None, root: nn.Module
    ) -> None:
        self.reading, self.slots, self.words, self.longest, self.root = reading, slots, words, longest, root
        self.last: Placed | None = None
        self._moves = self._told = self._warned = False
        self._alone: Tensor | None = None  # the one text from which words were learned, while no other was seen
        self._looks = 0
        self._covered: Tensor | None = None
        self._seen: dict[tuple[int, ...], list[int]] = {}

    def place(self, ids: Tensor) -> Placed:
        """The texts with room for prompts.

        Raises:
            ValueError: if a text has no room, or two would become one. On the CPU every new text is looked at,
                elsewhere those of the first passes; in compiled code none is, once words are known.
        """
        if torch.compiler.is_compiling():
            if not self.words:
                _look(self, ids)
            return self._moved(ids, 0)
        last = self.last
        if last is not None and (last.given is ids or self._is(last.given, ids)):
            return last
        if ids.device.type != "meta" and (ids.device.type == "cpu" or self._looks < _LOOKS):
            self._looks += 1
            placed = self._looked_at(ids)
        else:
            grown = 0 if self.longest is None or not self._moves else self.longest - ids.shape[-1]
            placed = self._moved(ids, max(0, min(self.slots, grown)))
        self.last = placed._replace(given=ids if ids.device.type != "cpu" else ids.clone())
        return self.last

    def knows(self, ids: Tensor) -> bool:
        """Whether these ids, as the embeddings got them, come from ``place``."""
        known = None if self.last is None else self.last.ids
        return known is not None and known.shape == ids.shape and known.data_ptr() == ids.data_ptr()

    def check_covered(self, ids: Tensor) -> None:
        """Of ids that the embeddings got, and that did not come from ``place``: refuse what prompts would cover."""
        if self.knows(ids) or ids.device.type == "meta" or (ids.device.type != "cpu" and self._looks >= _LOOKS):
            return
        known = self._covered
        if known is not None and known.shape == ids.shape and torch.equal(known, ids):
            return
        self._looks += 1
        self.reading.check_room(ids, self.slots, is_held(self.root, ids))
        self._covered = ids.clone()
        first, after = self.reading.start, self.reading.start + self.slots
        for text in ids.reshape(-1, ids.shape[-1])[:_LOOKS].tolist():  # and texts that come one by one
            rest, here = (*text[:first], *text[after:]), text[first:after]
            if self._seen.setdefault(rest, here) != here and len(self._seen) < 100 * _LOOKS:
                raise ValueError(
                    f"a text differs from an earlier one only in positions {first} to {after - 1}, where prompts "
                    "stand: begin each text with as many words, the same in all ('a photo of a ...')."
                )

    def _is(self, known: Tensor, ids: Tensor) -> bool:
        return ids.device.type == "cpu" == known.device.type and known.shape == ids.shape and torch.equal(known, ids)

    def _looked_at(self, ids: Tensor) -> Placed:
        n, length = self.slots, ids.shape[-1]
        self.reading.check_ends(ids)
        if not self.words:
            self._learn(ids)
        moves_N = self._moves_of(ids)
        self._confirm(ids, moves_N)
        self.reading.check_tails(ids[moves_N])
        room_N = self.reading.room(ids)
        short = int((n - room_N).clamp_min(0)[moves_N].max()) if bool(moves_N.any()) else 0
        grown = 0 if self.longest is None else max(0, min(short, self.longest - length))
        self._moves = self._moves or bool(moves_N.any())
        placed = self._moved(ids, grown)
        held = is_held(self.root, ids)
        if short > grown:
            self._refuse_or_warn(ids, moves_N, room_N + grown, held)
        self.reading.check_apart(placed.ids, ids, n, held)
        if self._moves and self.words[0] != BEFORE and not self._told:
            self._told = True
            rank_zero_info(
                f"prompts stand before the words of {int(moves_N.sum())} of {len(ids)} texts, which do not begin with "
                "the words of the template that prompts replace: all words are kept."
            )
        return placed

    def _learn(self, ids: Tensor) -> None:
        n, first = self.slots, self.reading.start
        shared = bool((ids[:, first : first + n] == ids[:1, first : first + n]).all())
        if not shared or int((ids.shape[-1] - 1 - self.reading.room(ids)).min()) < first + n:
            self.words.append(BEFORE)
            return
        self.words.extend(ids[0, first : first + n].tolist())
        if bool((ids == ids[:1]).all()):
            self._alone = ids[0].clone()

    def _confirm(self, ids: Tensor, moves_N: Tensor) -> None:
        alone = self._alone
        if alone is None:
            return
        if bool(moves_N.any()):
            raise ValueError(
                f"the first text came alone, and prompts stood in place of its first {self.slots} words; now comes one "
                "that begins with other words: prompts would cover what tells texts apart. Say which words they "
                "replace (template= of PromptLearner, template_ids= of DeepPrompts.for_towers), or give the texts of "
                "all classes at once."
            )
        if alone.shape != ids.shape[1:] or not bool((ids == alone).all()):
            self._alone = None

    def _moves_of(self, ids: Tensor) -> Tensor:
        if self.words[0] == BEFORE:
            return torch.ones_like(ids[:, 0], dtype=torch.bool)
        first = self.reading.start
        words = torch.tensor([*self.words], device=ids.device)
        here = ids[:, first : first + self.slots]
        if here.shape[-1] < self.slots:
            return torch.ones_like(ids[:, 0], dtype=torch.bool)
        return (here != words).any(-1)

    def _moved(self, ids: Tensor, grown: int) -> Placed:
        n, first, length = self.slots, self.reading.start, ids.shape[-1]
        moves_N1 = self._moves_of(ids)[:, None]
        end_N1 = length - 1 - self.reading.room(ids)[:, None]
        place_L = torch.arange(length + grown, device=ids.device)
        source_NL = torch.where(moves_N1 & (place_L >= first + n), place_L - n, place_L)
        source_NL = source_NL.clamp_max(length - 1)
        is_short_N1 = moves_N1 & (end_N1 + n > length + grown - 1)  # its last words go, its end stays
        source_NL = torch.where(is_short_N1 & (place_L == length + grown - 1), end_N1, source_NL)
        if self.words[0] == BEFORE:
            filler_N1 = torch.where(end_N1 > first, ids[:, first : first + 1], self.reading.filler)
            filler = filler_N1.expand(-1, n)
        else:
            filler = torch.tensor([*self.words], device=ids.device).expand(len(ids), n)
        moved = ids.gather(-1, source_NL)
        is_slot_L = (place_L >= first) & (place_L < first + n)
        slots = filler.gather(-1, (place_L - first).clamp(0, n - 1).expand(len(ids), -1)).to(ids.dtype)
        return Placed(torch.where(moves_N1 & is_slot_L, slots, moved), source_NL, ids)

    def mask(self, placed: Placed, mask: Tensor) -> Tensor:
        """A mask, or other numbers ``(N, L)``, of the tokens, as they are now; a prompt has that of the first word."""
        n, first = self.slots, self.reading.start
        place_L = torch.arange(placed.ids.shape[-1], device=mask.device)
        moved = mask.gather(-1, placed.source)
        beyond_NL = (place_L >= mask.shape[-1]) & (placed.source == mask.shape[-1] - 1) & (self.reading.end != "last")
        moved = torch.where(beyond_NL & ~self._moves_of(placed.given)[:, None], torch.zeros_like(moved), moved)
        is_slot_L = (place_L >= first) & (place_L < first + n)
        return torch.where(is_slot_L, mask[:, first : first + 1].expand_as(moved), moved)

    def _refuse_or_warn(self, ids: Tensor, moves_N: Tensor, room_N: Tensor, held: bool) -> None:
        short = (moves_N & (room_N < self.slots)).nonzero().flatten()
        which = int(short[0])
        said = (
            f"text {which} fills {ids.shape[-1] - int(room_N[which])} of the {ids.shape[-1]} tokens that it may have, "
            f"and does not begin with words that prompts replace: {self.slots} prompts have no room before its words"
        )
        if held or bool((ids == ids[:1]).all()):
            raise ValueError(
                f"{said}. Shorten the text, lower length, or begin all texts with the same {self.slots} words, as "
                "'a photo of a' (template= of PromptLearner): these are replaced."
            )
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"{said}, and it loses its last, as in a shorter tower. Shorten texts, or lower length.")


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="prompts replace words that the first texts share: say template, or run one pass before compiling"
)
def _look(placing: Placing, ids: Tensor) -> None:
    placing.place(ids)
