"""What is kept in RAM between runs, so that the next one finds it there: counted, and given back when it is wanted."""

from math import inf
from threading import RLock
from typing import Protocol
from weakref import WeakSet

from .. import host


class Keeper(Protocol):
    """Whatever keeps memory between runs. While it is in use, nothing is taken from it."""

    is_in_use: bool

    @property
    def kept_bytes(self) -> int: ...

    def let_go(self, nbytes: float = inf) -> None:
        """Give back at least so many bytes, or all that there is."""


_KEEPERS: "WeakSet[Keeper]" = WeakSet()
_LOCK = RLock()  # ComfyUI may ask from a thread of another device


def remember(keeper: Keeper) -> None:
    """Count a keeper in from now on, for as long as somebody else holds it."""
    with _LOCK:
        _KEEPERS.add(keeper)


def idle_bytes(but: Keeper | None = None) -> int:
    """Return how much RAM is kept for runs to come; what is in use is left out, and `but` too."""
    return sum(keeper.kept_bytes for keeper in _idle(but))


def release_idle(but: Keeper | None = None, nbytes: float = inf) -> int:
    """Give back at least so many bytes of what is kept for runs to come, or all of it; they read it again.

    Returns how many bytes that were. What keeps most gives first, so that few have to read again.
    """
    with _LOCK:
        before = idle_bytes(but)
        for keeper in sorted(_idle(but), key=lambda keeper: keeper.kept_bytes, reverse=True):
            given = before - idle_bytes(but)
            if given >= nbytes:
                break
            keeper.let_go(nbytes - given)
        return before - idle_bytes(but)


def show() -> None:
    """Have ComfyUI list what is kept now, so that it can ask for it back."""
    host.show_kept(idle_bytes, _give)


def _give(nbytes: float) -> int:
    return release_idle(nbytes=nbytes)


def _idle(but: Keeper | None) -> list[Keeper]:
    with _LOCK:
        return [keeper for keeper in _KEEPERS if keeper is not but and not keeper.is_in_use]
