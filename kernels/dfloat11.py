"""DFloat11 to bf16: one program takes a section of the stream, each of its lanes a window.

Every window is decoded twice: first to count its weights, which tells all windows after it where theirs go, then to
write them. The tables are 2 to 4 KB and stay in the cache that is nearest; a code of up to 8 bits, as nearly all are,
takes one look-up. Bytes are put together one by one: swapping those of a word makes Triton abort for newest cards.
"""
# n weights, S sections of 512 windows of 8 bytes

import torch
import triton
import triton.language as tl
from torch import Tensor

WINDOWS = tl.constexpr(512)  # of a section
WINDOW_BITS = tl.constexpr(64)
POINTERS = tl.constexpr(240)  # entries of tables from here on point to another one
NUM_WARPS = 8  # two windows a thread: enough of them to wait for memory, and registers left over for 96 bits each


def dfloat11_decode(
    encoded_exponent: Tensor, sign_mantissa: Tensor, luts: Tensor, output_positions: Tensor, gaps: Tensor, out: Tensor
) -> Tensor:
    """Write the n weights of a group into `out` [n] in bf16, and return it; see `core.ops.dfloat11.decode`."""
    if out.is_meta:
        return out
    if output_positions.data_ptr() % 4:
        output_positions = output_positions.clone()
    positions = output_positions.view(torch.int32)
    with torch.cuda.device_of(out):
        _decode_kernel[(len(positions) - 1,)](
            encoded_exponent, sign_mantissa, luts, positions, gaps, out.view(torch.int16),
            encoded_exponent.numel(), sign_mantissa.numel(), gaps.numel(), luts.shape[0] - 1,
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _take(high, low, count):
    """Return 128 bits, of which the first come first, without the first `count`, at most 32."""
    return (high << count) | ((low >> 1) >> (63 - count)), low << count


@triton.jit
def _find(high, luts_ptr, num_tables):
    """Return exponent and length of the code that begins with the highest bit."""
    entry = tl.load(luts_ptr + (high >> 56).to(tl.int32)).to(tl.int32)
    for level in tl.static_range(1, 4):
        is_pointer = entry >= POINTERS
        table = tl.minimum(256 - entry, num_tables - 1)
        byte = ((high >> (56 - 8 * level)) & 0xFF).to(tl.int32)
        found = tl.load(luts_ptr + table * 256 + byte, mask=is_pointer, other=0).to(tl.int32)
        entry = tl.where(is_pointer, found, entry)
    length = tl.load(luts_ptr + num_tables * 256 + entry).to(tl.int32)
    return entry, tl.minimum(tl.maximum(length, 1), 32)


@triton.jit(do_not_specialize=["num_bytes", "num_weights", "num_gap_bytes", "num_tables"])
def _decode_kernel(
    stream_ptr, rest_ptr, luts_ptr, positions_ptr, gaps_ptr, out_ptr,
    num_bytes, num_weights, num_gap_bytes, num_tables,
):  # fmt: skip
    section = tl.program_id(0).to(tl.int64)
    window = section * WINDOWS + tl.arange(0, WINDOWS)
    first_byte = window * 8
    high = tl.zeros([WINDOWS], dtype=tl.uint64)
    low = tl.zeros([WINDOWS], dtype=tl.uint64)
    for k in tl.static_range(12):
        byte = tl.load(stream_ptr + first_byte + k, mask=first_byte + k < num_bytes, other=0).to(tl.uint64)
        if k < 8:
            high |= byte << (56 - 8 * k)
        else:
            low |= byte << (56 - 8 * (k - 8))
    bit = window * 5
    near = tl.load(gaps_ptr + (bit >> 3)).to(tl.int32)
    far = tl.load(gaps_ptr + (bit >> 3) + 1, mask=(bit >> 3) + 1 < num_gap_bytes, other=0).to(tl.int32)
    gap = (((near << 8) | far) >> (11 - (bit & 7).to(tl.int32))) & 31
    high, low = _take(high, low, gap.to(tl.uint64))

    lengths = tl.load(luts_ptr + num_tables * 256 + tl.arange(0, 256)).to(tl.int32)
    shortest = tl.min(tl.where(lengths > 0, lengths, 32), axis=0)
    most = (WINDOW_BITS + shortest - 1) // shortest

    count = tl.zeros([WINDOWS], dtype=tl.int32)
    place, this, rest = gap, high, low
    for _ in range(most):
        entry, length = _find(this, luts_ptr, num_tables)
        count += (place < WINDOW_BITS).to(tl.int32)
        place += length
        this, rest = _take(this, rest, length.to(tl.uint64))

    begin = tl.load(positions_ptr + section).to(tl.int64) & 0xFFFFFFFF
    end = tl.load(positions_ptr + section + 1).to(tl.int64) & 0xFFFFFFFF
    end = tl.minimum(end, num_weights)
    at = begin + (tl.cumsum(count, axis=0) - count)
    stop = tl.minimum(at + count, end)
    for _ in range(tl.max(count, axis=0)):
        entry, length = _find(high, luts_ptr, num_tables)
        is_in = at < stop
        signs = tl.load(rest_ptr + at, mask=is_in, other=0).to(tl.int32)
        weight = ((signs & 0x80) << 8) | (entry << 7) | (signs & 0x7F)
        tl.store(out_ptr + at, weight.to(tl.int16), mask=is_in)
        at += 1
        high, low = _take(high, low, length.to(tl.uint64))
