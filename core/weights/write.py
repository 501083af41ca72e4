"""Write checkpoints: one tensor after the other, into a file that has its name only when it is whole."""

import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .. import storage
from ..ops import formats
from ..types import TensorInfo
from .gguf import DEFAULT_ALIGNMENT, MAGIC, STRING, TYPES

Facts = Mapping[str, str | int]
Advance = Callable[[int], None]  # told how many bytes have been written since it was called last

PIECE = 32 << 20  # bytes written at once: enough for full speed, few enough to stop between two
UNFINISHED = ".part"  # how the name of a file ends that is being written
SAFETENSORS_ALIGNMENT = 8  # where the tensors of a safetensors file begin
GGUF_VERSION, UINT32 = 3, 4
GGUF_NUMBERS = {name: number for number, name in TYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """A file format: the bytes before its tensors, and what each of them begins at a multiple of.

    `header` makes these bytes of the tensors, in the order in which they follow, and of facts about the file. Of those
    formats that can be filled up it takes the length that they must have.
    """

    suffix: str
    alignment: int
    header: Callable[[Mapping[str, TensorInfo], Facts, int], bytes]

    def size(self, tensors: Mapping[str, TensorInfo], facts: Facts) -> int:
        """Return how many bytes a file of these tensors takes."""
        end = len(self.header(tensors, facts, 0))
        for info in tensors.values():
            end = _up(end, self.alignment) + num_bytes(info)
        return end


def num_bytes(info: TensorInfo) -> int:
    """Return the bytes of a tensor in a file."""
    dtype, shape = formats.layout(info)
    return prod(shape) * dtype.itemsize


def _safetensors_header(tensors: Mapping[str, TensorInfo], facts: Facts, length: int) -> bytes:
    header: dict[str, object] = {"__metadata__": {key: str(value) for key, value in facts.items()}} if facts else {}
    end = 0
    for name, info in tensors.items():
        begin, end = end, end + num_bytes(info)
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    wanted = length or _up(8 + len(text), SAFETENSORS_ALIGNMENT)
    assert 8 + len(text) <= wanted, "a header may not outgrow its place"
    text = text.ljust(wanted - 8)
    return len(text).to_bytes(8, "little") + text


def _gguf_header(tensors: Mapping[str, TensorInfo], facts: Facts, length: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(facts))]
    for key, value in facts.items():
        is_text = isinstance(value, str)
        parts += [_text(key), struct.pack("<I", STRING if is_text else UINT32)]
        parts.append(_text(value) if is_text else struct.pack("<I", value))
    offset = 0
    for name, info in tensors.items():
        offset = _up(offset, DEFAULT_ALIGNMENT)
        shape = info.shape[::-1]
        parts += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts.append(struct.pack("<IQ", GGUF_NUMBERS[info.dtype], offset))
        offset += num_bytes(info)
    header = b"".join(parts)
    header = header.ljust(_up(len(header), DEFAULT_ALIGNMENT), b"\0")
    assert length in (0, len(header)), "the header of a GGUF file can't be filled up"
    return header


SAFETENSORS = Container(suffix=".safetensors", alignment=1, header=_safetensors_header)
GGUF = Container(suffix=".gguf", alignment=DEFAULT_ALIGNMENT, header=_gguf_header)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def check_place(path: Path, size: int, sources: Iterable[Path], replace: bool = False) -> None:
    """Raise ValueError if a file of `size` bytes can't be written there: no folder, no room, a file that is in use.

    A file that exists is in the way unless `replace`; one of `sources` always is.
    """
    folder = path.parent
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file that is to be written in it")
    if not folder.is_dir():
        raise ValueError(f"{path} can't be written, as there is no folder {folder}: make it, or choose another")
    if path.exists():
        if any(path.samefile(source) for source in sources if source.exists()):
            raise ValueError(f"{path} is the file that is read: it is never written over; choose another name")
        if not replace:
            raise ValueError(f"{path} exists: choose another name, or give --force to replace it when all has worked")
    if (free := shutil.disk_usage(folder).free) < size:
        raise ValueError(
            f"{path} will have {size / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free: make room, or choose "
            "a folder on another disk"
        )


def left_behind(path: Path) -> list[Path]:
    """Return what was left beside a path by processes that were killed while they wrote it, or is being written."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}")
    return sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))


def write_file(
    path: Path,
    container: Container,
    tensors: Mapping[str, TensorInfo],
    facts: Facts,
    content: Iterable[tuple[str, Tensor]],
    advance: Advance = lambda count: None,
) -> None:
    """Write tensors as they come; whatever was at `path` before is there until all of them are on the disk.

    `tensors` says in their order what comes; of a tensor that turns out smaller than that, the file states what came.
    Where anything fails, Ctrl-C included, nothing is left behind; only a whole file stays, under another name, whose
    place can't be taken. Raises ValueError for a place that can't be written to, OSError where the disk fails.
    """
    header = container.header(tensors, facts, 0)
    written: dict[str, TensorInfo] = {}
    with _unfinished(path) as file:
        file.write(header)
        advance(len(header))
        for name, tensor in content:
            written[name] = TensorInfo(tensors[name].dtype, tuple(tensor.shape))
            if tensor.dtype == torch.uint8 and tensors[name].dtype in storage.PACKINGS:
                written[name] = tensors[name]  # blocks, whose shape is that of the numbers
            assert formats.layout(tensors[name])[0] == tensor.dtype, f"{name} is not what was planned"
            for piece in (memoryview(b"\0" * (-file.tell() % container.alignment)), *_pieces(tensor)):
                file.write(piece)
                advance(len(piece))
        assert list(written) == list(tensors), "all that was planned is written, in its order"
        if written != tensors:
            file.seek(0)
            file.write(container.header(written, facts, len(header)))


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    if not tensor.numel():
        return
    content = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    for begin in range(0, len(content), PIECE):
        yield content[begin : begin + PIECE]


@contextmanager
def _unfinished(path: Path) -> Iterator[BinaryIO]:
    """Provide a file beside `path` that takes its place on success, after all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise ValueError(f"{path} can't be written ({error.strerror}): choose another name or folder") from error
    is_whole = False
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        is_whole = True
        os.replace(temporary, path)
    except OSError as error:
        if not is_whole:
            raise
        raise ValueError(  # on Windows where a program has the old file open
            f"{path} can't be replaced ({error.strerror}). The new file is whole, and called {temporary}: close what "
            f"has the old one open, and rename it to {path.name}"
        ) from error
    finally:
        if not is_whole:
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself last, where the system can."""
    if os.name == "nt":
        return  # folders can't be opened there
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
