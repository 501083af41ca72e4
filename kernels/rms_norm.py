"""RMSNorm of whole rows or of each head, and the rotation of its result, written to where attention reads it.

One program takes one token: its row is a tile [groups, width of a group], one group for a norm over the whole row, one
for each head otherwise. Rotated pairs lie side by side, so that splitting them moves nothing between threads.
"""
# B batch, L tokens, E width of all heads, N heads, D head width, P = D/2 rotated pairs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import options_for, rounded, rows_of

RmsConstants = tuple[Tensor, float]  # weight, of a row [E] or of each head [D], and epsilon


def rms_norm(x_BLE: Tensor, constants: RmsConstants, dtype: torch.dtype) -> Tensor:
    """Return `x / rms(x) * weight` of rows in `dtype`; see `core.ops.norm.rms_norm`."""
    out = torch.empty(x_BLE.shape, dtype=dtype, device=x_BLE.device)
    _launch(x_BLE, constants, None, out, x_BLE.shape[-1])
    return out


def norm_rotate(x_BLE: Tensor, constants: RmsConstants, rope: tuple[Tensor, Tensor], out_BLND: Tensor) -> None:
    """Write rows, normed and rotated by their tokens' angles, to `out`, which may be x; see `core.ops.rope`."""
    if out_BLND.stride(-2) != out_BLND.shape[-1]:
        raise ValueError(f"heads must lie side by side; the strides of the result are {out_BLND.stride()}")
    _launch(x_BLE, constants, rope, out_BLND.flatten(2), out_BLND.shape[-1])


def _launch(x: Tensor, constants: RmsConstants, rope: tuple[Tensor, Tensor] | None, out: Tensor, head: int) -> None:
    if x.is_meta or not x.numel():
        return
    weight, eps = constants
    batch, length, all_heads = x.shape
    width = weight.numel()
    cos, sin = (table.contiguous() for table in rope) if rope else (x, x)
    block_groups, block_width = triton.next_power_of_2(all_heads // width), triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _kernel[(length, batch)](
            *rows_of(x), weight.contiguous(), cos, sin, *rows_of(out), eps,
            GROUPS=all_heads // width, WIDTH=width, HEAD=head, BLOCK_GROUPS=block_groups, BLOCK_WIDTH=block_width,
            ROTATES=rope is not None, **options_for(block_groups * block_width),
        )  # fmt: skip


@triton.jit
def _kernel(
    x_ptr, x_batch, x_row,
    weight_ptr,
    cos_ptr, sin_ptr,
    out_ptr, out_batch, out_row,
    eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    group, column = tl.arange(0, BLOCK_GROUPS)[:, None], tl.arange(0, BLOCK_WIDTH)
    inside = (group < GROUPS) & (column < WIDTH)[None, :]
    place = group * WIDTH + column[None, :]
    x = tl.load(x_ptr + batch * x_batch + row * x_row + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    x = x * scale[:, None] * weight[None, :]
    if ROTATES:
        pair = tl.arange(0, BLOCK_WIDTH // 2)
        angle = row * (HEAD // 2) + pair % (HEAD // 2)
        cos = tl.load(cos_ptr + angle, mask=pair < WIDTH // 2, other=0.0)[None, :]
        sin = tl.load(sin_ptr + angle, mask=pair < WIDTH // 2, other=0.0)[None, :]
        even, odd = tl.split(tl.reshape(x, (BLOCK_GROUPS, BLOCK_WIDTH // 2, 2)))
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK_GROUPS, BLOCK_WIDTH))
    tl.store(out_ptr + batch * out_batch + row * out_row + place, rounded(x, out_ptr.dtype.element_ty), mask=inside)
