"""DFloat11: bf16 weights whose exponents are Huffman-coded, and how they become bf16 again, bit for bit.

How the parts of a group lie in a file is in `core.dfloat11`. Its exponents are codes of at most 32 bits, the first bit
of a byte being the highest; sign and mantissa have a byte per weight of their own.
"""
# n weights of a group, W windows, S sections, R tables of 256 entries

from collections.abc import Callable

import torch
from torch import Tensor

from ..dfloat11 import (
    GAP_BITS,
    LONGEST_CODE,
    POINTERS,
    SECTION_BYTES,
    SECTION_WINDOWS,
    TABLE,
    WINDOW_BITS,
    WINDOW_BYTES,
)

Decode = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # `decode`, and what takes its place

ROOT_BITS = 16  # of a code that are looked up at once
SECTIONS_AT_ONCE = 64  # that are decoded together: what is made on the way stays in a processor's cache
WORK_BYTES = SECTIONS_AT_ONCE * SECTION_WINDOWS * (9 * 8 + WINDOW_BITS)  # that this takes at most, without a kernel


def decode(
    encoded_exponent: Tensor, sign_mantissa: Tensor, luts: Tensor, output_positions: Tensor, gaps: Tensor, out: Tensor
) -> Tensor:
    """Write the n weights of a group into `out` [n] in bf16, and return it. The planes are U8 and on one device.

    The next code of all windows of some sections is decoded at a time. Raises ValueError for streams that end too
    early; what else is wrong with a damaged one gives wrong weights.
    """
    if out.is_meta:  # where memory is counted and nothing decoded
        torch.empty(WORK_BYTES, dtype=torch.uint8, device=out.device)
        return out
    positions = output_positions.clone().view(torch.int32).cpu().long() & 0xFFFFFFFF
    places, root, words = positions.tolist(), _root(luts), _Tables(luts)
    sections, total = len(places) - 1, sign_mantissa.numel()
    if places[-1] != total or places[0] != 0 or places != sorted(places):
        raise ValueError(f"a DFloat11 stream of {total} weights says that it ends at {places[-1]}: download it again")
    for first in range(0, sections, SECTIONS_AT_ONCE):
        last = min(first + SECTIONS_AT_ONCE, sections)
        part = encoded_exponent[first * SECTION_BYTES : last * SECTION_BYTES + 16]
        num_gap_bytes = SECTION_WINDOWS * GAP_BITS // 8
        starts = _starts(gaps[first * num_gap_bytes : last * num_gap_bytes])
        exponents = _exponents(part, starts, root, words)
        begin, end = places[first], places[last]
        if len(exponents) < end - begin:
            raise ValueError(f"a DFloat11 stream of {total} weights has codes for fewer: download it again")
        rest = sign_mantissa[begin:end].short()
        bits = ((rest & 0x80) << 8) | (exponents[: end - begin].short() << 7) | (rest & 0x7F)
        out[begin:end] = bits.view(torch.bfloat16)
    return out


class _Tables:
    """A group's tables, for codes that are longer than what is looked up at once."""

    def __init__(self, luts: Tensor):
        self.entries, self.lengths = luts[:-1].reshape(-1).int(), luts[-1].int()

    def find(self, code: Tensor, num_bytes: int = LONGEST_CODE // 8) -> tuple[Tensor, Tensor]:
        """Return exponent and length of codes that begin in the highest of 32 bits, as int64; looked up by their bytes.

        Where more of these than `num_bytes` are needed, the length is 0.
        """
        entry = torch.full_like(code, TABLE)  # which points to table 0
        for k in range(num_bytes):
            at = (TABLE - entry).clamp_(0, len(self.entries) // TABLE - 1) * TABLE + ((code >> (24 - 8 * k)) & 0xFF)
            entry = torch.where(entry >= POINTERS, self.entries[at].long(), entry)
        length = self.lengths[entry].clamp(1, LONGEST_CODE).long()
        return entry & 0xFF, torch.where(entry >= POINTERS, 0, length)


def _root(luts: Tensor) -> Tensor:
    """Return for all beginnings of codes `length << 8 | exponent`, with length 0 for those that need more bits."""
    starts = torch.arange(1 << ROOT_BITS, device=luts.device)
    exponent, length = _Tables(luts).find(starts << (LONGEST_CODE - ROOT_BITS), ROOT_BITS // 8)
    return torch.where(length > 0, (length << 8) | exponent, 0).int()


def _starts(gaps: Tensor) -> Tensor:
    """Return the place of the first code in each window, of whole sections, from packed 5-bit numbers."""
    eight = torch.zeros(len(gaps) // GAP_BITS, dtype=torch.int64, device=gaps.device)
    for column in gaps.view(-1, GAP_BITS).unbind(1):
        eight = (eight << 8) | column
    return torch.stack([(eight >> (GAP_BITS * (7 - k))) & 31 for k in range(8)], dim=1).flatten()


def _exponents(part: Tensor, starts: Tensor, root: Tensor, tables: _Tables) -> Tensor:
    """Return the exponents whose codes begin in windows [W], in order; what the padding at the end seems to be too."""
    num_windows = len(starts)
    needed = num_windows * WINDOW_BYTES + 16
    padded = torch.cat((part, part.new_zeros(max(0, needed - len(part))))).int()
    # At each byte the 24 bits from there on: enough for what is looked up at once, wherever in the byte it begins.
    words = (padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]
    at = torch.arange(num_windows, dtype=torch.int32, device=part.device) * WINDOW_BITS
    end, at = at + WINDOW_BITS, at + starts.int()
    found, active = [], []
    while bool((is_in := at < end).any()):
        here = torch.where(is_in, at, 0)
        bits = (words.index_select(0, here >> 3) >> (24 - ROOT_BITS - (here & 7))) & ((1 << ROOT_BITS) - 1)
        entry = root.index_select(0, bits)
        if len(longer := (entry == 0).nonzero().flatten()):
            place = here[longer]
            byte = (place >> 3).long()
            code = (words[byte].long() << 24) | words[byte + 3].long()
            exponent, length = tables.find((code >> (16 - (place & 7))) & 0xFFFFFFFF)
            entry[longer] = ((length.clamp(min=1) << 8) | exponent).int()
        found.append(entry.to(torch.uint8))
        active.append(is_in)
        at = torch.where(is_in, at + (entry >> 8), at)
    return torch.stack(found, dim=1).masked_select(torch.stack(active, dim=1))
