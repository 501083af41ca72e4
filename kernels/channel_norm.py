"""The VAE's channel norm and SiLU, from a tensor of any strides to a part of another, such as a convolution's window.

One program takes some positions with all of their channels. Where channels lie last, as the VAE keeps them, each
position is one piece of memory.
"""
# B batch, C channels, T frames, H W spatial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import options_for, rounded

SMALLEST = 1e-12  # length of a channel vector
BLOCK_NUMBERS = 4096  # of a program


def norm_silu_into(x_BCTHW: Tensor, weight: Tensor, out_BCTHW: Tensor) -> Tensor:
    """Write `silu(channel_norm(x, weight))` into a tensor of x's shape and return it; see `core.ops.norm`."""
    if x_BCTHW.is_meta or not x_BCTHW.numel():
        return out_BCTHW
    if out_BCTHW.shape != x_BCTHW.shape:
        raise ValueError(f"the result is {tuple(out_BCTHW.shape)}, the input {tuple(x_BCTHW.shape)}")
    batch, channels, frames, height, width = x_BCTHW.shape
    num = batch * frames * height * width
    block_channels = triton.next_power_of_2(channels)
    block_positions = max(1, BLOCK_NUMBERS // block_channels)
    with torch.cuda.device_of(x_BCTHW):
        _kernel[(triton.cdiv(num, block_positions),)](
            x_BCTHW, *x_BCTHW.stride(), weight.reshape(-1), out_BCTHW, *out_BCTHW.stride(),
            num, frames, height, width, channels**0.5, max(SMALLEST, torch.finfo(x_BCTHW.dtype).tiny),
            CHANNELS=channels, BLOCK_POSITIONS=block_positions, BLOCK_CHANNELS=block_channels,
            **options_for(block_positions * block_channels),
        )  # fmt: skip
    return out_BCTHW


@triton.jit
def _kernel(
    x_ptr, x_batch, x_channel, x_frame, x_row, x_column,
    weight_ptr,
    out_ptr, out_batch, out_channel, out_frame, out_row, out_column,
    num, frames, height, width, root, smallest,
    CHANNELS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)  # divided in 32 bits, which is faster
    channel = tl.arange(0, BLOCK_CHANNELS)
    inside = (position < num)[:, None] & (channel < CHANNELS)[None, :]
    column, rest = position % width, position // width
    row, rest = rest % height, rest // height
    frame, batch = (rest % frames).to(tl.int64), (rest // frames).to(tl.int64)
    row, column = row.to(tl.int64), column.to(tl.int64)
    x_at = batch * x_batch + frame * x_frame + row * x_row + column * x_column
    out_at = batch * out_batch + frame * out_frame + row * out_row + column * out_column
    x_at = x_at[:, None] + (channel.to(tl.int64) * x_channel)[None, :]
    out_at = out_at[:, None] + (channel.to(tl.int64) * out_channel)[None, :]
    x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), smallest)
    weight = tl.load(weight_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32) * root
    normed = x / length[:, None] * weight[None, :]
    activated = rounded(normed / (1.0 + tl.exp(-normed)), out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at, activated, mask=inside)
