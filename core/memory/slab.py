"""A model's weights as slabs: each block's tensors in one contiguous buffer that crosses to a device in one copy."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import inf
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import host
from . import kept
from .pinned import HostBuffer

ALIGNMENT = 256  # bytes, of each tensor in a slab: what CUDA's own allocator gives, and kernels may count on

Slot = tuple[dict[str, Tensor | None], str, Tensor]  # where a tensor is registered: table and name; and the tensor


class Weights(Protocol):
    """How the tensors of a module on the meta device come about; `core.weights.assemble.Weights` is one."""

    module: nn.Module

    @property
    def converted_bytes(self) -> int: ...

    def fill(self, out: Mapping[str, Tensor], go_on: Callable[[], None], readers: Executor | None) -> None: ...

    def materialise(self) -> nn.Module: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a slab: its name in the model, where it is registered, and where it lies.

    `rest` is what is registered while the slab is nowhere: the tensor in RAM, or one without memory.
    """

    name: str
    table: dict[str, Tensor | None]
    key: str
    rest: Tensor
    start: int

    def of(self, buffer: Tensor) -> Tensor:
        """Return this tensor as it lies in a buffer of bytes."""
        return buffer[self.start : self.start + self.rest.nbytes].view(self.rest.dtype).view(self.rest.shape)


class Layout:
    """How all parameters and buffers of a module, but of those in the modules `but`, lie in one slab."""

    def __init__(self, module: nn.Module, name: str, but: Collection[nn.Module] = ()):
        pieces: list[Piece] = []
        end = 0
        for full_name, (table, key, tensor) in _named(module, name, but):
            start = -(-end // ALIGNMENT) * ALIGNMENT
            pieces.append(Piece(full_name, table, key, tensor, start))
            end = start + tensor.nbytes
        self.pieces, self.nbytes = tuple(pieces), end

    def bind(self, buffer: Tensor) -> None:
        """Make the module use the weights that lie in a buffer [>= nbytes] of bytes, on whatever device it is.

        Weights are frozen: what is in the buffer is never copied back.
        """
        for piece in self.pieces:
            view = piece.of(buffer)
            is_parameter = isinstance(piece.rest, nn.Parameter)
            piece.table[piece.key] = nn.Parameter(view, requires_grad=False) if is_parameter else view

    def release(self) -> None:
        """Make the module use what it did before it was bound to anything."""
        for piece in self.pieces:
            piece.table[piece.key] = piece.rest


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """Bytes that a run takes beside weights.

    At the `peak` of a pass, with what so many `visits` to blocks leave behind for the run; `left_behind` by each visit
    of all passes; and of passes that go through each block together while they are `waiting` for one another.
    """

    peak: int
    left_behind: int
    waiting: int
    visits: int


class Loaded:
    """A model's weights between runs. `blocks` are those of its modules that can stream.

    Nothing is read until a run needs it. `masters` are the slabs of blocks that are kept in RAM for the next runs;
    `working` and `visit_seconds` what is known of the bytes and the times of runs that were planned or made.
    """

    def __init__(self, weights: Weights, blocks: Iterable[nn.Module]):
        self.weights, self.blocks = weights, tuple(blocks)
        self.module = weights.module
        self.masters: dict[int, HostBuffer] = {}
        self.working: dict[object, Traced] = {}
        self.visit_seconds: dict[object, float] = {}
        self.is_in_use = False
        self._without_memory: tuple[Slot, ...] = ()  # what was registered before weights came to be in RAM
        kept.remember(self)

    def keep_only(self, blocks: Collection[int]) -> None:
        """Let go of the slabs in RAM but for those of these blocks."""
        for block in self.masters.keys() - set(blocks):
            del self.masters[block]

    @property
    def kept_bytes(self) -> int:
        """How much RAM is taken by the slabs that are kept, and by weights that are not stored as they are wanted."""
        slabs = sum(master.bytes.numel() for master in self.masters.values())
        return slabs + (self.weights.converted_bytes if self._without_memory else 0)

    def let_go(self, nbytes: float = inf) -> None:
        """Give RAM back, at least so many bytes or all; the next run reads these weights again. Never during a run."""
        assert not self.is_in_use
        while self.masters and nbytes > 0:
            _, last = self.masters.popitem()
            nbytes -= last.bytes.numel()
        if nbytes > 0:
            for table, key, bare in self._without_memory:
                table[key] = bare
            self._without_memory = ()

    def layouts(self) -> tuple[Layout, ...]:
        """Return the layout of each block, and that of all other weights last."""
        names = {id(module): name for name, module in self.module.named_modules()}
        blocks = (Layout(block, names[id(block)]) for block in self.blocks)
        return (*blocks, Layout(self.module, "", self.blocks))

    def in_ram(self) -> nn.Module:
        """Return the module with all its tensors in RAM, memory-mapped where they are stored as they are wanted."""
        bare = tuple(slot for slot in tensors(self.module) if slot[2].is_meta)
        if bare:
            if (short := self.weights.converted_bytes - host.available_ram()) > 0:
                kept.release_idle(self, short)
            self.weights.materialise()
            self._without_memory = bare
        return self.module

    def fill(
        self,
        layout: Layout,
        buffer: Tensor,
        go_on: Callable[[], None] = lambda: None,
        readers: Executor | None = None,
    ) -> None:
        """Write a slab into a buffer in RAM; `go_on` is asked now and then, and stops by raising.

        Who fills many gives threads that help, `readers`, so that they need not be started for each.

        Raises ValueError or OSError where the weights can't be read.
        """
        missing = {piece.name: piece.of(buffer) for piece in layout.pieces if piece.rest.is_meta}
        if missing:
            self.weights.fill(missing, go_on, readers)
        for piece in layout.pieces:
            if piece.name not in missing:
                go_on()
                piece.of(buffer).copy_(piece.rest)


def tensors(module: nn.Module, but: Collection[nn.Module] = ()) -> Iterator[Slot]:
    """Yield where all parameters and buffers are registered, but for those inside the modules `but`."""
    return (slot for _, slot in _named(module, "", but))


def _named(module: nn.Module, name: str, but: Collection[nn.Module]) -> Iterator[tuple[str, Slot]]:
    skipped = {id(part) for other in but for part in other.modules()}
    for path, part in module.named_modules(prefix=name):
        if id(part) not in skipped:
            tables: Sequence[dict[str, Tensor | None]] = (part._parameters, part._buffers)
            for table in tables:
                for key, tensor in table.items():
                    if tensor is not None:
                        yield f"{path}.{key}" if path else key, (table, key, tensor)


def is_there(tensor: Tensor, device: torch.device) -> bool:
    """Say whether a tensor is on a device; one without a number is whichever of its kind."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)
