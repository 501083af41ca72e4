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
    whole chunk where it is None. With `is_offloaded` what a layer remembers is in RAM between its uses.
    """

    name: str
    fine_frames: int | None = None
    is_offloaded: bool = False


# In the order in which to try them: each takes less memory than the one before, and more time.
MODES = (
    VAEMode(name="whole"),
    VAEMode(name="split", fine_frames=1),
    VAEMode(name="offloaded", is_offloaded=True),
    VAEMode(name="smallest", fine_frames=1, is_offloaded=True),
)
WHOLE, SPLIT, OFFLOADED, SMALLEST = MODES


def modes_on(device: torch.device) -> tuple[VAEMode, ...]:
    """Return the modes that save memory on a device, in order: what is offloaded stays where it is if that is RAM."""
    has_own_memory = device.type not in ("cpu", "mps")
    return tuple(mode for mode in MODES if has_own_memory or not mode.is_offloaded)


class Past:
    """The last frames that each layer saw, keyed by the layer: what a causal layer needs of the chunks before.

    With `single` no chunk follows the first one, so nothing is kept: of a still that would be every layer's input.
    """

    def __init__(self, *, single: bool = False, mode: VAEMode = WHOLE) -> None:
        self.single, self.mode = single, mode
        self._kept: dict[nn.Module, Tensor | Offloaded] = {}

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._kept

    def recall(self, layer: nn.Module, into: Tensor) -> Tensor:
        """Move what is kept of a layer to the end of `into` [B, C, n, H, W], zeros before it; return `into`."""
        kept = self._kept.pop(layer, None)
        known = 0 if kept is None else kept.shape[2]
        into[:, :, : into.shape[2] - known].zero_()
        if isinstance(kept, Offloaded):
            kept.write(into[:, :, into.shape[2] - known :])
        elif kept is not None:
            into[:, :, into.shape[2] - known :].copy_(kept)
        return into

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep a copy of frames [B, C, 0..n, H, W], so that the chunk they are a view of can be freed."""
        if not self.single:
            self._kept[layer] = Offloaded(frames) if self.mode.is_offloaded else frames.clone()


class Offloaded:
    """A copy of a tensor in RAM. Of a tensor on the meta device, which holds nothing, only the shape."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self._host = None if tensor.is_meta else _in_ram(tensor)

    def write(self, into: Tensor) -> None:
        """Write the copy into a tensor of its shape.

        The compute stream does this after the copying to RAM, so that nobody has to wait for either.
        """
        if self._host is not None:
            into.copy_(self._host, non_blocking=self._host.is_pinned())


def _in_ram(tensor: Tensor) -> Tensor:
    """Return a copy in RAM, pinned for CUDA where the system allows it. The copying may be under way."""
    if not tensor.is_cuda:
        return torch.empty_like(tensor, device="cpu").copy_(tensor)
    try:
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError as error:
        if not host.is_out_of_memory(error):
            raise
        log.debug("no pinned memory for %d MB: %s", tensor.nbytes >> 20, error)
        return tensor.cpu()
    return pinned.copy_(tensor, non_blocking=True)
