from collections.abc import Callable
from typing import Any


def try_all(*calls: Callable[[], Any]) -> list[Any]:
    """What each call gives. Where several raise a ``ValueError``, one with all they say: what a user has to set is said
    at once, not one error after the other.
    """
    given, said = [], []
    for call in calls:
        try:
            given.append(call())
        except ValueError as error:
            said.append(error)
    if len(said) == 1:
        raise said[0]
    if said:
        raise ValueError("several things are to be said:" + "".join(f"\n- {error}" for error in said))
    return given
