"""Layers of the Wan VAE: causal in time, so that a clip can pass through in chunks of any length.

Every layer with a memory of time takes a `Past`. A fresh Past means that the clip starts with this chunk; the frames
before it count as zeros. Feeding a clip in chunks through one Past equals feeding it whole.
"""
# B batch, C channels, T frames of this chunk, H W spatial

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..core.ops.attention import fused_attention
from ..core.ops.choice import norm_silu_on
from ..core.ops.conv import conv3d, conv3d_in_pairs, doubled_conv2d, halved_conv2d, pairs_pay
from ..core.ops.norm import channel_norm, norm_silu_into
from ..core.past import Past


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
        return self.slide(self.window(x, past), past)

    def window(self, x: Tensor, past: Past, norm: "ChannelNorm | None" = None) -> Tensor:
        """Return what a chunk's results are made of: the remembered frames, then x, or `silu(norm(x))`.

        Of a clip's first frame that is the frame alone: all but the last tap of the kernel would meet zeros.
        """
        if self.kernel[0] == 1 or (x.shape[2] == 1 and self not in past):
            return x if norm is None else norm_silu(norm, x, past)
        return _window(self, self.kernel[0] - 1, x, past, norm)

    def slide(self, frames: Tensor, past: Past) -> Tensor:
        """Convolve a window, and remember the last frames of it."""
        depth, pad = self.kernel[0], (self.kernel[1] // 2, self.kernel[2] // 2)
        if depth > 1 and frames.shape[2] == 1:
            out = F.conv2d(frames[:, :, 0], self.weight[:, :, -1], self.bias, padding=pad).unsqueeze(2)
        elif not _is_exact(past) and pairs_pay(frames, self.weight):
            out = conv3d_in_pairs(frames, self.weight, self.bias)
        else:
            out = conv3d(frames, self.weight, self.bias, padding=(0, *pad))
        if depth > 1:
            past.keep(self, frames[:, :, 1 - depth :])
        return out


def _is_exact(past: Past) -> bool:
    return past.mode.is_exact or torch.is_grad_enabled()


def _window(layer: nn.Module, count: int, x: Tensor, past: Past, norm: "ChannelNorm | None" = None) -> Tensor:
    """Return the `count` frames that a layer remembers, and behind them x, or `silu(norm(x))`, in one tensor."""
    if torch.is_grad_enabled():
        now = x if norm is None else norm_silu(norm, x, past)
        before = now.new_zeros(*now.shape[:2], count, *now.shape[3:])
        return torch.cat((past.recall(layer, before), now), dim=2)
    batch, channels, frames, height, width = x.shape
    # Made at its full length, so that the activated frames need no tensor of their own.
    window = torch.empty(
        (batch, channels, count + frames, height, width),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d,
    )  # fmt: skip
    past.recall(layer, window[:, :, :count])
    now = window[:, :, count:]
    now.copy_(x) if norm is None else norm_silu(norm, x, past, out=now)
    return window


class ChannelNorm(nn.Module):
    """Scale the channel vector of each position to length sqrt(C), times gamma, which is stored with rank `dims`."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * (dims - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma)


def norm_silu(norm: ChannelNorm, x: Tensor, past: Past, out: Tensor | None = None) -> Tensor:
    """Return `silu(norm(x))`, in `out` or one new tensor where no gradient is needed."""
    if torch.is_grad_enabled():
        return F.silu(norm(x))
    write = norm_silu_into if past.mode.is_exact else norm_silu_on(x.device, x.dtype)
    return write(x, norm.gamma, torch.empty_like(x) if out is None else out)


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
        hidden = x
        for norm, name in (("0", "2"), ("3", "6")):
            conv = self.residual[name]
            frames = conv.window(hidden, past, self.residual[norm])
            del hidden  # in the window now; the convolution needs the room
            hidden = conv.slide(frames, past)
            del frames
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
        out = fused_attention(*(t.contiguous() for t in qkv))
        out = self.proj(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[3]))
        out = frames + out if torch.is_grad_enabled() else out.add_(frames)
        return rearrange(out, "(b t) c h w -> b c t h w", t=x.shape[2])


def _per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(out, "(b t) c h w -> b c t h w", t=x.shape[2])


def _resample(
    layers: nn.Sequential, direct: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, past: Past
) -> Tensor:
    """Change the size of each frame by the layers as they are, or by the one step that they come to."""
    conv = layers[1]
    return _per_frame(layers if _is_exact(past) else lambda frames: direct(frames, conv.weight, conv.bias), x)


def _joined(first: Tensor, rest: Tensor) -> Tensor:
    """Return both in one tensor. `torch.cat` keeps channels last only where they are its last dimension."""
    if first.shape[2] == 0:
        return rest
    return torch.cat((first.movedim(1, -1), rest.movedim(1, -1)), dim=1).movedim(-1, 1)


class Downsample(nn.Module):
    """Halve space, and time as well where `temporal`: 1 + 2n frames become 1 + n over the whole clip."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        # Zeros on the right and at the bottom only.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if temporal:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = _resample(self.resample, halved_conv2d, x, past)
        return self._halve_time(x, past) if hasattr(self, "time_conv") else x

    def _halve_time(self, x: Tensor, past: Past) -> Tensor:
        """The clip's first frame passes as it is; frame k of the rest is made of frames 2k-2, 2k-1 and 2k."""
        starts = self not in past
        first = x[:, :, :1] if starts else x[:, :, :0]
        frames = x if starts else _window(self, 1, x, past)
        past.keep(self, x[:, :, -1:])
        if frames.shape[2] < 3:
            return first
        return _joined(first, conv3d(frames, self.time_conv.weight, self.time_conv.bias, stride=(2, 1, 1)))


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
        return _resample(self.resample, doubled_conv2d, x, past)

    def _double_time(self, x: Tensor, past: Past) -> Tensor:
        """The clip's first frame passes as it is and is no part of the others' history."""
        starts = self not in past
        first, rest = (x[:, :, :1], x[:, :, 1:]) if starts else (x[:, :, :0], x)
        if starts:
            past.keep(self, x[:, :, :0])  # a mark that the clip goes on
        if rest.shape[2] == 0:
            return first
        # The two halves of the channels are the even and the odd frames.
        pairs = rearrange(self.time_conv(rest, past), "b (two c) t h w -> b (t two) h w c", two=2)
        return _joined(first, pairs.movedim(-1, 1))
