"""What all arms of a seed begin with, such as weights of a pre-training: made once for each seed, and kept on disk."""

import functools
import hashlib
import inspect
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Start:
    """A function of the seed, and where its results are kept.

    Args:
        function: gets ``seed`` and gives what ``torch.load(weights_only=True)`` reads: tensors, state dicts, numbers.
        folder: for a file of each seed.
    """

    function: Callable[..., Any]
    folder: str

    def digest(self) -> str:
        """By its source and what is bound to it."""
        return hashed(source_of(self.function))

    def of(self, seed: int) -> Any:
        """The start of a seed, made now if it is not there; the global seed is set anew after that.

        Raises:
            TypeError: if the function gave what cannot be kept.
        """
        import torch
        from filelock import FileLock
        from lightning.pytorch import seed_everything

        path = Path(self.folder) / f"seed_{seed}-{self.digest()}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # arms of a seed may come at the same time
            if not path.is_file():
                seed_everything(seed, workers=True, verbose=False)
                made = self.function(seed)
                aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
                torch.save(made, aside)
                try:
                    torch.load(aside, weights_only=True)
                except Exception as error:  # of pickle, of many kinds
                    aside.unlink()
                    raise TypeError(
                        f"the start gave {type(made).__name__}, which cannot be kept safely: give tensors, state dicts "
                        "or numbers."
                    ) from error
                aside.replace(path)
        seed_everything(seed, workers=True, verbose=False)
        return torch.load(path, weights_only=True)


def source_of(function: Callable[..., Any]) -> str:
    """The text of a function, after what ``functools.partial`` has bound to it."""
    bound = ""
    while isinstance(function, functools.partial):
        bound += repr(function.args) + repr(sorted(function.keywords.items()))
        function = function.func
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = getattr(function, "__qualname__", repr(type(function)))
    return re.sub(r" at 0x[0-9a-f]+", "", bound) + source


def hashed(content: Any) -> str:
    """Sixteen digits for what JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
