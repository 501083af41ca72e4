"""Bytes of a file to where they are wanted, in few large reads and without a copy between."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from .. import host

PIECE = 8 << 20  # bytes read at once: large enough for full speed, small enough to share out and to stop between two
MAX_PARTS = 512  # of one scattered read; Linux and macOS take 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The bytes of one tensor in a file, and where they go: a contiguous CPU tensor of as many bytes."""

    file: Path
    start: int
    name: str
    out: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """What one read brings: the bytes from a place in the file on, into memory here and there, for ranges by name."""

    start: int
    views: list[memoryview]
    names: list[str]


def read_ranges(
    ranges: Iterable[Range], go_on: Callable[[], None] = lambda: None, pool: Executor | None = None
) -> None:
    """Read each range into its tensor; neighbours in a file are read together. `go_on` is asked between two reads.

    Threads of `pool` help; without one they are started here, which takes longer, and none stays. No file stays open.
    Raises ValueError for a file that ends too early, OSError for one that can't be read.
    """
    if pool is None:
        with ThreadPoolExecutor(host.READ_HELPERS, "reader") as own:
            return read_ranges(ranges, go_on, own)
    by_file: dict[Path, list[Range]] = {}
    for one in ranges:
        by_file.setdefault(one.file, []).append(one)
    helpers = min(host.READ_HELPERS, (os.cpu_count() or 1) - 1) if hasattr(os, "preadv") else 0
    for file, inside in by_file.items():
        turns = _Turns(_pieces(sorted(inside, key=lambda one: one.start)), go_on)
        with open(file, "rb", buffering=0) as opened:
            asked = [pool.submit(_read_all, opened, file, turns) for _ in range(helpers)]
            try:
                _read_all(opened, file, turns)
            finally:
                under_way = [one for one in asked if not one.cancel()]  # nobody waits for one that comes too late
                asked.clear()
                wait(under_way)
            while under_way:
                under_way.pop().result()


class _Turns(Iterator[_Piece]):
    """Pieces that threads take by turns, each as soon as it has read one; `go_on` is asked before every piece."""

    def __init__(self, pieces: Generator[_Piece, None, None], go_on: Callable[[], None]):
        self._pieces, self._go_on, self._lock, self._is_over = pieces, go_on, Lock(), False

    def __next__(self) -> _Piece:
        with self._lock:
            if self._is_over:
                raise StopIteration
            self._is_over = True  # unless this goes well: after an error in one thread nobody asks or reads on
            self._go_on()
            piece = next(self._pieces)
            self._is_over = False
            return piece

    def end(self) -> None:
        with self._lock:
            self._is_over = True


def _read_all(opened: FileIO, file: Path, turns: _Turns) -> None:
    try:
        for piece in turns:
            _read(opened, file, piece)
    finally:
        turns.end()  # after an error nobody reads on


def _pieces(ranges: Sequence[Range]) -> Generator[_Piece, None, None]:
    """Divide ranges, in the order of the file, into pieces without a gap."""
    piece, room, end = _Piece(start=0, views=[], names=[]), 0, -1
    for one in ranges:
        view, at = memoryview(_bytes(one.out).numpy()), one.start
        while view:
            if at != end or not room or len(piece.views) == MAX_PARTS:
                if piece.views:
                    yield piece
                piece, room = _Piece(start=at, views=[], names=[]), PIECE
            part, view = view[:room], view[room:]
            piece.views.append(part)
            piece.names.append(one.name)
            room, at = room - len(part), at + len(part)
            end = at
    if piece.views:
        yield piece


def _read(opened: FileIO, file: Path, piece: _Piece) -> None:
    at, left = piece.start, list(zip(piece.views, piece.names, strict=True))
    while left:
        count = _read_once(opened, [view for view, _ in left], at)
        if not count:
            raise ValueError(
                f"{file} ends at byte {at}, in the middle of {left[0][1]}: it was cut off since it was opened. "
                "Download it again."
            )
        at += count
        while left and count >= len(left[0][0]):
            count -= len(left.pop(0)[0])
        if left:
            left[0] = left[0][0][count:], left[0][1]


def _read_once(opened: FileIO, views: list[memoryview], at: int) -> int:
    """Read from a place in the file into memory that follows one after the other; return how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(opened.fileno(), views, at)
    opened.seek(at)  # Windows has no scattered reads, so one thread reads
    return opened.readinto(views[0])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
