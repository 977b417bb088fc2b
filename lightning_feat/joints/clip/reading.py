"""Where a text tower reads the features of a text, where its words are, and whether prompts would cover them.

Shapes: N texts, L token ids of each, n prompts.
"""

import warnings
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

# The id at which features are read, where it comes first; the largest id; the last position, padding or not; the
# first; a token that the tower appends to the words; or a rule that is not known.
EndOfText: TypeAlias = int | Literal["argmax", "last", "first", "appended"] | None


class Reading(NamedTuple):
    """How a tower reads a text.

    Attributes:
        end: where it takes the features.
        start: position of the first word: 1 after a start token, 0 where the tokenizer puts none.
        pad_id: of padding, where the features are read from an appended token.
    """

    end: EndOfText
    start: int = 1
    pad_id: int = 0

    def positions(self, token_ids: Tensor) -> Tensor:
        """Positions ``(N,)`` at which the features of the texts ``(N, L)`` are read; L for an appended token.

        Raises:
            ValueError: if that is not known.
        """
        if self.end is None:
            raise ValueError("this text tower does not read its features at EOS, so where a text ends is not known.")
        if isinstance(self.end, int):
            return torch.eq(token_ids, self.end).int().argmax(dim=-1)
        if self.end == "argmax":
            return token_ids.argmax(dim=-1)
        fixed = {"first": 0, "last": token_ids.shape[-1] - 1, "appended": token_ids.shape[-1]}[self.end]
        return torch.full(token_ids.shape[:-1], fixed, device=token_ids.device)

    def comparable(self, token_ids: Tensor, num_prompts: int) -> Tensor:
        """Mask ``(N, L)`` of the tokens that count and mean the same with prompts as without; ``(N, L + 1)`` where the
        tower appends one.
        """
        length = token_ids.shape[-1]
        position_L = torch.arange(length, device=token_ids.device)
        free_L = (position_L < self.start) | (position_L >= self.start + num_prompts)
        if self.end in ("last", "first"):  # all tokens see each other, padding included
            return free_L.expand(token_ids.shape).clone()
        if self.end == "appended":
            words = free_L & (token_ids != self.pad_id)
            return torch.cat([words, torch.ones_like(words[..., :1])], dim=-1)
        return free_L & (position_L <= self.positions(token_ids)[..., None])

    def count_words(self, token_ids: Tensor) -> int:
        """Words of one text ``(L,)``, up to its end or its padding."""
        if self.end == "argmax" or isinstance(self.end, int):
            return int(self.positions(token_ids)) - self.start
        differs = (token_ids != token_ids[-1]).nonzero()  # the end of a text and its padding: one id, to the last
        return (int(differs[-1]) + 1 if len(differs) else 0) - self.start

    @property
    def filler(self) -> int:
        """An id that is no end of text and no padding."""
        return next(i for i in range(3) if i not in (self.end, self.pad_id))

    def room(self, token_ids: Tensor) -> Tensor:
        """Tokens ``(N,)`` at the end of each text that it could lose: what comes after its end, or its padding."""
        if self.end == "argmax" or isinstance(self.end, int):
            return token_ids.shape[-1] - 1 - self.positions(token_ids)
        last_N1 = token_ids[:, -1:]
        run_N = (token_ids.flip(-1) == last_N1).int().cumprod(-1).sum(-1)
        is_pad_N = last_N1[:, 0] == self.pad_id
        if self.end == "appended":
            return torch.where(is_pad_N, run_N, torch.zeros_like(run_N))
        if self.end == "last":  # the end of a text and its padding are one id, as in SigLIP
            return run_N - 1
        return torch.where(is_pad_N, run_N, run_N - 1)

    def check_ends(self, rows: Tensor) -> None:
        """Raise a ``ValueError`` if a text of ``(N, L)`` has no end, or none of the start that all should have."""
        if isinstance(self.end, int) and not bool((rows == self.end).any(-1).all()):
            raise ValueError(f"a text has no token {self.end}, at which its features are read: set eos_token_id.")
        if self.start and len(rows[:, 0].unique()) > 1:
            raise ValueError(
                "the texts begin with different tokens, so that they have no start token, and prompts would stand "
                "after their first words: set start_token=False."
            )

    def check_tails(self, rows: Tensor) -> None:
        """Raise a ``ValueError`` if one of ``(N, L)`` goes on where its tower is taken to read its end."""
        if self.end == "argmax" or isinstance(self.end, int):
            end_N = self.positions(rows)
            differs_NL = (rows != rows[:, -1:]) & (torch.arange(rows.shape[-1], device=rows.device) > end_N[:, None])
            if bool(differs_NL.any()):
                place = int(end_N[differs_NL.any(-1)][0])
                raise ValueError(
                    f"a text goes on after position {place}, where its features are taken to be read: set eos_token_id "
                    "to the id that ends a text."
                )

    def check_room(self, token_ids: Tensor, slots: int, classes: bool = False) -> None:
        """Raise a ``ValueError`` if ``slots`` prompts in place of the first words would cover an end of text, or what
        tells two texts apart.

        Args:
            token_ids: ``(N, L)``.
            slots: n.
            classes: whether the texts are class names, two of which may not be equal. Else that is warned of.
        """
        rows = token_ids.reshape(-1, token_ids.shape[-1])
        self.check_ends(rows)
        if self.end is not None and self.end != "first":
            shortest = int(self.positions(rows).min())
            if shortest < self.start + slots:
                raise ValueError(f"a text ends at position {shortest}, but {self._advice(slots)}")
        self.check_apart(rows, rows, slots, classes)

    def check_apart(self, prompted: Tensor, rows: Tensor, slots: int, classes: bool) -> None:
        """Raise a ``ValueError`` if texts ``(N, L)`` with prompts, ``(N, L')``, differ in nothing else."""
        free = torch.cat([prompted[:, : self.start], prompted[:, self.start + slots :]], dim=-1)
        alike = _first_alike(free)
        if alike is None:
            return
        one, other = alike
        if not torch.equal(rows[one], rows[other]) or len(free.unique(dim=0)) < len(rows.unique(dim=0)):
            raise ValueError(
                f"texts {one} and {other} differ only where prompts would stand, and would become one: "
                f"{self._advice(slots)}"
            )
        said = f"texts {one} and {other} have the same tokens: "
        if classes:
            raise ValueError(
                f"{said}as names of classes they are one, and no training tells them apart. Do they differ in case "
                "alone, or is the name cut off at the end?"
            )
        warnings.warn(f"{said}if they are names of classes, no training tells these apart.", stacklevel=2)

    def _advice(self, slots: int) -> str:
        return (
            f"{slots} prompts take positions {self.start} to {self.start + slots - 1}: begin each text with as many "
            "words, the same in all ('a photo of a ...'); they are replaced."
        )


def _first_alike(rows: Tensor) -> tuple[int, int] | None:
    """The first row that equals an earlier one, and that one."""
    _, group_N = rows.unique(dim=0, return_inverse=True)
    seen: dict[int, int] = {}
    for i, group in enumerate(group_N.tolist()):
        if group in seen:
            return seen[group], i
        seen[group] = i
    return None


def is_held(root: nn.Module, tensor: Tensor) -> bool:
    """Whether a tensor stands in a module: token ids that do are those of its classes, others come with a batch."""
    for part in root.modules():
        for held in [*part._buffers.values(), *vars(part).values()]:
            same = isinstance(held, Tensor) and held.shape == tensor.shape and held.device == tensor.device
            if same and held.data_ptr() == tensor.data_ptr():
                return True
    return False
