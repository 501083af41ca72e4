"""DFloat11 decoded one code after the other, from the description of the format alone: nothing of ours is in here.

Exponents of bf16 numbers are coded; the first bit of a byte is its highest. A byte of the code is looked up in the
first table; an entry from 240 on says that 256 - entry is the table for the next byte, any other is the exponent. The
last table has the length of each exponent's code. Sign and mantissa of each number are in a byte of their own. Of every
8 bytes of the codes `gaps` says in 5 bits where the first code begins, of every 4096 bytes `output_positions` which
number that is.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

WINDOW, SECTION = 64, 32768  # bits


def codes(planes: Mapping[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """Return where each code begins, its exponent and its length, reading from the first bit to the last."""
    stream = planes["encoded_exponent"].tobytes() + bytes(8)
    tables, found, at = planes["luts"], [], 0
    for _ in range(len(planes["sign_mantissa"])):
        four = int.from_bytes(stream[at // 8 : at // 8 + 5], "big") >> (8 - at % 8) & 0xFFFFFFFF
        found.append((at, *look_up(tables, four)))
        at += found[-1][2]
    return found


def look_up(tables: np.ndarray, four: int) -> tuple[int, int]:
    """Return exponent and length of the code that begins with the highest of 32 bits."""
    table = 0
    for shift in (24, 16, 8, 0):
        entry = int(tables[table, four >> shift & 0xFF])
        if entry < 240:
            return entry, int(tables[-1, entry])
        table = 256 - entry
        assert 0 < table < len(tables) - 1, "a pointer to no table"
    raise AssertionError("a code of more than four bytes")


def decode(planes: Mapping[str, Tensor]) -> Tensor:
    """Return the numbers in bf16, having checked all that the planes say twice, and that nothing is left over."""
    planes = {name: tensor.numpy() for name, tensor in planes.items()}
    found, stream = codes(planes), planes["encoded_exponent"]
    end = found[-1][0] + found[-1][2]
    assert len(stream) == -(-end // 8), "the codes end elsewhere than their bytes"
    check_places(planes, [at for at, _, _ in found], end)
    exponents = np.array([exponent for _, exponent, _ in found], dtype=np.uint16)
    rest = planes["sign_mantissa"].astype(np.uint16)
    words = (rest & 0x80) << 8 | exponents << 7 | (rest & 0x7F)
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)


def check_places(planes: Mapping[str, np.ndarray], starts: list[int], end: int) -> None:
    """Hold gaps and positions against where codes begin."""
    sections = -(-len(planes["encoded_exponent"]) // 4096)
    positions = planes["output_positions"].view("<u4").tolist()
    assert len(positions) == sections + 1 and positions[-1] == len(starts)
    bits = np.unpackbits(planes["gaps"]).reshape(-1, 5)
    assert len(bits) == 512 * sections
    gaps = bits @ np.array([16, 8, 4, 2, 1])
    first: dict[int, int] = {}
    for index, at in enumerate(starts):
        first.setdefault(at // WINDOW, index)
    for window, index in first.items():
        assert gaps[window] == starts[index] % WINDOW, f"window {window}"
    for section in range(sections):
        wanted = first.get(section * SECTION // WINDOW, len(starts))
        assert positions[section] == wanted, f"section {section}"
    # Of the padding, whose place may stand where no code begins any more.
    assert all(gaps[k] in (0, end % WINDOW) for k in range(512 * sections) if k not in first)


def decode_as_official(planes: Mapping[str, Tensor], rubbish: int = 0) -> Tensor:
    """Return the numbers as the published CUDA kernel finds them: each window by itself, counted and then written.

    What it reads past the end of the codes is `rubbish`, a byte. Fails where it would go on for ever, or where it would
    ask for more shared memory than every card gives.
    """
    planes = {name: tensor.numpy() for name, tensor in planes.items()}
    stream, tables, total = planes["encoded_exponent"], planes["luts"], len(planes["sign_mantissa"])
    sections = -(-len(stream) // 4096)
    padded = stream.tobytes() + bytes([rubbish]) * (4096 * sections + 12 - len(stream))
    gap_bits = np.unpackbits(planes["gaps"]).reshape(-1, 5) @ np.array([16, 8, 4, 2, 1])
    positions = planes["output_positions"].view("<u4").tolist()
    assert 512 * 4 + 4 + 2 * max(b - a for a, b in pairwise(positions)) <= 48 * 1024
    out = np.zeros(total, dtype=np.uint16)
    rest = planes["sign_mantissa"]
    for section in range(sections):
        at = positions[section]
        for window in range(512 * section, 512 * (section + 1)):
            bits = int.from_bytes(padded[8 * window : 8 * window + 12], "big")
            place = int(gap_bits[window])
            while place < WINDOW:
                exponent, length = look_up(tables, bits >> max(0, 64 - place) & 0xFFFFFFFF)
                assert length, "a code of no length: the kernel would not end"
                if at < positions[section + 1]:
                    out[at] = (int(rest[at]) & 0x80) << 8 | exponent << 7 | int(rest[at]) & 0x7F
                at += 1
                place += length
    return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
