"""Attention with q and k in int8, a scale for each row, and the products with v in its own dtype.

One program takes some queries of one head and goes through all keys once, with a running maximum and sum of the softmax
(Dao et al. 2022, "FlashAttention"). In int8 a score is one of exact sums, so that only the rounding of q and k shows;
keys have their mean over tokens taken away before (Zhang et al. 2024, "SageAttention"): a part that all keys share
raises all scores of a query alike, and without it steps are finer.
"""
# B batch, L query tokens, S key tokens, N heads, D head width, W the width in memory

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import IS_INTERPRETED, rounded

LARGEST, SMALLEST_SCALE = 127.0, 1e-12
LEAST_WIDTH = 32  # that the matrix units take of int8
ROWS = 64  # of a program that rounds
# Of a program that attends: 8 warps hold the results of 128 queries of 128 numbers in 64 registers a thread, and more
# keys at once would spill. Three tiles of keys on their way fit the shared memory of all cards. What is summed is no
# sum that eager code rounds in the same places, so that products and sums may be one.
QUERIES, KEYS = 128, 64
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
LOG2_E = math.log2(math.e)
MULTIPLIES_IN_FLOAT32 = tl.constexpr(IS_INTERPRETED)  # Triton's interpreter takes the bits of bfloat16 for integers


def attention_int8(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, key_bias_BS: Tensor | None = None) -> Tensor:
    """Return attention as B L N D in the dtype of q; see `core.ops.attention`."""
    batch, length, heads, width = q_BLND.shape
    num_keys = k_BSND.shape[1]
    k_BSND, v_BSND = (t.expand(batch, -1, -1, -1) for t in (k_BSND, v_BSND))
    mean_BND = k_BSND.mean(1, dtype=torch.float32)
    # What is added to scores, in units of log2 as they are themselves.
    bias = None if key_bias_BS is None else (key_bias_BS.float() * LOG2_E).expand(batch, num_keys)
    q, q_scale = _rounded_rows(q_BLND, None, LOG2_E / math.sqrt(width))
    k, k_scale = _rounded_rows(k_BSND, mean_BND, 1.0)
    out = torch.empty((batch, length, heads, width), dtype=q_BLND.dtype, device=q_BLND.device)
    if out.is_meta or not out.numel():
        return out
    if v_BSND.stride(-1) != 1:
        raise ValueError(f"the numbers of a head must lie side by side; strides of v are {v_BSND.stride()}")
    with torch.cuda.device_of(out):
        _attend_kernel[(triton.cdiv(length, QUERIES), batch * heads)](
            q, q_scale, k, k_scale, v_BSND, *v_BSND.stride()[:3], q_scale if bias is None else bias,
            0 if bias is None else bias.stride(0), out, *out.stride()[:3], length, num_keys, heads,
            WIDTH=width, BLOCK_WIDTH=q.shape[-1], BLOCK_QUERIES=QUERIES, BLOCK_KEYS=KEYS, HAS_BIAS=bias is not None,
            **OPTIONS,
        )  # fmt: skip
    return out


def _rounded_rows(x_BLND: Tensor, mean_BND: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    """Return rows of heads in int8 [B, N, L, W], filled up with zeros, and their scales [B, N, L] times a factor."""
    batch, length, heads, width = x_BLND.shape
    block_width = max(LEAST_WIDTH, triton.next_power_of_2(width))
    out = torch.empty((batch, heads, length, block_width), dtype=torch.int8, device=x_BLND.device)
    scale = torch.empty((batch, heads, length), device=x_BLND.device)
    if out.is_meta or not out.numel():
        return out, scale
    if x_BLND.stride(-1) != 1:
        raise ValueError(f"the numbers of a head must lie side by side; strides are {x_BLND.stride()}")
    with torch.cuda.device_of(out):
        _round_kernel[(triton.cdiv(length, ROWS), batch * heads)](
            x_BLND, *x_BLND.stride()[:3], scale if mean_BND is None else mean_BND, out, scale,
            length, heads, factor, LARGEST, SMALLEST_SCALE,
            WIDTH=width, BLOCK_WIDTH=block_width, BLOCK=ROWS, HAS_MEAN=mean_BND is not None,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out, scale


@triton.jit
def _round_kernel(
    x_ptr, x_batch, x_row, x_head,
    mean_ptr, out_ptr, scale_ptr,
    length, heads, factor, largest, smallest,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    row, slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = (row < length)[:, None] & (column < WIDTH)[None, :]
    begin = (slot // heads) * x_batch + (slot % heads) * x_head
    x = tl.load(x_ptr + begin + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        mean = tl.load(mean_ptr + slot * WIDTH + column, mask=column < WIDTH, other=0.0)
        x = tl.where(inside, x - mean[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1) / largest, smallest)
    x = (x / scale[:, None] + 12582912.0) - 12582912.0  # 1.5 * 2**23: what is left is a whole number, ties to even
    place = slot * length + row
    tl.store(scale_ptr + place, scale * factor, mask=row < length)
    tl.store(
        out_ptr + place[:, None] * BLOCK_WIDTH + column[None, :],
        tl.minimum(tl.maximum(x, -largest), largest).to(tl.int8),
        mask=(row < length)[:, None],
    )


@triton.jit
def _attend_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr,
    v_ptr, v_batch, v_row, v_head,
    bias_ptr, bias_batch,
    out_ptr, out_batch, out_row, out_head,
    length, num_keys, heads,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1).to(tl.int64)
    batch, head = slot // heads, slot % heads
    row = tl.program_id(0).to(tl.int64) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    column = tl.arange(0, BLOCK_WIDTH)
    is_row = row < length
    place = slot * length + row
    q = tl.load(q_ptr + place[:, None] * BLOCK_WIDTH + column[None, :], mask=is_row[:, None], other=0)
    q_scale = tl.load(q_scale_ptr + place, mask=is_row, other=0.0)
    k_ptr += slot * num_keys * BLOCK_WIDTH
    k_scale_ptr += slot * num_keys
    v_ptr += batch * v_batch + head * v_head
    bias_ptr += batch * bias_batch
    most = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    gathered = tl.zeros([BLOCK_QUERIES, BLOCK_WIDTH], tl.float32)
    # All whole tiles of keys without a look at where they end, then the rest.
    whole = num_keys // BLOCK_KEYS * BLOCK_KEYS
    for first in range(0, whole, BLOCK_KEYS):
        most, total, gathered = _tile(
            q, q_scale, k_ptr, k_scale_ptr, v_ptr, v_row, bias_ptr, first, num_keys, most, total, gathered,
            WIDTH, BLOCK_WIDTH, BLOCK_KEYS, HAS_BIAS, False,
        )  # fmt: skip
    if whole < num_keys:
        most, total, gathered = _tile(
            q, q_scale, k_ptr, k_scale_ptr, v_ptr, v_row, bias_ptr, whole, num_keys, most, total, gathered,
            WIDTH, BLOCK_WIDTH, BLOCK_KEYS, HAS_BIAS, True,
        )  # fmt: skip
    result = gathered / total[:, None]
    out = out_ptr + batch * out_batch + head * out_head + row[:, None] * out_row + column[None, :]
    mask = is_row[:, None] & (column < WIDTH)[None, :]
    tl.store(out, rounded(result, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(
    q, q_scale,
    k_ptr, k_scale_ptr,
    v_ptr, v_row,
    bias_ptr,
    first, num_keys,
    most, total, gathered,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_REST: tl.constexpr,
):  # fmt: skip
    """Return the running maximum, sum and result with some more keys in them."""
    key, column = first + tl.arange(0, BLOCK_KEYS), tl.arange(0, BLOCK_WIDTH)
    is_key = key < num_keys
    k_place = k_ptr + key[None, :].to(tl.int64) * BLOCK_WIDTH + column[:, None]
    v_place = v_ptr + key[:, None].to(tl.int64) * v_row + column[None, :]
    if IS_REST:
        k = tl.load(k_place, mask=is_key[None, :], other=0)
        k_scale = tl.load(k_scale_ptr + key, mask=is_key, other=0.0)
    else:
        k = tl.load(k_place)
        k_scale = tl.load(k_scale_ptr + key)
    scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * q_scale[:, None] * k_scale[None, :]
    if HAS_BIAS:
        scores += tl.load(bias_ptr + key, mask=is_key, other=0.0)[None, :]
    if IS_REST:
        scores = tl.where(is_key[None, :], scores, float("-inf"))
    new_most = tl.maximum(most, tl.max(scores, axis=1))
    # Where all keys so far are hidden there is no maximum to take away.
    base = tl.where(new_most == float("-inf"), 0.0, new_most) if HAS_BIAS else new_most
    weights = tl.exp2(scores - base[:, None])
    fading = tl.exp2(most - base)
    total = total * fading + tl.sum(weights, axis=1)
    if IS_REST or WIDTH < BLOCK_WIDTH:
        v = tl.load(v_place, mask=is_key[:, None] & (column < WIDTH)[None, :], other=0.0)
    else:
        v = tl.load(v_place)
    weights = rounded(weights, v.dtype)
    if MULTIPLIES_IN_FLOAT32:
        weights, v = weights.to(tl.float32), v.to(tl.float32)
    gathered = tl.dot(weights, v, gathered * fading[:, None])
    return new_most, total, gathered
