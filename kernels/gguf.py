"""Blocks of GGUF files to floating point numbers; the formats are those of `core.ops.gguf_blocks`, to the last bit.

One program takes some blocks, each as a tile [parts with a scale of their own, numbers of a part]. Bytes are read one
by one, as blocks begin at odd places, and a half is put together of two. Products and sums are rounded one by one.
"""
# N blocks

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import options_for, rounded

# Name of a format -> parts of a block, numbers of a part, bytes of a block.
FORMATS = {"Q8_0": (1, 32, 34), "Q6_K": (16, 16, 210), "Q5_K": (8, 32, 176), "Q4_K": (8, 32, 144)}
BLOCK_NUMBERS = 2048  # of a program


def unpack_blocks(weight: Tensor, stored: str, dtype: torch.dtype) -> Tensor:
    """Return a weight [..., bytes of a row] as numbers [..., n] in `dtype`; see `core.ops.gguf_blocks`."""
    parts, length, num_bytes = FORMATS[stored]
    numbers = parts * length
    out = torch.empty((*weight.shape[:-1], weight.shape[-1] // num_bytes * numbers), dtype=dtype, device=weight.device)
    if out.is_meta or not out.numel():
        return out
    num, blocks = prod(out.shape) // numbers, BLOCK_NUMBERS // numbers
    with torch.cuda.device_of(weight):
        _kernel[(triton.cdiv(num, blocks),)](
            weight.contiguous(), out, num,
            FORMAT=stored, PARTS=parts, LENGTH=length, NUM_BYTES=num_bytes, BLOCKS=blocks, **options_for(BLOCK_NUMBERS),
        )  # fmt: skip
    return out


@triton.jit
def _half(at, inside):
    low = tl.load(at, mask=inside, other=0).to(tl.uint16)
    high = tl.load(at + 1, mask=inside, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _byte(at, inside):
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _signed(byte):
    return ((byte ^ 128) - 128).to(tl.float32)


@triton.jit
def _kernel(
    in_ptr, out_ptr, num,
    FORMAT: tl.constexpr, PARTS: tl.constexpr, LENGTH: tl.constexpr, NUM_BYTES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    part, inside = tl.arange(0, PARTS)[None, :], block < num
    start = in_ptr + block * NUM_BYTES
    one = tl.arange(0, LENGTH)[None, None, :]
    everywhere, of_part = inside[:, :, None], (inside & (part >= 0))
    begin, place = start[:, :, None], part[:, :, None]
    if FORMAT == "Q8_0":
        scale = _half(start + part * 0, of_part)
        number = _signed(_byte(begin + 2 + place + one, everywhere))
        result = number * scale[:, :, None]
    elif FORMAT == "Q6_K":
        at = place * LENGTH + one
        group, within = at // 128, at % 128
        low = _byte(begin + group * 64 + within % 64, everywhere) >> (within // 64 * 4)
        high = _byte(begin + 128 + group * 32 + within % 32, everywhere) >> (within // 32 * 2)
        number = ((low & 15) | ((high & 3) << 4)).to(tl.float32) - 32.0
        scale = _half(start + 208 + part * 0, of_part) * _signed(_byte(start + 192 + part, of_part))
        result = scale[:, :, None] * number
    else:
        # Six bits each of eight scales and lows: four lie as they are, the others' upper two bits with these.
        early, which = part < 4, part % 4
        first, second = _byte(start + 4 + which, of_part), _byte(start + 8 + which, of_part)
        third = _byte(start + 12 + which, of_part)
        scale = tl.where(early, first & 63, (third & 15) | ((first >> 2) & 48)).to(tl.float32)
        low = tl.where(early, second & 63, (third >> 4) | ((second >> 2) & 48)).to(tl.float32)
        scale = _half(start + part * 0, of_part) * scale
        low = _half(start + 2 + part * 0, of_part) * low
        quants: tl.constexpr = 48 if FORMAT == "Q5_K" else 16
        number = (_byte(begin + quants + place // 2 * 32 + one, everywhere) >> (place % 2 * 4)) & 15
        if FORMAT == "Q5_K":
            number |= ((_byte(begin + 16 + one + place * 0, everywhere) >> place) & 1) << 4
        result = scale[:, :, None] * number.to(tl.float32) - low[:, :, None]
    out_at = out_ptr + block[:, :, None] * (PARTS * LENGTH) + place * LENGTH + one
    tl.store(out_at, rounded(result, out_ptr.dtype.element_ty), mask=everywhere & (one >= 0) & (place >= 0))
