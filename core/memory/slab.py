"""A block's weights as one slab: a contiguous host buffer that crosses to the device in a single copy."""

import contextlib
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import host

MIN_RAM = 2 << 30  # bytes that stay for everything else
PAGE = 4096  # bytes
ALIGNMENT = 256  # bytes, of each tensor in a slab: what CUDA's own allocator gives, and kernels may count on

Slot = tuple[dict[str, Tensor | None], str, Tensor]  # where a tensor is registered: table and name; and the tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a block: where it is registered, and where it lies in the slab."""

    table: dict[str, Tensor | None]
    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    nbytes: int
    is_parameter: bool

    def of(self, buffer: Tensor) -> Tensor:
        """Return this tensor as it lies in a buffer of bytes."""
        view = buffer[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)
        return nn.Parameter(view, requires_grad=False) if self.is_parameter else view


class Slab:
    """All parameters and buffers of a block in one buffer in RAM; from then on the block's own tensors are its views.

    `host` is the buffer, uint8. Weights are frozen: what is on a device is a copy that is never copied back.
    """

    def __init__(self, block: nn.Module):
        self.pieces = _layout(block)
        self.host = _on_pages(_end(self.pieces))
        self.is_pinned = False
        for piece in self.pieces:
            piece.of(self.host).copy_(piece.table[piece.name])
        self.bind(self.host)

    @property
    def nbytes(self) -> int:
        """How many bytes the slab takes."""
        return self.host.numel()

    def pin(self, device: torch.device) -> bool:
        """Register the buffer with CUDA, so that copies from it run beside everything else; say whether that worked.

        Exactly the slab is registered: PyTorch's own pinned memory rounds up to powers of two. It ends with the slab.
        """
        size = -(-self.nbytes // PAGE) * PAGE
        if int(torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), size, 0)):
            _clear_error(device)
            return False
        weakref.finalize(self, _unregister, self.host, device).atexit = False
        self.is_pinned = True
        return True

    def bind(self, buffer: Tensor) -> None:
        """Make the block use the weights that lie in a buffer [>= nbytes] of bytes, on whatever device it is."""
        for piece in self.pieces:
            piece.table[piece.name] = piece.of(buffer)


class Loaded:
    """A model's weights in RAM. `blocks` are those of its modules that can stream; each has a slab once it did.

    A slab holds its block's weights from then on: who replaces a tensor of a block must make another `Loaded`.
    """

    def __init__(self, module: nn.Module, blocks: Iterable[nn.Module]):
        self.module, self.blocks = module, tuple(blocks)
        self._slabs: dict[int, Slab] = {}
        self._may_pin = True

    def slab(self, i: int, device: torch.device) -> Slab:
        """Return the slab of a block, pinned if the device is CUDA's and the system allows it.

        Raises ValueError if there is not the RAM to make it.
        """
        if i not in self._slabs:
            needed, free = nbytes(self.blocks[i]) + MIN_RAM, host.available_ram()
            if free < needed:
                raise ValueError(
                    f"The model does not fit on {device}, and {free / 1e9:.1f} GB of RAM are free to stream it from, "
                    f"where the next block needs {needed / 1e9:.1f} GB. Use a smaller file of this model (fp8 takes "
                    "half of bf16), or close other programs."
                )
            self._slabs[i] = Slab(self.blocks[i])
        slab = self._slabs[i]
        if device.type == "cuda" and not slab.is_pinned and self._may_pin:
            self._may_pin = host.available_ram() >= MIN_RAM and slab.pin(device)
        return slab


def nbytes(block: nn.Module) -> int:
    """Return how many bytes the slab of a block takes, without making it."""
    return _end(_layout(block))


def tensors(module: nn.Module, but: Collection[nn.Module] = ()) -> Iterator[Slot]:
    """Yield where all parameters and buffers are registered, but for those inside the modules `but`."""
    skipped = {id(part) for other in but for part in other.modules()}
    for part in module.modules():
        if id(part) not in skipped:
            for table in (part._parameters, part._buffers):
                yield from ((table, name, tensor) for name, tensor in table.items() if tensor is not None)


def _layout(block: nn.Module) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for table, name, tensor in tensors(block):
        start = -(-_end(pieces) // ALIGNMENT) * ALIGNMENT
        is_parameter = isinstance(tensor, nn.Parameter)
        pieces.append(Piece(table, name, tensor.dtype, tensor.shape, start, tensor.nbytes, is_parameter))
    return tuple(pieces)


def _end(pieces: Sequence[Piece]) -> int:
    return pieces[-1].start + pieces[-1].nbytes if pieces else 0


def _on_pages(num_bytes: int) -> Tensor:
    """Return a buffer of bytes that has the memory pages it lies on to itself, as registering needs."""
    buffer = torch.empty(num_bytes + 2 * PAGE, dtype=torch.uint8)
    start = -buffer.data_ptr() % PAGE
    return buffer[start : start + num_bytes]


def _unregister(buffer: Tensor, device: torch.device) -> None:
    if int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())):
        _clear_error(device)


def _clear_error(device: torch.device) -> None:
    """Let CUDA report the error of a refused call, for which it would blame the next kernel that is launched."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
