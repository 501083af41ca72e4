"""Read what a GGUF file says of its tensors: names, shapes, formats, where their bytes are.

The container is public and small (ggml's docs/gguf.md), so it is read here, strictly: the reader of the `gguf` package
believes what a damaged file says of itself, goes on for hours past its end, and takes seconds for the vocabulary in a
text encoder's file.
"""

import mmap
import struct
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

from ..storage import DTYPE_BYTES, PACKINGS, TORCH_NAMES, is_countable
from ..types import TensorInfo
from .mapping import mapped

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # alike for little-endian files; version 1 had narrower counts and was soon gone
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 8  # ggml takes 4, and files of video models hold a weight of 5
MAX_NAME_BYTES = 1 << 10  # ggml takes 63, tools for these models 127
MAX_TEXT_BYTES = 1 << 20  # longer texts are no facts about tensors, and stepped over
FEW = 8  # numbers of an array that are kept: shapes are, vocabularies are not

# ggml's numbers of the formats. Those that `core.storage` does not know are named, and refused later.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT_KEY = "general.alignment"
SHAPE_KEY = "comfy.gguf.orig_shape."  # + a tensor's name: its shape in PyTorch, where the file's is another

# Tensors; metadata without long lists; the lists that were asked for.
Said = tuple[dict[str, TensorInfo], dict[str, str], dict[str, tuple[Any, ...]]]


class _Cut(Exception):
    """The header goes on where the file has ended."""


def read_gguf(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors and the metadata that a GGUF file states, held against its size; long lists are left out.

    Shapes are PyTorch's. Raises ValueError where the file is not what it says.
    """
    tensors, metadata, _ = _read(file, ())
    return tensors, metadata


def read_lists(file: Path, keys: Collection[str]) -> dict[str, tuple[Any, ...]]:
    """Return the lists of a GGUF file's metadata that these keys have, whole. Raises ValueError as `read_gguf`."""
    return _read(file, keys)[2]


def _read(file: Path, whole: Collection[str]) -> Said:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
        if len(start) < 8 or not start.startswith(MAGIC):
            raise ValueError(f"{file} ({size} bytes) is empty or not a GGUF file: download it again")
        version, swapped = (int.from_bytes(start[4:], order) for order in ("little", "big"))
        if version not in VERSIONS:
            found = "for big-endian machines" if swapped in VERSIONS else f"of version {version}"
            raise ValueError(
                f"{file} is a GGUF file {found}: expected version {' or '.join(map(str, VERSIONS))}, little-endian; "
                "take another file of this model"
            )
        with mapped(opened, file) as content:
            try:
                return _Header(file, content, len(start)).read(whole)
            except _Cut as error:
                raise ValueError(f"{file} is cut off in its header ({size} bytes): download it again") from error
            except UnicodeDecodeError as error:
                raise _damaged(file, f"a name in it is not UTF-8 ({error.reason})") from error


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{file}: its GGUF header can't be right: {why}. The file is damaged; download it again")


class _Header:
    """The header of one file, read from front to back; every step is inside the file or raises `_Cut`."""

    def __init__(self, file: Path, content: mmap.mmap, at: int):
        self.file, self.content, self.at, self.size = file, content, at, len(content)

    def read(self, whole: Collection[str]) -> Said:
        num_tensors, num_facts = self._number("Q"), self._number("Q")
        facts: dict[str, Any] = {}
        for _ in range(num_facts):
            key = self._name()
            if key in facts:
                raise _damaged(self.file, f"{key[:80]!r} is stated twice")
            facts[key] = self._value(self._number("I"), key in whole)
        stated: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(num_tensors):
            name, stored, shape, offset = self._tensor()
            if name in stated:
                raise _damaged(self.file, f"tensor {name!r} is there twice")
            stated[name] = stored, _original(self.file, name, stored, shape, facts), offset
        alignment = facts.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _damaged(self.file, f"{ALIGNMENT_KEY} is {str(alignment)[:80]}, expected a power of two")
        begin = -(-self.at // alignment) * alignment
        tensors = {name: TensorInfo(stored, shape, begin + offset) for name, (stored, shape, offset) in stated.items()}
        self._check_spans(tensors)
        lists = {key: facts.pop(key) for key in whole if isinstance(facts.get(key), tuple)}
        return tensors, {key: str(value) for key, value in facts.items() if value is not None}, lists

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self._name()
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise _damaged(self.file, f"tensor {name!r} has {dimensions} dimensions, {MAX_DIMENSIONS} at most can be")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        if not is_countable(shape):
            raise _damaged(self.file, f"tensor {name!r} is said to be {list(shape)}, more than can be")
        number = self._number("I")
        stored = TYPES.get(number, f"GGML type {number}")
        packing = PACKINGS.get(stored)
        if packing and (not shape or shape[-1] % packing.numbers):
            raise _damaged(
                self.file,
                f"tensor {name!r} is {list(shape)} in {stored}, whose rows are multiples of {packing.numbers}",
            )
        return name, stored, shape, self._number("Q")

    def _check_spans(self, tensors: dict[str, TensorInfo]) -> None:
        """Raise unless the bytes of all tensors lie in the file, one after the other."""
        end, before = 0, ""
        for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
            packing = PACKINGS.get(info.dtype)
            if packing:
                length = prod(info.shape[:-1]) * packing.row_bytes(info.shape[-1])
            else:
                length = prod(info.shape) * (DTYPE_BYTES[info.dtype] if info.dtype in TORCH_NAMES else 0)
            if info.start < end and length:
                raise _damaged(self.file, f"tensor {name!r} begins at byte {info.start}, inside of {before!r}")
            if info.start + length > self.size:
                raise ValueError(
                    f"{self.file} is cut off: {name} ({info.dtype} {list(info.shape)}) goes to byte "
                    f"{info.start + length}, the file has {self.size}: download it again"
                )
            end, before = max(end, info.start + length), name

    def _value(self, kind: int, is_whole: bool) -> Any:
        """Return a fact; None for long texts and, but for `is_whole`, for lists of many items or of texts."""
        if kind == STRING:
            length = self._number("Q")
            return self._text(length) if length <= MAX_TEXT_BYTES else self._skip(length)
        if kind != ARRAY:
            return self._number(self._scalar(kind))
        kind, count = self._number("I"), self._number("Q")
        begin = self.at
        if kind == STRING:
            self._skip_texts(count)
            return self._texts(begin, count) if is_whole else None
        letter = self._scalar(kind)
        self._skip(count * struct.calcsize(letter))
        if count > FEW and not is_whole:
            return None
        return struct.unpack_from(f"<{count}{letter}", self.content, begin)

    def _scalar(self, kind: int) -> str:
        if kind not in SCALARS:
            raise _damaged(self.file, f"there is a value of kind {kind}, which GGUF does not have")
        return SCALARS[kind]

    def _name(self) -> str:
        length = self._number("Q")
        if length > MAX_NAME_BYTES:
            raise _damaged(self.file, f"there is a name of {length} bytes, {MAX_NAME_BYTES} at most can be")
        return self._text(length)

    def _text(self, length: int) -> str:
        begin = self.at
        self._skip(length)
        return self.content[begin : self.at].decode()

    def _number(self, letter: str) -> Any:
        begin = self.at
        self._skip(struct.calcsize(letter))
        return struct.unpack_from(f"<{letter}", self.content, begin)[0]

    def _texts(self, at: int, count: int) -> tuple[str, ...]:
        """Return texts that have been stepped over, and so are there."""
        found, length_at = [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8 + length_at(self.content, at)[0]
            found.append(self.content[at + 8 : end].decode())
            at = end
        return tuple(found)

    def _skip_texts(self, count: int) -> None:
        """Step over texts. Vocabularies have hundreds of thousands, so this one loop is written for speed."""
        at, last, length_at = self.at, self.size - 8, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                raise _Cut
            at += 8 + length_at(self.content, at)[0]
        self._skip(at - self.at)

    def _skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise _Cut
        self.at += count


def _original(file: Path, name: str, stored: str, shape: tuple[int, ...], facts: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of a tensor in PyTorch; some tools flatten it and state it among the facts."""
    original = facts.get(SHAPE_KEY + name, shape)
    if original == shape:
        return shape
    whole = isinstance(original, tuple) and all(type(side) is int and side >= 0 for side in original)
    whole = whole and is_countable(original)
    if not whole or prod(original) != prod(shape) or (stored in PACKINGS and original[-1:] != shape[-1:]):
        raise _damaged(file, f"tensor {name!r} is {list(shape)}, and said to have been {str(original)[:80]}")
    return original
