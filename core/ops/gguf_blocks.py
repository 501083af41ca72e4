"""The block formats of GGUF files: how a few numbers with a scale of their own become float32.

Source: the public format (ggml-common.h and ggml-quants.c of llama.cpp). The order of the float32 operations is that of
the reference, so that every result is the reference's, bit for bit.
"""
# N blocks, B bytes of a block; all functions take [N, B] of uint8 and give float32 [N, numbers of a block]

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from ..storage import PACKINGS

# What the 4 bits of the IQ4 formats stand for: a scale that is finer near zero.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
ELEMENTS_AT_ONCE = 1 << 22  # of a weight that are in float32 while it is unpacked


def _q4_0(blocks_NB: Tensor) -> Tensor:
    d, quants = _half(blocks_NB, 0), _fields(blocks_NB[:, 2:], 16, 4)
    return d * (quants.float() - 8)


def _q4_1(blocks_NB: Tensor) -> Tensor:
    d, low, quants = _half(blocks_NB, 0), _half(blocks_NB, 2), _fields(blocks_NB[:, 4:], 16, 4)
    return d * quants.float() + low


def _q5_0(blocks_NB: Tensor) -> Tensor:
    d, fifth, quants = _half(blocks_NB, 0), _fields(blocks_NB[:, 2:6], 1, 1), _fields(blocks_NB[:, 6:], 16, 4)
    return d * ((quants | fifth << 4).float() - 16)


def _q5_1(blocks_NB: Tensor) -> Tensor:
    d, low = _half(blocks_NB, 0), _half(blocks_NB, 2)
    fifth, quants = _fields(blocks_NB[:, 4:8], 1, 1), _fields(blocks_NB[:, 8:], 16, 4)
    return d * (quants | fifth << 4).float() + low


def _q8_0(blocks_NB: Tensor) -> Tensor:
    return blocks_NB[:, 2:].view(torch.int8).float() * _half(blocks_NB, 0)


def _q2_k(blocks_NB: Tensor) -> Tensor:
    packed, quants = blocks_NB[:, :16], _fields(blocks_NB[:, 16:80], 32, 2)
    scales = _half(blocks_NB, 80) * (packed & 15).float()
    lows = _half(blocks_NB, 82) * (packed >> 4).float()
    return _by_part(quants.float(), scales, lows)


def _q3_k(blocks_NB: Tensor) -> Tensor:
    third, quants = _fields(blocks_NB[:, :32], 32, 1), _fields(blocks_NB[:, 32:96], 32, 2)
    scales = _fields(blocks_NB[:, 96:104], 8, 4) | _fields(blocks_NB[:, 104:108], 4, 2) << 4
    # Without its third bit a number is 4 less.
    return _by_part(quants.float() - (third ^ 1).float() * 4, _half(blocks_NB, 108) * (scales.float() - 32))


def _q4_k(blocks_NB: Tensor) -> Tensor:
    return _by_part(_fields(blocks_NB[:, 16:], 32, 4).float(), *_scales_and_lows(blocks_NB))


def _q5_k(blocks_NB: Tensor) -> Tensor:
    fifth, quants = _fields(blocks_NB[:, 16:48], 32, 1), _fields(blocks_NB[:, 48:], 32, 4)
    return _by_part((quants | fifth << 4).float(), *_scales_and_lows(blocks_NB))


def _q6_k(blocks_NB: Tensor) -> Tensor:
    quants, upper = _fields(blocks_NB[:, :128], 64, 4), _fields(blocks_NB[:, 128:192], 32, 2)
    scales = blocks_NB[:, 192:208].view(torch.int8).float()
    return _by_part((quants | upper << 4).float() - 32, _half(blocks_NB, 208) * scales)


def _iq4_nl(blocks_NB: Tensor) -> Tensor:
    return _half(blocks_NB, 0) * _iq4_values(_fields(blocks_NB[:, 2:], 16, 4))


def _iq4_xs(blocks_NB: Tensor) -> Tensor:
    scales = _fields(blocks_NB[:, 4:8], 1, 4) | _fields(blocks_NB[:, 2:4], 1, 2) << 4
    values = _iq4_values(_fields(blocks_NB[:, 8:], 16, 4))
    return _by_part(values, _half(blocks_NB, 0) * (scales.float() - 32))


# GGUF's name of a format -> the function that unpacks its blocks.
UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


def unpack_blocks(weight: Tensor, stored: str, dtype: torch.dtype) -> Tensor:
    """Return a weight [..., bytes of a row] in blocks of a format as numbers [..., n], rounded to `dtype` once."""
    packing = PACKINGS[stored]
    numbers = weight.shape[-1] // packing.num_bytes * packing.numbers
    rows = weight.reshape(prod(weight.shape[:-1]), weight.shape[-1])

    def part(chosen: slice) -> Tensor:
        blocks = rows[chosen].reshape(-1, packing.num_bytes)
        return UNPACK[stored](blocks).view(len(rows[chosen]), numbers)

    return in_parts(part, (len(rows), numbers), dtype, weight.device).view(*weight.shape[:-1], numbers)


def in_parts(
    part: Callable[[slice], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a tensor made of `part(some rows)` in float32, of so few rows at a time that these are small beside it."""
    out = torch.empty(shape, dtype=dtype, device=device)
    size = max(1, ELEMENTS_AT_ONCE // max(1, prod(shape[1:])))
    for first in range(0, shape[0], size):
        rows = slice(first, first + size)
        out[rows] = part(rows)
    return out


def _half(blocks_NB: Tensor, at: int) -> Tensor:
    """Return the 16-bit float at this byte of every block, [N, 1]."""
    # A copy: the bytes of a file may begin at an odd place, from where PyTorch views no halves.
    return blocks_NB[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _fields(packed_NB: Tensor, width: int, bits: int) -> Tensor:
    """Return the fields of `bits` that bytes are made of, one byte each.

    Of every `width` bytes come first the lowest fields of all, then the next higher ones.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed_NB.device)[:, None]
    groups = packed_NB.reshape(len(packed_NB), packed_NB.shape[1] // width, 1, width)
    return ((groups >> shifts) & ((1 << bits) - 1)).flatten(1)


def _by_part(quants: Tensor, scales: Tensor, lows: Tensor | None = None) -> Tensor:
    """Return numbers times the scales, less the lows, of the equal parts that a block is made of."""
    parts = quants.view(*scales.shape, quants.shape[1] // scales.shape[1])
    scaled = scales[..., None] * parts
    return (scaled if lows is None else scaled - lows[..., None]).flatten(1)


def _scales_and_lows(blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and the lows [N, 8] of Q4_K and Q5_K, whose 6 bits each lie in 12 bytes.

    The first four of either have a byte's lower six bits; the others four bits elsewhere, and these bytes' upper two.
    """
    scales, lows, rest = blocks_NB[:, 4:8], blocks_NB[:, 8:12], blocks_NB[:, 12:16]
    scales = torch.cat((scales & 63, (rest & 15) | ((scales >> 2) & 48)), 1)
    lows = torch.cat((lows & 63, (rest >> 4) | ((lows >> 2) & 48)), 1)
    return _half(blocks_NB, 0) * scales.float(), _half(blocks_NB, 2) * lows.float()


def _iq4_values(quants: Tensor) -> Tensor:
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=quants.device)
    return values.index_select(0, quants.flatten().int()).view(quants.shape)
