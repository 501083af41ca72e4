"""What a causal network remembers of a clip between chunks, and exact ways to have less of it on the device."""
# B batch, C channels, T frames, H W spatial

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import host

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEMode:
    """One way of a clip through a causal VAE. All give the same numbers, but for the order of sums in floating point.

    The layers that see all frames of the clip, those of the highest resolutions, take `fine_frames` at a time, or a
    whole chunk where it is None. With `is_offloaded` what a layer remembers is in RAM between its uses. With `is_exact`
    every layer is done in plain PyTorch as the published code writes it: what other spellings are measured against. In
    16 bits they round sums of weights too.
    """

    name: str
    fine_frames: int | None = None
    is_offloaded: bool = False
    is_exact: bool = False


# In the order in which to try them: each takes less memory than the one before, and more time.
MODES = (
    VAEMode(name="whole"),
    VAEMode(name="split", fine_frames=1),
    VAEMode(name="offloaded", is_offloaded=True),
    VAEMode(name="smallest", fine_frames=1, is_offloaded=True),
)
WHOLE, SPLIT, OFFLOADED, SMALLEST = MODES
EXACT = VAEMode(name="exact", is_exact=True)


def modes_on(device: torch.device) -> tuple[VAEMode, ...]:
    """Return the modes that save memory on a device, in order: what is offloaded stays where it is if that is RAM."""
    return tuple(mode for mode in MODES if not (mode.is_offloaded and host.shares_ram(device)))


class Past:
    """The last frames that each layer saw, keyed by the layer: what a causal layer needs of the chunks before.

    With `single` no chunk follows the first one, so nothing is kept: of a still that would be every layer's input.
    """

    def __init__(self, *, single: bool = False, mode: VAEMode = WHOLE) -> None:
        self.single, self.mode = single, mode
        self._kept: dict[nn.Module, Tensor | Offloaded] = {}
        self._rooms: dict[nn.Module, Tensor | None] = {}  # RAM of layers that keep nothing just now

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._kept

    def recall(self, layer: nn.Module, into: Tensor) -> Tensor:
        """Move what is kept of a layer to the end of `into` [B, C, n, H, W], zeros before it; return `into`."""
        kept = self._kept.pop(layer, None)
        known = 0 if kept is None else kept.shape[2]
        into[:, :, : into.shape[2] - known].zero_()
        if isinstance(kept, Offloaded):
            self._rooms[layer] = kept.write(into[:, :, into.shape[2] - known :])
        elif kept is not None:
            into[:, :, into.shape[2] - known :].copy_(kept)
        return into

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep a copy of frames [B, C, 0..n, H, W], so that the chunk they are a view of can be freed."""
        if self.single:
            return
        if not self.mode.is_offloaded:
            self._kept[layer] = frames.clone()
        else:
            self._kept[layer] = Offloaded(frames, self._rooms.pop(layer, None))


class Offloaded:
    """A copy of a tensor in RAM, in `room` if that fits. Of a tensor on the meta device, which holds nothing, a shape.

    Nobody waits for copies from and to pinned memory: the compute stream does them in the order they are asked for,
    so that a room can be written again while it is still to be read.
    """

    def __init__(self, tensor: Tensor, room: Tensor | None = None) -> None:
        self.shape, self._room = tensor.shape, None
        if not tensor.is_meta:
            self._room = room if room is not None and _lies_like(room, tensor) else _room_for(tensor)
            self._room.copy_(tensor, non_blocking=self._room.is_pinned())

    def write(self, into: Tensor) -> Tensor | None:
        """Write the copy into a tensor of its shape and return the room, which is free from then on."""
        if self._room is not None:
            into.copy_(self._room, non_blocking=self._room.is_pinned())
        return self._room


def _lies_like(room: Tensor, tensor: Tensor) -> bool:
    """Say whether one copy of all bytes fills the room; others go through memory in between, and make the CPU wait."""
    strides = zip(room.shape, room.stride(), tensor.stride(), strict=True)
    return room.shape == tensor.shape and all(one == other for size, one, other in strides if size > 1)


def _room_for(tensor: Tensor) -> Tensor:
    """Return RAM for a tensor, pinned for CUDA where the system allows it."""
    if tensor.is_cuda:
        try:
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError as error:
            if not host.is_out_of_memory(error):
                raise
            log.debug("no pinned memory for %d MB: %s", tensor.nbytes >> 20, error)
    return torch.empty_like(tensor, device="cpu")
