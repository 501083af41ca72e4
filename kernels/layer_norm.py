"""LayerNorm of rows with weight and bias; before it a branch may be added to the rows, gated or not.

One program takes one row and holds it in registers: it is read once and written once, and the variance is taken of what
the mean leaves, in a second pass that reads no memory. Rows of 16,384 numbers are 32 for each thread of 16 warps.
"""
# B batch, L rows, E width

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import options_for, rounded, rows_of, vectors_of

LayerConstants = tuple[Tensor, Tensor, float]  # weight and bias, [E] or [B or 1, 1, E], and epsilon


def layer_norm(x_BLE: Tensor, constants: LayerConstants, dtype: torch.dtype) -> Tensor:
    """Return `LN(x) * weight + bias` in `dtype`; see `core.ops.norm.layer_norm`."""
    out = torch.empty(x_BLE.shape, dtype=dtype, device=x_BLE.device)
    _launch(x_BLE, None, None, constants, out)
    return out


def add_norm(
    x_BLE: Tensor,
    rows: slice,
    branch_BLE: Tensor,
    gate_B1E: Tensor | None,
    constants: LayerConstants,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return x, with the branch added to some of its rows in place, and those rows normed; see `core.ops.rows`."""
    out = torch.empty(branch_BLE.shape, dtype=dtype, device=x_BLE.device)
    _launch(x_BLE[:, rows], branch_BLE, gate_B1E, constants, out)
    return x_BLE, out


def add_to_rows(x_BLE: Tensor, rows: slice, branch_BLE: Tensor, gate_B1E: Tensor | None = None) -> Tensor:
    """Return x, with the branch added to some of its rows in place; see `core.ops.rows`."""
    _launch(x_BLE[:, rows], branch_BLE, gate_B1E, None, None)
    return x_BLE


def _launch(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, constants: LayerConstants | None, out: Tensor | None
) -> None:
    if x.is_meta or not x.numel():
        return
    batch, length, width = x.shape
    x, *x_strides = rows_of(x)
    branch, *branch_strides = (x, 0, 0) if branch is None else rows_of(branch)
    gate_rows, gate_stride = (x, 0) if gate is None else vectors_of(gate, batch)
    (weight, weight_stride), (bias, bias_stride) = (
        ((x, 0), (x, 0)) if constants is None else (vectors_of(vector, batch) for vector in constants[:2])
    )
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _kernel[(length, batch)](
            *(x, *x_strides, branch, *branch_strides, gate_rows, gate_stride),
            *(weight, weight_stride, bias, bias_stride),
            *((x, 0, 0) if out is None else rows_of(out)),
            1.0 if constants is None else constants[2],
            WIDTH=width, BLOCK=block, ADDS=branch is not x, GATED=gate is not None, NORMS=constants is not None,
            **options_for(block),
        )  # fmt: skip


@triton.jit
def _kernel(
    x_ptr, x_batch, x_row,
    branch_ptr, branch_batch, branch_row,
    gate_ptr, gate_batch,
    weight_ptr, weight_batch,
    bias_ptr, bias_batch,
    out_ptr, out_batch, out_row,
    eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, GATED: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x_at = x_ptr + batch * x_batch + row * x_row + column
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        branch = tl.load(branch_ptr + batch * branch_batch + row * branch_row + column, mask=inside, other=0.0)
        branch = branch.to(tl.float32)
        if GATED:
            branch *= tl.load(gate_ptr + batch * gate_batch + column, mask=inside, other=0.0).to(tl.float32)
        x += branch
        tl.store(x_at, rounded(x, x_ptr.dtype.element_ty), mask=inside)
    if NORMS:
        centred = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
        variance = tl.sum(centred * centred, axis=0) / WIDTH
        weight = tl.load(weight_ptr + batch * weight_batch + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + batch * bias_batch + column, mask=inside, other=0.0).to(tl.float32)
        normed = centred * (1.0 / tl.sqrt(variance + eps)) * weight + bias
        tl.store(
            out_ptr + batch * out_batch + row * out_row + column, rounded(normed, out_ptr.dtype.element_ty), mask=inside
        )
