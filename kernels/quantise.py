"""Rows, or their GELU (tanh form), in 8 bits with a scale for each row.

One program takes one row and holds it in registers while its largest number is found, so it is read once.
"""
# B batch, L rows, E width

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import options_for, rounded, rows_of

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = 1e-12  # of rows of zeros


def rows_int8(x_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows in int8, and scales [B, L, 1]; see `core.ops.eight_bits`."""
    return _launch(x_BLE, torch.int8, has_gelu=False)


def rows_float8(x_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows in float8 (e4m3), and scales [B, L, 1]; see `core.ops.eight_bits`."""
    return _launch(x_BLE, torch.float8_e4m3fn, has_gelu=False)


def gelu_int8(x_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows' GELU in int8, and scales [B, L, 1]; see `core.ops.eight_bits`."""
    return _launch(x_BLE, torch.int8, has_gelu=True)


def gelu_float8(x_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows' GELU in float8 (e4m3), and scales [B, L, 1]; see `core.ops.eight_bits`."""
    return _launch(x_BLE, torch.float8_e4m3fn, has_gelu=True)


def _launch(x_BLE: Tensor, dtype: torch.dtype, has_gelu: bool) -> tuple[Tensor, Tensor]:
    batch, length, width = x_BLE.shape
    out = torch.empty(x_BLE.shape, dtype=dtype, device=x_BLE.device)
    scale = torch.empty(batch, length, 1, device=x_BLE.device)
    if out.is_meta or not out.numel():
        return out, scale
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x_BLE):
        _kernel[(length, batch)](
            *rows_of(x_BLE), *rows_of(out), scale, length, LARGEST[dtype], SMALLEST_SCALE,
            WIDTH=width, BLOCK=block, IS_INTEGER=dtype == torch.int8, HAS_GELU=has_gelu, **options_for(block),
        )  # fmt: skip
    return out, scale


@triton.jit
def _kernel(
    x_ptr, x_batch, x_row,
    out_ptr, out_batch, out_row,
    scale_ptr, length, largest, smallest,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_INTEGER: tl.constexpr, HAS_GELU: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + batch * x_batch + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_GELU:
        # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)).
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / largest, smallest)
    tl.store(scale_ptr + batch * length + row, scale)
    scaled = tl.minimum(tl.maximum(x / scale, -largest), largest)
    if IS_INTEGER:
        scaled = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2**23: what is left is a whole number, ties to even
    tl.store(
        out_ptr + batch * out_batch + row * out_row + column, rounded(scaled, out_ptr.dtype.element_ty), mask=inside
    )
