"""RAM that copies to a CUDA device can run from by themselves: registered exactly, never rounded up."""

import contextlib
import mmap
import weakref
from types import ModuleType

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE  # bytes
LARGE_PAGE = 2 << 20  # bytes: Linux on x86-64, and on ARM with pages of 4 KiB


class HostBuffer:
    """A buffer of bytes in RAM that has the memory pages it lies on to itself, as registering needs.

    `bytes` is the buffer, uint8. PyTorch's own pinned memory would round its size up to a power of two. Raises
    RuntimeError, as PyTorch does, where the system has not the RAM.
    """

    def __init__(self, num_bytes: int):
        self.bytes = _fresh(num_bytes)
        self._unpin: weakref.finalize | None = None

    @property
    def is_pinned(self) -> bool:
        """Say whether the buffer is registered."""
        return self._unpin is not None

    def pin(self, device: torch.device) -> bool:
        """Register the buffer with CUDA and say whether that worked; it ends with the buffer, or with `unpin`."""
        if self.is_pinned:
            return True
        size = -(-self.bytes.numel() // PAGE) * PAGE
        cuda = torch.cuda.cudart()
        if int(cuda.cudaHostRegister(self.bytes.data_ptr(), size, 0)):
            _clear_error(device)
            return False
        self._unpin = weakref.finalize(self, _unregister, cuda, self.bytes, device)
        self._unpin.atexit = False
        return True

    def unpin(self) -> None:
        """Let the system move the pages again; every copy from them must be done."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None


def _fresh(num_bytes: int) -> Tensor:
    """Return memory from the beginning of a page on, in the system's large pages to the end where it has them.

    Handing out a slab in pages of 4 KiB takes the system several times as long as reading the slab's file.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux has it
        return _within(torch.empty(num_bytes + 2 * PAGE, dtype=torch.uint8), num_bytes, PAGE)
    try:
        memory = mmap.mmap(-1, num_bytes + 2 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(f"can't allocate memory: {num_bytes} bytes of RAM") from error
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return _within(torch.frombuffer(memory, dtype=torch.uint8), num_bytes, LARGE_PAGE)


def _within(whole: Tensor, num_bytes: int, page: int) -> Tensor:
    """Return so many bytes of memory, which has two pages more, from its first whole page on."""
    start = -whole.data_ptr() % page
    return whole[start : start + num_bytes]


def _unregister(cuda: ModuleType, buffer: Tensor, device: torch.device) -> None:
    if int(cuda.cudaHostUnregister(buffer.data_ptr())):
        _clear_error(device)


def _clear_error(device: torch.device) -> None:
    """Let CUDA report the error of a refused call, for which it would blame the next kernel that is launched."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
