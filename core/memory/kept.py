"""What is kept in RAM between runs, so that the next one finds it there: counted, and given back when it is wanted."""

from collections.abc import Iterator
from typing import Protocol
from weakref import WeakSet

from .. import host


class Keeper(Protocol):
    """Whatever keeps memory between runs. While it is in use, nothing is taken from it."""

    is_in_use: bool

    @property
    def kept_bytes(self) -> int: ...

    def let_go(self) -> None: ...


_KEEPERS: "WeakSet[Keeper]" = WeakSet()


def remember(keeper: Keeper) -> None:
    """Count a keeper in from now on, for as long as somebody else holds it."""
    _KEEPERS.add(keeper)


def idle_bytes(but: Keeper | None = None) -> int:
    """Return how much RAM is kept for runs to come; what is in use is left out, and `but` too."""
    return sum(keeper.kept_bytes for keeper in _idle(but))


def release_idle(but: Keeper | None = None) -> None:
    """Give back the RAM that is kept for runs to come; they read it from their files again."""
    for keeper in _idle(but):
        keeper.let_go()


def show() -> None:
    """Have ComfyUI list what is kept now, so that it can ask for it back."""
    host.show_kept(idle_bytes, release_idle)


def _idle(but: Keeper | None) -> Iterator[Keeper]:
    return (keeper for keeper in tuple(_KEEPERS) if keeper is not but and not keeper.is_in_use)
