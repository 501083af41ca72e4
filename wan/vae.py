"""The Wan 2.1 video VAE (the image VAE of Qwen-Image as well), streamed over time. Official parameter names."""
# B batch, F pixel frames (4n + 1), T latent frames, H W pixels, h w latent positions (H/8, W/8)

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..core.memory.trace import peak_bytes
from ..core.past import WHOLE, Past, VAEMode
from ..core.types import LatentFormat
from .config import LATENT_CHANNELS, VAEConfig
from .vae_layers import AttentionBlock, CausalConv3d, ChannelNorm, Downsample, ResidualBlock, Upsample

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# After a clip's first chunk of one frame, and one more, every layer remembers all that it ever does.
STEADY_CHUNKS = 3

# Per latent channel; source: wan/modules/vae.py of the official repository. Qwen-Image's VAE has the same.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
LATENT_FORMAT = LatentFormat(
    channels=LATENT_CHANNELS,
    spatial_factor=8,
    temporal_factor=4,
    mean=LATENT_MEAN,
    std=LATENT_STD,
    comfy_name="Wan21",
    tiny_decoders=("taew2_1", "lighttaew2_1"),
)


class Encoder(nn.Module):
    """Pixels to latent statistics, 8 times smaller in space and 4 times in time."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(config.channels, widths[0], 3)
        layers: list[nn.Module] = []
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            layers += [ResidualBlock(narrow if n == 0 else wide, wide) for n in range(config.num_res_blocks)]
            if level < len(config.dim_mult) - 1:
                layers.append(Downsample(wide, config.temporal_downsample[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * config.z_dim)
        timed = [i for i, layer in enumerate(layers) if hasattr(layer, "time_conv")]
        self._num_fine = timed[0] if timed else len(layers)  # the layers from the front that see every frame

    def forward(self, x: Tensor, past: Past) -> Tensor:
        layers = [self.conv1, *self.downsamples, *self.middle, partial(_finish, self.head)]
        return _run(layers, slice(0, 1 + self._num_fine), x, past)


class Decoder(nn.Module):
    """Latents to pixels; time is doubled at the two lowest resolutions."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        temporal = config.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3)
        self.middle = _middle(widths[0])
        layers: list[nn.Module] = []
        for level, (last, width) in enumerate(pairwise(widths)):
            incoming = last // 2 if level > 0 else last  # the upsampler of the level before halved it
            layers += [ResidualBlock(incoming if n == 0 else width, width) for n in range(config.num_res_blocks + 1)]
            if level < len(config.dim_mult) - 1:
                layers.append(Upsample(width, temporal[level]))
        self.upsamples = nn.ModuleList(layers)
        self.head = _head(widths[-1], config.channels)
        timed = [i for i, layer in enumerate(layers) if hasattr(layer, "time_conv")]
        self._num_coarse = timed[-1] + 1 if timed else 0  # the layers behind these see every frame

    def forward(self, x: Tensor, past: Past) -> Tensor:
        layers = [self.conv1, *self.middle, *self.upsamples, partial(_finish, self.head)]
        return _run(layers, slice(1 + len(self.middle) + self._num_coarse, len(layers)), x, past)


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)])


def _head(width: int, out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": ChannelNorm(width, 4), "2": CausalConv3d(width, out, 3)})


def _finish(head: nn.ModuleDict, x: Tensor, past: Past) -> Tensor:
    return head["2"].slide(head["2"].window(x, past, head["0"]), past)


def _run(layers: Sequence[Callable[[Tensor, Past], Tensor]], fine: slice, x: Tensor, past: Past) -> Tensor:
    """Pass a chunk through causal layers, through the `fine` ones as few frames at a time as the mode says.

    One function, so that nobody but the layer at work holds what went into it.
    """
    for layer in layers[: fine.start]:
        x = layer(x, past)
    is_split = past.mode.fine_frames is not None and not past.single
    parts, done = list(x.split(past.mode.fine_frames, dim=2)) if is_split else [x], []
    while parts:
        x = parts.pop(0)
        for layer in layers[fine]:
            x = layer(x, past)
        done.append(x)
    x = torch.cat(done, dim=2) if len(done) > 1 else done[0]
    del done
    for layer in layers[fine.stop :]:
        x = layer(x, past)
    return x


class WanVAE(nn.Module):
    """The network alone: raw latents (mu, not normalised) in and out, whole clips or chunks of them."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def channels_last(self) -> "WanVAE":
        """Store every convolution channels last, the order that CPUs and tensor cores want; no number changes.

        No parameter is left in its file, so that what is done to those that `VideoCodec.get_sd` hands out is no harm.
        """
        for parameter in self.parameters():
            order = CHANNELS_LAST.get(parameter.dim(), torch.contiguous_format)
            parameter.data = parameter.data.clone(memory_format=order)
        return self

    @property
    def channels(self) -> int:
        """Numbers in a pixel: 3, or 4 with alpha."""
        return self.config.channels

    def new_past(self, *, single: bool = False, mode: VAEMode = WHOLE) -> Past:
        """Return the memory of a clip that starts now; `single` says that its first chunk is all of it."""
        return Past(single=single, mode=mode)

    def encode_chunk(self, pixels: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance [B, z, T, h, w] of the next frames: 1 + 4n at first, 4n after, in [-1, 1]."""
        pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
        return self.conv1(self.encoder(pixels, past), past).chunk(2, dim=1)

    def decode_chunk(self, latent: Tensor, past: Past) -> Tensor:
        """Return the pixels of the next latent frames: 1 + 4(n - 1) at first, 4n after; not clamped."""
        latent = latent.contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(self.conv2(latent, past), past)

    def decode_bytes(self, height: int, width: int, frames: int, mode: VAEMode) -> int:
        """Return the bytes beside the weights, on the device, that decoding `frames` pixel frames needs."""
        return decode_bytes(self.config, self.conv2.weight.dtype, height, width, frames, mode)

    def encode_bytes(self, height: int, width: int, frames: int, mode: VAEMode) -> int:
        """Return the bytes beside the weights, on the device, that encoding `frames` pixel frames needs."""
        return encode_bytes(self.config, self.conv2.weight.dtype, height, width, frames, mode)


def decode_bytes(
    config: VAEConfig, dtype: torch.dtype, height: int, width: int, frames: int, mode: VAEMode = WHOLE
) -> int:
    """Return the bytes beside the weights, on the device, that decoding `frames` frames of height x width pixels takes.

    One latent frame at a time; one frame is a still. Counted by doing it on the meta device, where nothing is computed.
    """
    return _traced("decode", config, dtype, height, width, min(_chunks(config, frames), STEADY_CHUNKS), mode)


def weight_bytes(config: VAEConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the weights."""
    return sum(parameter.nbytes for parameter in _on_meta(config, dtype).parameters())


def encode_bytes(
    config: VAEConfig, dtype: torch.dtype, height: int, width: int, frames: int, mode: VAEMode = WHOLE
) -> int:
    """Return the same for encoding: the first frame, then as many at a time as make one latent frame."""
    return _traced("encode", config, dtype, height, width, min(_chunks(config, frames), STEADY_CHUNKS), mode)


def _chunks(config: VAEConfig, frames: int) -> int:
    return 1 + (frames - 1) // 2 ** sum(config.temporal_downsample)


@lru_cache(maxsize=256)
def _traced(
    work: str, config: VAEConfig, dtype: torch.dtype, height: int, width: int, num_chunks: int, mode: VAEMode
) -> int:
    network = _on_meta(config, dtype)
    space, time = 2 ** (len(config.dim_mult) - 1), 2 ** sum(config.temporal_downsample)

    def call() -> None:
        past = network.new_past(single=num_chunks == 1, mode=mode)
        for i in range(num_chunks):
            if work == "decode":
                shape = (1, config.z_dim, 1, height // space, width // space)
                network.decode_chunk(torch.empty(shape, dtype=dtype, device="meta"), past)
            else:
                shape = (1, config.channels, 1 if i == 0 else time, height, width)
                network.encode_chunk(torch.empty(shape, dtype=dtype, device="meta"), past)

    with torch.inference_mode(False):  # it hides tensors from the count
        return peak_bytes(call)


@lru_cache(maxsize=4)
def _on_meta(config: VAEConfig, dtype: torch.dtype) -> WanVAE:
    with torch.inference_mode(False), torch.device("meta"):
        return WanVAE(config).to(dtype).channels_last().requires_grad_(False)
