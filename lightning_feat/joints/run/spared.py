from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn


@contextmanager
def run_spared(owner: str, what: str, said: set[str] | None = None) -> Iterator[None]:
    """Make a warning of any error inside, as neither a picture nor a file is worth a run: the disk may be full, the
    folder gone, a logger offline. An interrupt passes.

    Args:
        owner: the callback.
        what: it could not do, such as ``"draw its figure"``.
        said: what has been told already, and is not told again; None tells each time.
    """
    try:
        yield
    except Exception as error:
        if said is None or what not in said:
            rank_zero_warn(f"{owner} could not {what}: {type(error).__name__}: {error}")
        if said is not None:
            said.add(what)
