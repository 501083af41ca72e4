"""Huffman codes as DFloat11 files have them: short enough for its decoders, with the tables that these look up."""

import heapq
from collections.abc import Mapping

import numpy as np

from ..dfloat11 import LONGEST_CODE, MOST_TABLES, POINTERS, TABLE

END = -1  # a symbol that ends the stream, of which as many bits are written as the last byte has left
FLOORS = (24, 16, 12, 10, 8)  # rare symbols are counted as 2 ** -floor of all, where their codes need too many tables

Code = dict[int, tuple[int, int]]  # symbol -> length in bits, and the bits as a number


def make_code(counts: Mapping[int, int]) -> tuple[Code, np.ndarray]:
    """Return a prefix code for symbols below 240 that occur so often, `END` among them, and its tables.

    It is the shortest code unless that has codes of more than 32 bits or needs more tables than can be pointed to. No
    symbol takes more than 8 bits on the average.
    """
    total = sum(counts.values())
    for floor in (None, *FLOORS):
        code = _limited(counts if floor is None else {s: max(n, total >> floor) for s, n in counts.items()})
        num_bits = sum(counts[symbol] * length for symbol, (length, _) in code.items() if symbol != END)
        if num_bits <= 8 * total and len(tables := _rows(code)) <= MOST_TABLES + 1:
            return code, tables
    code = {symbol: (8, k) for k, symbol in enumerate((END, *sorted(counts)))}
    return code, _rows(code)


def lengthened(code: Code) -> tuple[Code, np.ndarray]:
    """Return the code with two bits for the symbol that has one, and its tables."""
    code = {s: (2, value << 1) if length == 1 and s != END else (length, value) for s, (length, value) in code.items()}
    return code, _rows(code)


def _limited(counts: Mapping[int, int]) -> Code:
    """Return the Huffman code; of as many rare symbols as it takes, each is counted as one, until no code is long."""
    code, rare = _huffman(counts), 2
    symbols, found = list(counts), np.array(list(counts.values()))
    while max(length for length, _ in code.values()) > LONGEST_CODE:
        least = {symbols[k] for k in np.argpartition(found, rare)[:rare]}
        code = _huffman({symbol: 1 if symbol in least else n for symbol, n in counts.items()})
        rare += 1
    return code


def _huffman(counts: Mapping[int, int]) -> Code:
    """Return the Huffman code of symbols and `END`, which occurs once. The lighter of two nodes gets the 0.

    Nodes of one weight are ordered by their first symbol, so that the same counts give the same code everywhere.
    """
    heap = [(n, symbol, [(symbol, 0, 0)]) for symbol, n in (*counts.items(), (END, 1))]
    heapq.heapify(heap)
    while len(heap) > 1:
        (light, first, zeros), (heavy, _, ones) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(symbol, length + 1, value) for symbol, length, value in zeros]
        merged += [(symbol, length + 1, value | 1 << length) for symbol, length, value in ones]
        heapq.heappush(heap, (light + heavy, first, merged))
    return {symbol: (length, value) for symbol, length, value in heap[0][2]}


def _rows(code: Code) -> np.ndarray:
    """Return tables [R, 256] in U8: by bytes of a code, the symbol or a pointer; in the last row the codes' lengths.

    Entries of codes that don't exist, `END` being one, repeat the entry before: decoders that run on into the padding
    must find something there whose length is not 0.
    """
    symbols = {symbol: row for symbol, row in code.items() if symbol != END}
    prefixes = [(0, 0)]  # length in bytes, bits as a number
    for step in (0, 1):
        for length, value in symbols.values():
            deepest = (length - 1) // 8
            for depth in (deepest,) if step == 0 else range(1, deepest):
                prefixes.append((depth, value >> (length - 8 * depth)))
    prefixes = sorted(dict.fromkeys(prefixes), key=lambda prefix: prefix[0])
    number = {prefix: k for k, prefix in enumerate(prefixes)}
    rows = np.zeros((len(prefixes) + 1, TABLE), dtype=np.int64)
    before = POINTERS
    for (depth, bits), k in number.items():
        entries: dict[int, int] = {}
        for symbol, (length, value) in symbols.items():
            if length <= 8 * depth or value >> (length - 8 * depth) != bits:
                continue
            rest = length - 8 * (depth + 1)
            if rest <= 0:
                entries[value << -rest & 0xFF] = symbol
            else:
                entries[value >> rest & 0xFF] = TABLE - number[depth + 1, value >> rest]
        if before >= POINTERS:  # a pointer from another table could lead in a circle
            before = min(entries.values())
        for key in range(TABLE):
            before = rows[k, key] = entries.get(key, before)
    for symbol, (length, _) in symbols.items():
        rows[-1, symbol] = length
    return rows.clip(0, TABLE - 1).astype(np.uint8)
