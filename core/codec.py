"""Pixels to latents and back through a causal video VAE, streamed over time.

When memory is short, first in one of the exact modes that take less of it, then tiled in space, which is not exact.

The object also answers to the names that ComfyUI's own VAE nodes call, so it plugs into any VAE socket.
"""
# B batch, F pixel frames, T latent frames, H W pixels, h w latent positions

import gc
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import host
from .memory import kept
from .memory.placement import headroom_of
from .memory.resident import resident
from .memory.slab import tensors
from .past import WHOLE, VAEMode, modes_on
from .tiles import Tile, TileSize, cut
from .types import LatentFormat

log = logging.getLogger(__name__)

DEFAULT_TILE = TileSize(32, 32, 8)  # 256 x 256 pixels, 64 shared
MIN_TILE = 8  # latent positions; below that a tile is mostly border


class CausalVAE(Protocol):
    """A network that takes a clip in chunks; `new_past()` starts a clip, and chunks of any length continue it.

    A pixel has `channels` numbers. With `single` one chunk is all of the clip. `decode_bytes` and `encode_bytes` tell
    what a clip of so many pixels and frames takes on the device beside the weights, given to the network as the codec
    does: one latent frame at a time.
    """

    channels: int

    def new_past(self, *, single: bool = False, mode: VAEMode = WHOLE) -> Any: ...

    def encode_chunk(self, pixels: Tensor, past: Any) -> tuple[Tensor, Tensor]: ...

    def decode_chunk(self, latent: Tensor, past: Any) -> Tensor: ...

    def decode_bytes(self, height: int, width: int, frames: int, mode: VAEMode) -> int: ...

    def encode_bytes(self, height: int, width: int, frames: int, mode: VAEMode) -> int: ...


Needed = Callable[[CausalVAE, int, int, VAEMode], int]  # height and width in pixels, mode -> bytes


class VideoCodec:
    """Encode and decode with one VAE. Latents are raw, as a LATENT of ComfyUI holds them; pixels [0, 1], channels last.

    A pixel is RGB, or RGB and alpha, as the network has it. `load` gives the network on the CPU and is called on first
    use. Memory in use does not grow with the number of frames: a chunk is computed on the device and written to its
    place on the CPU.
    """

    latent_dim = 3  # T h w; ComfyUI's word for a video VAE

    def __init__(
        self,
        load: Callable[[], nn.Module],
        latent_format: LatentFormat,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        self._load, self._network, self.is_in_use = load, None, False
        kept.remember(self)
        self.latent_format, self.dtype, self._device = latent_format, dtype, device
        self.latent_channels = latent_format.channels
        time, space = latent_format.temporal_factor, latent_format.spatial_factor
        self.downscale_ratio = (lambda frames: max(0, (frames + time - 1) // time), space, space)
        self.upscale_ratio = (lambda frames: max(0, frames * time - (time - 1)), space, space)
        self.downscale_index_formula = self.upscale_index_formula = (time, space, space)

    @property
    def device(self) -> torch.device:
        """Where the VAE computes."""
        return self._device or host.device()

    @property
    def first_stage_model(self) -> nn.Module:
        """The network itself, loaded on first use."""
        if self._network is None:
            self._network = self._load().to(self.dtype).eval().requires_grad_(False)
        return self._network

    @property
    def kept_bytes(self) -> int:
        """How much RAM the network takes."""
        return 0 if self._network is None else sum(tensor.nbytes for *_, tensor in tensors(self._network))

    def let_go(self, nbytes: float = math.inf) -> None:
        """Drop the network, whole however little is wanted; the next use reads it again. Never during one."""
        assert not self.is_in_use
        self._network = None

    @property
    def output_channels(self) -> int:
        """Numbers in a pixel: 3, or 4 with alpha (ComfyUI's word). The weights are read to tell."""
        return self.first_stage_model.channels

    def decode(self, latent: Tensor, *, tile: TileSize | None = None, mode: VAEMode | None = None) -> Tensor:
        """Return pixels [B, F, H, W, 3 or 4] in [0, 1] on the CPU for raw latents [B, C, T, h, w] (or [B, C, h, w]).

        In the first mode that the device has memory for, or in `mode`; in whole frames unless `tile` says otherwise or
        no mode fits; time is never cut. Raises ValueError for latents of another model and for latents that hold NaN
        or infinity.
        """
        latent = self._checked_latent(latent)
        if latent.dim() == 5 and latent.shape[2] > 1 and self.output_channels == 4:
            # The frames of the layered model's latents are pictures of their own, not a clip.
            layers = [self.decode(layer, tile=tile, mode=mode) for layer in latent.split(1, dim=2)]
            return torch.cat(layers, dim=1)
        if latent.dim() == 4:
            return self.decode(latent[:, :, None], tile=tile, mode=mode)[:, 0]
        space = self.latent_format.spatial_factor
        count, _, frames, height, width = latent.shape
        out_frames = self.upscale_ratio[0](frames)
        out = torch.zeros(count, out_frames, height * space, width * space, self.output_channels)

        def run(network: CausalVAE, tile: TileSize, mode: VAEMode) -> None:
            out.zero_()
            for clip, pixels in zip(latent, out, strict=True):
                for part in cut(height, width, tile, space):
                    past = network.new_past(single=frames == 1, mode=mode)
                    self._decode_tile(network, past, clip[None, :, :, part.rows, part.columns], pixels, part)

        def needed(network: CausalVAE, height: int, width: int, mode: VAEMode) -> int:
            return network.decode_bytes(height, width, out_frames, mode)

        self._within_memory(run, needed, (height, width), tile, mode)
        return out

    def encode(self, pixels: Tensor, *, tile: TileSize | None = None, mode: VAEMode | None = None) -> Tensor:
        """Return raw latents [1, C, T, h, w] in float32 on the CPU for one clip [F, H, W, 3 or 4] in [0, 1].

        [B, F, H, W, 3 or 4] gives one latent per clip. A VAE of RGB drops alpha, which the log says; one of RGB and
        alpha takes RGB as opaque. F must be 4n + 1, sizes multiples of 8; what does not fit is cut off
        (the last frames, the borders evenly), and the log says so. `tile` and `mode` are as in `decode`.
        """
        if pixels.dim() == 5:
            return torch.cat([self.encode(clip, tile=tile, mode=mode) for clip in pixels])
        pixels = self._fitted_pixels(pixels)
        pixels = _with_channels(pixels, self.output_channels)
        space, time = self.latent_format.spatial_factor, self.latent_format.temporal_factor
        frames, height, width = pixels.shape[0], pixels.shape[1] // space, pixels.shape[2] // space
        out = torch.zeros(1, self.latent_channels, self.downscale_ratio[0](frames), height, width)

        def run(network: CausalVAE, tile: TileSize, mode: VAEMode) -> None:
            out.zero_()
            for part in cut(height, width, tile, 1):
                rows, columns = (slice(s.start * space, s.stop * space) for s in (part.rows, part.columns))
                weight = part.weight_y[:, None] * part.weight_x
                past, done = network.new_past(single=frames == 1, mode=mode), 0
                for chunk in pixels[:, rows, columns].split([1] + [time] * ((frames - 1) // time)):
                    host.check_interrupt()
                    moved = chunk.movedim(-1, 0)[None].to(self.device, self.dtype) * 2 - 1
                    mean = network.encode_chunk(moved, past)[0].cpu().float()
                    out[:, :, done : done + mean.shape[2], part.rows, part.columns] += mean * weight
                    done += mean.shape[2]

        def needed(network: CausalVAE, height: int, width: int, mode: VAEMode) -> int:
            return network.encode_bytes(height, width, frames, mode)

        self._within_memory(run, needed, (height, width), tile, mode)
        return out

    def _decode_tile(self, network: CausalVAE, past: Any, latent: Tensor, pixels_FHWC: Tensor, part: Tile) -> None:
        space = self.latent_format.spatial_factor
        rows, columns = (slice(s.start * space, s.stop * space) for s in (part.rows, part.columns))
        weight, done = (part.weight_y[:, None] * part.weight_x)[..., None], 0
        # The first latent frame is one pixel frame and stands alone: it takes the cheap path of a still.
        for chunk in latent.split(1, dim=2):
            host.check_interrupt()
            decoded = network.decode_chunk(chunk.to(self.device, self.dtype), past)[0].cpu()
            shown = decoded.float().add_(1).div_(2).clamp_(0, 1).movedim(0, -1)
            pixels_FHWC[done : done + shown.shape[0], rows, columns] += shown.mul_(weight)
            done += shown.shape[0]

    def _within_memory(
        self,
        run: Callable[[CausalVAE, TileSize, VAEMode], None],
        needed: Needed,
        size: tuple[int, int],
        tile: TileSize | None,
        mode: VAEMode | None,
    ) -> None:
        """Run in the first way that there is memory for; where it runs out all the same, in the next one."""
        self.is_in_use = True
        try:
            self._run_first_that_fits(run, needed, size, tile, mode)
        finally:
            self.is_in_use = False
            kept.show()

    def _run_first_that_fits(
        self,
        run: Callable[[CausalVAE, TileSize, VAEMode], None],
        needed: Needed,
        size: tuple[int, int],
        tile: TileSize | None,
        mode: VAEMode | None,
    ) -> None:
        whole = host.whole_float32(self.device)
        with whole, torch.inference_mode(), resident(self.first_stage_model, self.device) as network:
            ways = self._ways(lambda height, width, mode: needed(network, height, width, mode), size, tile, mode)
            way = next(ways)
            while True:
                try:
                    return run(network, *way)
                except RuntimeError as error:
                    if not host.is_out_of_memory(error):
                        raise
                    way = next(ways, None)
                    if way is None:
                        raise
                # Outside the except block, so that the failed attempt's tensors are let go first.
                gc.collect()
                host.empty_cache()
                log.warning(
                    "VAE: out of memory, trying again in mode %s with tiles of %d x %d latents",
                    way[1].name, way[0].height, way[0].width,
                )  # fmt: skip

    def _ways(
        self,
        needed: Callable[[int, int, VAEMode], int],
        size: tuple[int, int],
        tile: TileSize | None,
        mode: VAEMode | None,
    ) -> Iterator[tuple[TileSize, VAEMode]]:
        """Yield ways to try: modes from the first that fits, or from `mode`, then ever smaller tiles."""
        given = tile or TileSize(max(2, size[0]), max(2, size[1]), 0)
        space = self.latent_format.spatial_factor
        height, width = (min(side) * space for side in zip(size, (given.height, given.width), strict=True))
        modes, is_found, least = _from(mode, modes_on(self.device)), mode is not None, math.inf
        most = needed(height, width, modes[0])
        if mode is None and most > host.available_ram():  # what is not on the device is there
            modes = tuple(each for each in modes if not each.is_offloaded)
        headroom = headroom_of(host.driver_spills())
        host.make_room(most + headroom, self.device)
        free = host.free_memory(self.device)
        for each in modes:
            nbytes = needed(height, width, each)
            is_found = is_found or nbytes + headroom <= free
            if is_found and nbytes < least:  # some modes are the same to a still
                if each != WHOLE:
                    log.info("VAE: mode %s, %.1f GB of %.1f GB free", each.name, nbytes / 1e9, free / 1e9)
                yield given, each
            least = min(least, nbytes)
        if not is_found:
            log.warning("VAE: %.1f GB are needed and %.1f GB are free; using tiles", least / 1e9, free / 1e9)
            if tile is not None or not _is_large(given):
                yield given, modes[-1]
        while max(given.height, given.width) > MIN_TILE:
            given = DEFAULT_TILE if _is_large(given) else given.halved()
            yield given, mode or WHOLE

    def _checked_latent(self, latent: Tensor) -> Tensor:
        if latent.dim() not in (4, 5) or latent.shape[1] != self.latent_channels:
            raise ValueError(
                f"VAE decode: got a latent of shape {tuple(latent.shape)}; this VAE takes "
                f"[batch, {self.latent_channels}, frames, height/8, width/8]. Was it made for another model? "
                "Use the VAE that belongs to the sampler's model."
            )
        if not torch.isfinite(latent).all():
            raise ValueError(
                "VAE decode: the latent holds NaN or infinite values, so there is no picture in it. The sampler before "
                "it broke down: lower guidance or shift, or load the model in bf16 or fp32 instead of fp16."
            )
        return latent

    def _fitted_pixels(self, pixels: Tensor) -> Tensor:
        if pixels.dim() != 4 or pixels.shape[-1] not in (3, 4):
            raise ValueError(f"VAE encode: expected images [frames, height, width, 3 or 4], got {tuple(pixels.shape)}")
        space, time = self.latent_format.spatial_factor, self.latent_format.temporal_factor
        frames, height, width = pixels.shape[:3]
        kept = (frames - (frames - 1) % time, height - height % space, width - width % space)
        if kept[1] == 0 or kept[2] == 0:
            raise ValueError(
                f"VAE encode: images of {width} x {height} are smaller than one latent position of {space}"
            )
        if kept != (frames, height, width):
            log.warning("VAE encode: %d frames of %d x %d cut to %d of %d x %d (frames 4n + 1, sizes multiples of %d)",
                        frames, width, height, kept[0], kept[2], kept[1], space)  # fmt: skip
        top, left = (height - kept[1]) // 2, (width - kept[2]) // 2
        return pixels[: kept[0], top : top + kept[1], left : left + kept[2]]

    # What ComfyUI's own nodes call besides encode and decode. Sizes of tiles come in as they give them.

    def decode_tiled(
        self, samples: Tensor, tile_x: int = 32, tile_y: int = 32, overlap: int = 8, tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Decode in tiles of `tile_x` x `tile_y` latent positions. Time is whole whatever `tile_t` says."""
        return self.decode(samples, tile=TileSize(max(2, tile_y), max(2, tile_x), overlap))

    def encode_tiled(
        self, pixel_samples: Tensor, tile_x: int = 256, tile_y: int = 256, overlap: int = 64, tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Encode in tiles of `tile_x` x `tile_y` pixels. `tile_t` and `overlap_t` are not used: time is whole."""
        space = self.latent_format.spatial_factor
        return self.encode(
            pixel_samples, tile=TileSize(max(2, tile_y // space), max(2, tile_x // space), overlap // space)
        )

    def spacial_compression_decode(self) -> int:
        """Return how many pixels one latent position is wide (ComfyUI's spelling)."""
        return self.latent_format.spatial_factor

    spacial_compression_encode = spacial_compression_decode

    def temporal_compression_decode(self) -> int:
        """Return how many pixel frames one latent frame holds."""
        return self.latent_format.temporal_factor

    def throw_exception_if_invalid(self) -> None:
        """Do nothing: an object of this class always has a loader."""

    def get_sd(self) -> dict[str, Tensor]:
        """Return the state dict in official names."""
        return self.first_stage_model.state_dict()


def _is_large(tile: TileSize) -> bool:
    return tile.height > DEFAULT_TILE.height or tile.width > DEFAULT_TILE.width


def _from(mode: VAEMode | None, modes: tuple[VAEMode, ...]) -> tuple[VAEMode, ...]:
    """Return the modes that begin with one, which need not be among them; all of them for None."""
    if mode is None:
        return modes
    return mode, *(modes[modes.index(mode) + 1 :] if mode in modes else ())


def _with_channels(pixels_FHWC: Tensor, channels: int) -> Tensor:
    """Return pixels of that many channels: without their alpha, or with an opaque one."""
    given = pixels_FHWC.shape[-1]
    if given > channels:
        log.warning("VAE encode: the image has an alpha channel, which this VAE does not take; it is dropped")
        return pixels_FHWC[..., :channels]
    if given < channels:
        return torch.cat((pixels_FHWC, torch.ones_like(pixels_FHWC[..., : channels - given])), dim=-1)
    return pixels_FHWC
