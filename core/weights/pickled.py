"""Read what a .pth file says of its tensors, without PyTorch and without running anything that the file says.

Such a file is a zip archive: a pickle of the state dict, in which each tensor is a call of one function of PyTorch with
the place of its numbers; and the numbers, a file in the archive per storage. The instructions of plain state dicts are
followed here, and where the numbers of a tensor lie one after the other, it is said where in the file. For any other
file the answer is None, and PyTorch's own strict reader has the word.

Sources: the standard library's pickletools, which describes the instructions, and what `torch.save` writes.
"""

import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ..storage import DTYPE_BYTES, MAX_ELEMENTS, MAX_SIDES, is_countable
from ..types import TensorInfo

PICKLE, STORAGES, BYTE_ORDER = "/data.pkl", "/data/", "/byteorder"  # in the archive, behind the name of its folder
LITTLE = b"little"
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of an entry, which its name and more follow: lengths of both are last
MOST_BYTES = 4 << 20  # of the pickle; that of the largest model has a quarter of a megabyte
STORAGE_DTYPES = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32",
    "DoubleStorage": "F64",
}  # fmt: skip
UNCLEAR = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, EOFError, OSError),
    *(struct.error, zipfile.BadZipFile),
)


class _Hostile(Exception):
    """Keys that are deep in themselves bring any unpickler down, PyTorch's too."""


@dataclass(frozen=True, slots=True)
class _Named:
    """A class or function that a pickle names: module and name."""

    name: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """The numbers of a storage in the archive: how many bytes they are, and where in the file these begin."""

    num_bytes: int
    start: int


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    numbers: int
    start: int


def plain_state(file: Path) -> dict[str, Any] | None:
    """Return what a .pth file's state dict holds, `TensorInfo` for tensors; None if it is not as plain as that.

    Raises ValueError for one that may be made to bring its reader down.
    """
    try:
        with open(file, "rb") as opened, zipfile.ZipFile(opened) as archive:
            [pickle] = [entry for entry in archive.infolist() if entry.filename.endswith(PICKLE)]
            if pickle.compress_type != zipfile.ZIP_STORED or pickle.file_size > MOST_BYTES:
                return None
            folder = pickle.filename.removesuffix(PICKLE)
            if folder + BYTE_ORDER in archive.namelist() and archive.read(folder + BYTE_ORDER) != LITTLE:
                return None
            entries = {
                entry.filename.removeprefix(folder + STORAGES): _Entry(entry.file_size, _start(opened, entry))
                for entry in archive.infolist()
                if entry.filename.startswith(folder + STORAGES) and entry.compress_type == zipfile.ZIP_STORED
            }
            found = _followed(archive.read(pickle), entries)
    except _Hostile as error:
        raise ValueError(
            f"{file} has tables whose keys are no names, which no model needs: it was not read. Get the model as "
            ".safetensors"
        ) from error
    except UNCLEAR:
        return None
    return found if isinstance(found, dict) else None


def _start(opened: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return where the bytes of an entry begin in its archive."""
    opened.seek(entry.header_offset)
    magic, name, more = LOCAL_HEADER.unpack(opened.read(LOCAL_HEADER.size))
    if magic != zipfile.stringFileHeader or entry.compress_size != entry.file_size:
        raise ValueError
    return entry.header_offset + LOCAL_HEADER.size + name + more


def _followed(instructions: bytes, entries: Mapping[str, _Entry]) -> Any:
    """Return what a pickle makes; `entries` are the storages.

    Raises one of `UNCLEAR` for whatever a plain state dict has no need of.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def taken(first: int) -> list[Any]:
        found, stack[first:] = stack[first:], []
        return found

    for opcode, argument, _ in pickletools.genops(instructions):
        match opcode.name:
            case "PROTO":
                pass
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken(-int(opcode.name[-1]))))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(taken(marks.pop())))
            case "APPEND" | "APPENDS":
                items = taken(-1 if opcode.name == "APPEND" else marks.pop())
                _made(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = taken(-2 if opcode.name == "SETITEM" else marks.pop())
                if any(type(key) not in (str, int) for key in items[::2]):
                    raise _Hostile
                _made(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
            case "BUILD":  # attributes of a state dict, such as its modules' versions in `_metadata`
                stack.pop()
                _made(stack[-1], OrderedDict)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Named(argument))
            case "BINPERSID":
                stack.append(_storage(entries, *stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(CALLS[function.name](*arguments))
            case "STOP":
                [found] = stack
                return found
            case _:
                raise ValueError(opcode.name)
    raise EOFError


def _made(found: Any, kind: type) -> Any:
    if not isinstance(found, kind):
        raise TypeError
    return found


def _storage(entries: Mapping[str, _Entry], kind: str, of: _Named, key: str, _place: str, numbers: int) -> _Storage:
    module, _, name = of.name.partition(" ")
    dtype = STORAGE_DTYPES[name]
    if kind != "storage" or module != "torch" or type(numbers) is not int:
        raise TypeError
    if entries[key].num_bytes != numbers * DTYPE_BYTES[dtype]:
        raise ValueError
    return _Storage(dtype, numbers, entries[key].start)


def _tensor(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], grad: bool, hooks: OrderedDict
) -> TensorInfo:
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > MAX_SIDES:
        raise TypeError
    if any(type(n) is not int or not 0 <= n < MAX_ELEMENTS for n in (offset, *size, *stride)):
        raise TypeError
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not is_countable(size) or (prod(size) and last >= storage.numbers):
        raise ValueError
    one_after_the_other = [prod(size[i + 1 :]) for i in range(len(size))]
    is_in_order = all(n == 1 or step == to for n, step, to in zip(size, stride, one_after_the_other, strict=True))
    start = storage.start + offset * DTYPE_BYTES[storage.dtype] if is_in_order else None
    return TensorInfo(storage.dtype, size, start)


def _parameter(tensor: TensorInfo, grad: bool, hooks: OrderedDict) -> TensorInfo:
    return tensor


CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda: OrderedDict(),  # empty: its items follow
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
