"""Weights that are compressed on the device too: a block's are decoded before its call, for all passes through it."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.dfloat11 import WORK_BYTES, Decode, decode
from ..ops.packed import Packed
from ..ops.proof import PROBE, verdict

log = logging.getLogger(__name__)

KERNEL = "dfloat11_decode"


class Unpack:
    """A `BlockHook` that decodes what is packed in a block into one buffer, which all blocks share in turn.

    It comes after the hook that brings a block's weights. The buffer is made when the first block needs it. Layers that
    are not of ours take their weights in `dtype`.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._packed = [[part for part in block.modules() if isinstance(part, Packed)] for block in blocks]
        self.size = max((sum(part.count for part in packed) for packed in self._packed), default=0)
        self._buffer: Tensor | None = None
        self._decode: Decode = decode
        if self.size and device.type == "cuda":
            self._decode = _proven(device)

    @property
    def nbytes(self) -> int:
        """How many bytes the decoded weights of a block take at most, and decoding them."""
        copies = 0
        if self.dtype != torch.bfloat16:
            copies = max(sum(part.num_foreign for part in packed) for packed in self._packed) * self.dtype.itemsize
        return self.size * torch.bfloat16.itemsize + copies + WORK_BYTES if self.size else 0

    @property
    def held_bytes(self) -> int:
        """How many bytes are taken now."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def before(self, i: int) -> None:
        """Give the layers of block i their weights."""
        if not self._packed[i]:
            return
        if self._buffer is None:
            self._buffer = torch.empty(self.size, dtype=torch.bfloat16, device=self.device)
        counts = [part.count for part in self._packed[i]]
        for part, out in zip(self._packed[i], self._buffer[: sum(counts)].split(counts), strict=True):
            part.unpack(out, self.dtype, self._decode)

    def after(self, i: int) -> None:
        """Take them away again."""
        for part in self._packed[i]:
            part.leave()

    def close(self) -> None:
        """Leave all blocks without weights, also one whose call broke off, and let go of the buffer."""
        for i in range(len(self._packed)):
            self.after(i)
        self._buffer = None


def _proven(device: torch.device) -> Decode:
    """Return the kernel if it gives what plain PyTorch does on this card, else that; and say why."""
    found = verdict(KERNEL, PROBE, torch.bfloat16, device)
    if found.kernel is None:
        log.warning("DFloat11 weights are decoded by plain PyTorch, which is slow: %s.", found.reason)
        return decode
    return found.kernel
