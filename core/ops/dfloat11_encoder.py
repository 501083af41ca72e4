"""Write DFloat11: bf16 weights to the planes of one group. The format is described in `dfloat11`."""
# n weights, of which two make a pair; m pairs, W windows of 64 bits

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..dfloat11 import GAP_BITS, PLANES, POINTERS, SECTION_WINDOWS, TABLE, WINDOW_BITS, num_sections
from .huffman import END, Code, lengthened, make_code

CHUNK = 1 << 17  # weights that one thread packs at a time: what is made of them stays in a processor's cache
PADDING = 255  # in place of the second exponent of the last pair, where that has none
MOST_WEIGHTS, MOST_BYTES = 1 << 32, 1 << 31  # of a group: what the format's and its decoders' numbers can count
# The official decoder keeps a section's weights in shared memory, beside 2,052 bytes, and asks for no more than the
# 48 KiB of it that every card gives.
MOST_OF_SECTION = (48 * 1024 - 2052) // 2
UNSET = 255  # a gap that is not known


def refusal(weight: Tensor) -> str | None:
    """Return why the format can't hold a tensor, None if it can."""
    if weight.dtype != torch.bfloat16:
        return f"it is {str(weight.dtype).removeprefix('torch.')}, and only bf16 can be compressed"
    if not weight.numel():
        return "it is empty"
    largest = max(int(_exponents(part).max()) for part in _parts(weight))
    if largest == TABLE - 1:
        return "it holds infinite values or NaN"
    return f"it holds values of 2 ** {POINTERS - 127} or more" if largest >= POINTERS else None


def most_bytes(count: int) -> int:
    """Return how long the stream of so many weights can get: a byte for each, and for the end."""
    return count + 1


def encode(weights: Sequence[Tensor], threads: int | None = None) -> dict[str, Tensor]:
    """Return the planes of a group of bf16 tensors, by name, for its weights in this order.

    Takes twice the bytes of the result beside the weights. Raises ValueError for what the format can't hold; ask
    `refusal` of each tensor before.
    """
    total = sum(weight.numel() for weight in weights)
    for weight in weights:
        if reason := refusal(weight):
            raise ValueError(f"a weight {list(weight.shape)} can't be compressed as DFloat11: {reason}")
    if total >= MOST_WEIGHTS:
        raise ValueError(f"{total} weights are too many for one DFloat11 group: divide them")
    exponents = np.full(total + total % 2, PADDING, dtype=np.uint8)
    rest = np.empty(total, dtype=np.uint8)
    at = 0
    for bits in (_bits(part) for weight in weights for part in _parts(weight)):
        here = slice(at, at + len(bits))
        exponents[here], rest[here] = bits >> 7, (bits >> 8 & 0x80) | (bits & 0x7F)
        at += len(bits)
    pairs = exponents.view("<u2")
    chunks = [pairs[k : k + CHUNK // 2] for k in range(0, len(pairs), CHUNK // 2)]
    counts = np.stack([_counts(chunk) for chunk in chunks])
    code, tables = make_code({s: int(n) for s, n in enumerate(counts.sum(0)[:PADDING]) if n})
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        stream, gaps, positions = _packed(chunks, counts, code, total, pool)
        if np.diff(positions).max(initial=0) > MOST_OF_SECTION:
            code, tables = lengthened(code)
            stream, gaps, positions = _packed(chunks, counts, code, total, pool)
    planes = dict(zip(PLANES, (stream, rest, tables, positions.astype("<u4").view(np.uint8), gaps), strict=True))
    return {name: torch.from_numpy(plane) for name, plane in planes.items()}


def _parts(weight: Tensor) -> Iterator[Tensor]:
    return iter(weight.detach().reshape(-1).split(1 << 22))


def _bits(part: Tensor) -> np.ndarray:
    return part.contiguous().view(torch.int16).numpy().view(np.uint16)


def _exponents(part: Tensor) -> np.ndarray:
    return _bits(part) >> 7 & 0xFF


def _counts(pairs: np.ndarray) -> np.ndarray:
    """Return how often each exponent is in pairs."""
    both = np.bincount(pairs, minlength=TABLE**2).reshape(TABLE, TABLE)
    return both.sum(0) + both.sum(1)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The codes of pairs of exponents, by `second << 8 | first`: from the highest bit on, and their lengths."""

    bits: np.ndarray
    lengths: np.ndarray
    of_one: np.ndarray  # the lengths of codes of single exponents

    @classmethod
    def of(cls, code: Code) -> "_Pairs":
        lengths, bits = np.zeros(TABLE, dtype=np.uint64), np.zeros(TABLE, dtype=np.uint64)
        for symbol, (length, value) in code.items():
            if symbol != END:
                lengths[symbol], bits[symbol] = length, value << WINDOW_BITS - length
        both = bits[None, :] | bits[:, None] >> lengths[None, :]
        pairs = (lengths[None, :] + lengths[:, None]).astype(np.uint8)
        return cls(both.ravel(), pairs.ravel(), lengths.astype(np.uint8))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What one chunk gives: its windows from `first` on, and where in each the first of its codes begins.

    `starts` are bits of the stream and `elements` the weights that begin there. The first window may have begun in the
    chunk before, `over` are the bits that go into the window after the last.
    """

    first: int
    words: np.ndarray
    over: int
    starts: np.ndarray
    elements: np.ndarray


def _pack(pairs: np.ndarray, begin_bit: int, table: _Pairs) -> _Chunk:
    ends = np.cumsum(table.lengths[pairs], dtype=np.int64)
    begins = np.empty_like(ends)
    begins[0], begins[1:] = begin_bit, ends[:-1] + begin_bit
    window, shift = begins >> 6, (begins & 63).astype(np.uint64)
    codes = table.bits[pairs]
    # No pair is longer than a window, so that in every window one begins.
    inner = np.flatnonzero(window[1:] != window[:-1])  # the last pairs that begin in each window but the last
    firsts = np.concatenate(([0], inner + 1))
    words = np.bitwise_or.reduceat(codes >> shift, firsts)
    lasts = np.concatenate((inner, [len(pairs) - 1]))
    over = (codes[lasts] << np.uint64(1)) << (np.uint64(63) - shift[lasts])
    words[1:] |= over[:-1]
    # The second code of a window's last pair may be the first one of the next window.
    second = begins[lasts] + table.of_one[pairs[lasts] & 0xFF]
    is_over = (second >> 6 > window[lasts]) & (second < ends[lasts] + begin_bit)
    starts, elements = np.empty(len(firsts) + 1, dtype=np.int64), np.empty(len(firsts) + 1, dtype=np.int64)
    starts[0], elements[0] = begins[0], 0
    starts[1:-1] = np.where(is_over[:-1], second[:-1], begins[firsts[1:]])
    elements[1:-1] = np.where(is_over[:-1], 2 * lasts[:-1] + 1, 2 * firsts[1:])
    starts[-1], elements[-1] = second[-1], 2 * lasts[-1] + 1
    if not is_over[-1]:
        starts, elements = starts[:-1], elements[:-1]
    return _Chunk(int(window[0]), words, int(over[-1]), starts, elements)


def _packed(
    chunks: Sequence[np.ndarray], counts: np.ndarray, code: Code, total: int, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return stream, packed gaps and positions of all pairs; `counts` are those of each chunk's exponents."""
    table = _Pairs.of(code)
    begin_bits = np.concatenate(([0], np.cumsum(counts @ table.of_one.astype(np.int64))))
    num_bits = int(begin_bits[-1])
    num_bytes = -(-num_bits // 8)
    if num_bytes >= MOST_BYTES:
        raise ValueError(f"a stream of {num_bytes} bytes is too long for one DFloat11 group: divide it")
    sections = num_sections(num_bytes)
    words = np.zeros(num_bits // WINDOW_BITS + 2, dtype=np.uint64)
    gaps = np.full(sections * SECTION_WINDOWS + 1, UNSET, dtype=np.uint8)
    positions = np.full(sections + 1, total, dtype=np.int64)
    begun = 0
    for done in pool.map(_pack, chunks, map(int, begin_bits), [table] * len(chunks)):
        last = done.first + len(done.words)
        words[done.first] |= done.words[0]
        words[done.first + 1 : last] = done.words[1:]
        words[last] = done.over
        window, new = done.starts >> 6, slice(int(gaps[done.starts[0] >> 6] != UNSET), None)
        gaps[window[new]] = done.starts[new] & 63
        at = window[new] % SECTION_WINDOWS == 0
        positions[window[new][at] // SECTION_WINDOWS] = done.elements[new][at] + begun
        begun += CHUNK
    if left := -num_bits % 8:
        length, value = code[END]
        bits = value >> length - left if length >= left else value << left - length
        words[num_bits >> 6] |= np.uint64(bits << WINDOW_BITS - left - num_bits % WINDOW_BITS)
        if gaps[num_bits >> 6] == UNSET:
            gaps[num_bits >> 6] = num_bits & 63
    gaps = np.where(gaps == UNSET, 0, gaps)[:-1]
    packed = np.packbits(np.unpackbits(gaps[:, None], axis=1)[:, 8 - GAP_BITS :].ravel())
    return words.byteswap().view(np.uint8)[:num_bytes], packed, positions
