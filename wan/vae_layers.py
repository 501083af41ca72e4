"""Layers of the Wan VAE: causal in time, so that a clip can pass through in chunks of any length.

Every layer with a memory of time takes a `Past`. A fresh Past means that the clip starts with this chunk; the frames
before it count as zeros. Feeding a clip in chunks through one Past equals feeding it whole.
"""
# B batch, C channels, T frames of this chunk, H W spatial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..core.ops.conv import conv3d


class Past:
    """The last frames that each layer saw, keyed by the layer: what a causal layer needs of the chunks before.

    With `whole` no chunk follows the first one, so nothing is kept: of a still that would be every layer's input.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._frames: dict[nn.Module, Tensor] = {}
        self._whole = whole

    def get(self, layer: nn.Module) -> Tensor | None:
        """Return the kept frames [B, C, 1..2, H, W], or None where the layer has seen nothing yet."""
        return self._frames.get(layer)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep a copy, so that the chunk it is a view of can be freed."""
        if not self._whole:
            self._frames[layer] = frames.clone()


class CausalConv3d(nn.Module):
    """3-D convolution that sees only the present and the past: zeros in space on all sides, in time in front only."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int]):
        super().__init__()
        self.kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        depth, pad = self.kernel[0], (self.kernel[1] // 2, self.kernel[2] // 2)
        if depth == 1:
            return conv3d(x, self.weight, self.bias, padding=(0, *pad))
        history = past.get(self)
        if history is None and x.shape[2] == 1:  # only the last tap meets anything but zeros
            past.keep(self, x)
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=pad).unsqueeze(2)
        frames = _with_history(history, x, depth - 1)
        past.keep(self, frames[:, :, 1 - depth :])
        return conv3d(frames, self.weight, self.bias, padding=(0, *pad))


def _with_history(history: Tensor | None, x: Tensor, count: int) -> Tensor:
    """Put `count` frames in front of a chunk: those that are known, zeros before them."""
    known = x[:, :, :0] if history is None else history
    zeros = torch.zeros_like(x[:, :, :1]).expand(-1, -1, count - known.shape[2], -1, -1)
    return torch.cat((zeros, known, x), dim=2)


class ChannelNorm(nn.Module):
    """Scale the channel vector of each position to length sqrt(C), times gamma, which is stored with rank `dims`."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * (dims - 1)))

    def forward(self, x: Tensor) -> Tensor:
        smallest = max(1e-12, torch.finfo(x.dtype).tiny)  # 1e-12 is zero in float16
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(smallest)
        scale = self.gamma * self.gamma.shape[0] ** 0.5
        return (x / length) * scale if torch.is_grad_enabled() else (x / length).mul_(scale)


def norm_silu(norm: ChannelNorm, x: Tensor) -> Tensor:
    """Return `silu(norm(x))`, in one new tensor where no gradient is needed."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Two normalised, SiLU-activated causal convolutions beside a shortcut. Keys: residual.{0,2,3,6}, shortcut."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(in_channels, 4),
                "2": CausalConv3d(in_channels, out_channels, 3),
                "3": ChannelNorm(out_channels, 4),
                "6": CausalConv3d(out_channels, out_channels, 3),
            }
        )
        if in_channels != out_channels:
            self.shortcut = CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        hidden = self.residual["2"](norm_silu(self.residual["0"], x), past)
        hidden = self.residual["6"](norm_silu(self.residual["3"], hidden), past)
        shortcut = self.shortcut(x, past) if hasattr(self, "shortcut") else x
        return hidden + shortcut if torch.is_grad_enabled() else hidden.add_(shortcut)


class AttentionBlock(nn.Module):
    """Single-head attention over the positions of each frame on its own."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, 3)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        qkv = rearrange(self.to_qkv(self.norm(frames)), "b (n c) h w -> n b 1 (h w) c", n=3)
        out = F.scaled_dot_product_attention(*(t.contiguous() for t in qkv))
        out = self.proj(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[3]))
        return x + rearrange(out, "(b t) c h w -> b c t h w", t=x.shape[2])


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(out, "(b t) c h w -> b c t h w", t=x.shape[2])


class Downsample(nn.Module):
    """Halve space, and time as well where `temporal`: 1 + 2n frames become 1 + n over the whole clip."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        # Zeros on the right and at the bottom only.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if temporal:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = _per_frame(self.resample, x)
        return self._halve_time(x, past) if hasattr(self, "time_conv") else x

    def _halve_time(self, x: Tensor, past: Past) -> Tensor:
        """The clip's first frame passes as it is; frame k of the rest is made of frames 2k-2, 2k-1 and 2k."""
        last = past.get(self)
        first = x[:, :, :0] if last is not None else x[:, :, :1]
        frames = x if last is None else torch.cat((last, x), dim=2)
        past.keep(self, x[:, :, -1:])
        if frames.shape[2] < 3:
            return first
        return torch.cat((first, conv3d(frames, self.time_conv.weight, self.time_conv.bias, stride=(2, 1, 1))), dim=2)


class Upsample(nn.Module):
    """Double space and halve the channels; double time first where `temporal`: 1 + n frames become 1 + 2n."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        upsample = nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
        self.resample = nn.Sequential(upsample, nn.Conv2d(channels, channels // 2, 3, padding=1))
        if temporal:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if hasattr(self, "time_conv"):
            x = self._double_time(x, past)
        return _per_frame(self.resample, x)

    def _double_time(self, x: Tensor, past: Past) -> Tensor:
        """The clip's first frame passes as it is and is no part of the others' history."""
        starts = past.get(self) is None
        first, rest = (x[:, :, :1], x[:, :, 1:]) if starts else (x[:, :, :0], x)
        if starts:
            past.keep(self, x[:, :, :0])
        if rest.shape[2] == 0:
            return first
        # The two halves of the channels are the even and the odd frames.
        pairs = rearrange(self.time_conv(rest, past), "b (two c) t h w -> b c (t two) h w", two=2)
        return torch.cat((first, pairs), dim=2)
