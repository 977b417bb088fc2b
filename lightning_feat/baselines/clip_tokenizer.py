"""From words to the token ids that a text tower reads: a small tokenizer of our own, and those of two libraries.

Each is called with texts and gives ids ``(N, context_length)`` int64, in which the token that ends a text has the
largest id of its row, at its first place if it also fills the rest: that is where a CLIP reads its text features.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

INSTALL = 'pip install "lightning-feat[clip]"'
_PIECES = re.compile(r"\w+|[^\w\s]")


class Tokenizer(Protocol):
    """What a text tower needs to be fed."""

    context_length: int

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Ids ``(N, context_length)`` int64 of N texts; of one, if it is a string."""


class WordTokenizer:
    """One token for each word and each punctuation mark, in lower case, from a vocabulary that is given.

    Padding is 0, an unknown word 1, the start 2; the words follow in alphabetical order; the end has the largest id.

    Args:
        words: the vocabulary, or texts that use it, in any order.
        context_length: tokens in a row, with start and end.

    Example:
        >>> tokenizer = WordTokenizer(["a red three.", "a blue one."], context_length=8)
        >>> tokenizer.words
        ('.', 'a', 'blue', 'one', 'red', 'three')
        >>> tokenizer("A blue three, perhaps.")
        tensor([[2, 4, 5, 8, 1, 1, 3, 9]])
    """

    pad_id, unknown_id, sos_id = 0, 1, 2

    def __init__(self, words: Iterable[str], context_length: int = 16) -> None:
        if isinstance(words, str):
            raise ValueError(f"words={words!r}: give a list of words or texts.")
        if context_length < 3:
            raise ValueError(f"context_length={context_length}: start, end and a word are three tokens.")
        self.words = tuple(sorted({piece for text in words for piece in _pieces(text)}))
        if not self.words:
            raise ValueError("words is empty: give the words that the texts are made of.")
        self.context_length = context_length
        self.eos_id = self.sos_id + 1 + len(self.words)
        self._ids = {word: self.sos_id + 1 + place for place, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, the four special ones counted."""
        return self.eos_id + 1

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Ids ``(N, context_length)`` int64.

        Raises:
            ValueError: if a text has more than ``context_length - 2`` words: cut off, it might lose the class.
        """
        rows = [self._row(text) for text in ([texts] if isinstance(texts, str) else texts)]
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.context_length)

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """The words in these texts that the vocabulary has not, in alphabetical order."""
        return sorted({piece for text in texts for piece in _pieces(text)} - set(self.words))

    def _row(self, text: str) -> list[int]:
        inner = [self._ids.get(piece, self.unknown_id) for piece in _pieces(text)]
        row = [self.sos_id, *inner, self.eos_id]
        if len(row) > self.context_length:
            raise ValueError(
                f"{text!r} makes {len(row)} tokens with start and end, but context_length={self.context_length}: "
                "shorten it, or make the tokenizer and the text tower longer."
            )
        return row + [self.pad_id] * (self.context_length - len(row))


class OpenClipTokenizer:
    """The tokenizer that belongs to a model of open_clip. That of OpenAI's CLIP comes with the package.

    Longer texts are cut, as open_clip does.

    Args:
        model_name: as for ``open_clip.create_model``.
    """

    def __init__(self, model_name: str) -> None:
        self._tokenize = import_open_clip().get_tokenizer(model_name)
        self.context_length: int = self._tokenize.context_length

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Ids ``(N, context_length)`` int64."""
        ids: Tensor = self._tokenize([texts] if isinstance(texts, str) else list(texts))
        return ids


class HuggingFaceTokenizer:
    """The tokenizer in a folder that ``save_pretrained`` of transformers has written. Longer texts are cut.

    Args:
        folder: holds the tokenizer files, commonly beside those of the model. Nothing is downloaded.
        context_length: tokens in a row; None takes what the tokenizer says.
    """

    def __init__(self, folder: str | Path, context_length: int | None = None) -> None:
        self._tokenize: Any = import_transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        longest = int(self._tokenize.model_max_length)
        if context_length is None and longest > 1_000_000:  # what transformers says where nothing is known
            raise ValueError(f"the tokenizer in {folder} does not say how long a text may be: give context_length.")
        self.context_length = context_length or longest

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Ids ``(N, context_length)`` int64."""
        ids: Tensor = self._tokenize(
            [texts] if isinstance(texts, str) else list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )["input_ids"]
        return ids


def import_open_clip() -> Any:
    """The module ``open_clip``, imported when it is needed: that takes seconds."""
    try:
        import open_clip  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this needs open_clip, which is not installed: {INSTALL}") from error
    return open_clip


def import_transformers() -> Any:
    """The module ``transformers``, imported when it is needed: that takes seconds."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this needs transformers, which is not installed: {INSTALL}") from error
    return transformers


def _pieces(text: str) -> list[str]:
    return _PIECES.findall(text.lower())
