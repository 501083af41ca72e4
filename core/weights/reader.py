"""Open checkpoints: what tensors they hold, from their headers alone and without PyTorch. `tensors` reads them."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from .. import storage
from ..types import Checkpoint, TensorInfo
from .dfloat11 import files_with, rest_in, seen_through
from .gguf import read_gguf
from .pickled import plain_state

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
PICKLES = (".pth", ".pt")
SAFETENSORS, GGUF = ".safetensors", ".gguf"
NESTED_UNDER = ("state_dict", "model")  # where training scripts put the weights
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.gguf)")
ZIP = b"PK\x03\x04"
NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
    (b"<", "a web page, probably an error or a log-in page"),
    (ZIP, "a zip archive, as .pth files are"),
    (b"GGUF", "a GGUF file under another name"),
)
AGAIN = "download it again"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Return what a checkpoint holds, reading no weights.

    `path` is a .safetensors or .gguf file, any shard of a set, a set's index, a folder that holds one of these, or a
    .pth/.pt file, which is read without running code. Of a DFloat11 model the weights are what it holds, see
    `dfloat11.seen_through`. Raises ValueError for whatever is none of these, or incomplete.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: check the path")
    if path.suffix.lower() in PICKLES:
        return _gather(path, {path: (_pickled(path), {})})
    if path.name.endswith(INDEX):
        files = _indexed(path)
    elif shard := SHARD.fullmatch(path.name):
        index = path.with_name(shard["stem"] + INDEX)
        files = _indexed(index) if index.is_file() and shard["suffix"] == SAFETENSORS else _siblings(path, shard)
    elif path.suffix.lower() in (SAFETENSORS, GGUF):
        files = files_with(path)
    else:
        raise ValueError(
            f"{path}: expected .safetensors, .gguf, {INDEX}, .pth, .pt or a folder, found {path.suffix or 'a file'!r}"
        )
    return seen_through(_gather(path, {file: (read_gguf if _is_gguf(file) else read_header)(file) for file in files}))


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raise ValueError if a file of a checkpoint has been replaced or written to since it was opened."""
    try:
        found = _identity(dict.fromkeys(checkpoint.location.values()))
    except OSError as error:
        raise ValueError(f"{checkpoint.path} can't be read any more ({error.strerror}): put it back") from error
    if checkpoint.identity not in ("", found):
        raise ValueError(f"{checkpoint.path} has changed since it was opened: run again, and the new file is read")


def _is_gguf(file: Path) -> bool:
    return file.suffix.lower() == GGUF


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors and the metadata that a safetensors file states, checked against the file's size.

    Format: 8 bytes of header length, little-endian; a JSON header; the tensors' bytes without gaps. Raises ValueError
    where the file is not that.
    """
    _check_magic(file, "safetensors")
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 10 or length > MAX_HEADER_BYTES:
            raise ValueError(f"{file} ({size} bytes) is empty or not a safetensors file: {AGAIN}")
        if 8 + length > size:
            raise ValueError(f"{file} is cut off: its header alone needs {8 + length} bytes, it has {size}: {AGAIN}")
        text = opened.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        tensors, spans = {}, []
        for name, entry in header.items():
            (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
            if not isinstance(entry["dtype"], str) or any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
                raise TypeError(f"{name}: {entry}")
            if not storage.is_countable(shape):
                raise ValueError(f"{name} is said to be {list(shape)}, more than can be")
            tensors[name] = TensorInfo(entry["dtype"], shape, 8 + length + begin)
            spans.append((begin, end, name))
    except (RecursionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: its safetensors header can't be read ({error!r:.120}): {AGAIN}") from error
    _check_spans(file, sorted(spans), tensors, size - 8 - length)
    return tensors, metadata


def _check_magic(file: Path, expected: str, but: bytes = b"") -> None:
    """Raise ValueError for a file that begins as something else does, unless with what is `but` expected."""
    with open(file, "rb") as opened:
        start = opened.read(24)
    for magic, what in NOT_WEIGHTS:
        if start.startswith(magic) and magic != but:
            raise ValueError(f"{file} is {what}: expected {expected}; {AGAIN}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise KeyError("a name occurs twice")
    return found


def _check_spans(file: Path, spans: list[tuple[int, int, str]], tensors: Mapping[str, TensorInfo], held: int) -> None:
    """Raise unless the tensors' bytes follow one another, have the size of their shapes, and fill the file."""
    end = 0
    for begin, stop, name in spans:
        info = tensors[name]
        wanted = prod(info.shape) * storage.DTYPE_BYTES.get(info.dtype, 0)
        if begin != end or stop < begin or (info.dtype in storage.DTYPE_BYTES and stop - begin != wanted):
            raise ValueError(
                f"{file}: {name} ({info.dtype} {list(info.shape)}) is said to lie at bytes {begin} to {stop}, which "
                f"does not fit its size or its neighbour's end at {end}: the file is damaged; {AGAIN}"
            )
        end = stop
    if end > held:
        raise ValueError(f"{file} is cut off: its header promises {end} bytes of tensors, it has {held}: {AGAIN}")
    if end < held:
        raise ValueError(f"{file} has {held - end} bytes more than its header accounts for: {AGAIN}")


def _pickled(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a .pth file. What is not plain in it is for PyTorch to judge, which takes long to come."""
    _check_magic(file, "a PyTorch checkpoint", but=ZIP)
    state = plain_state(file)
    inner = next((state[key] for key in NESTED_UNDER if isinstance(state.get(key), dict)), state) if state else {}
    if inner and all(isinstance(name, str) and isinstance(info, TensorInfo) for name, info in inner.items()):
        return inner
    from .tensors import infos_of_pickle

    return infos_of_pickle(file)


def _indexed(index: Path) -> list[Path]:
    """Return the shards that an index names; all must be there."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [index.parent / name for name in sorted(set(named))]
    except (RecursionError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{index} is not an index of shards (no weight_map in it): {AGAIN}") from error
    if outside := [file for file in files if file.parent != index.parent]:
        raise ValueError(f"{index} names files of other folders, such as {outside[0]}: {AGAIN}")
    return _all_there(index, files)


def _siblings(path: Path, shard: re.Match[str]) -> list[Path]:
    """Return the shards of a set that has no index, from the count in their names."""
    count = int(shard["count"])
    return _all_there(
        path, [path.with_name(f"{shard['stem']}-{i:05}-of-{count:05}{shard['suffix']}") for i in range(1, count + 1)]
    )


def _all_there(path: Path, files: list[Path]) -> list[Path]:
    if missing := [file.name for file in files if not _is_there(file)]:
        raise ValueError(
            f"{path} belongs to a set of {len(files)} shards, {len(missing)} of which are missing from {path.parent}: "
            f"{', '.join(missing[:8])}; download them too"
        )
    return files


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that no file can have
        return False


def _in_folder(folder: Path) -> Path:
    """Return the one checkpoint of a folder: an index, a single file, or a shard of a set without an index.

    Of a DFloat11 model of many files it is the one of what is in none of its groups.
    """
    if rest := rest_in(folder):
        return rest
    indices = sorted(folder.glob(f"*{INDEX}"))
    weights = sorted(file for file in folder.iterdir() if file.suffix.lower() in (SAFETENSORS, GGUF))
    found = indices + [file for file in weights if not any(_belongs(file, index) for index in indices)]
    sets = {(shard["stem"], shard["count"], shard["suffix"]) for file in found if (shard := SHARD.fullmatch(file.name))}
    if len(sets) == 1 and not indices and all(SHARD.fullmatch(file.name) for file in found):
        found = found[:1]
    found = found or sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} holds several checkpoints: {_some(found)}; name the one that is meant")
    inner = sorted(sub for sub in folder.iterdir() if sub.is_dir() and any(sub.glob("*.safetensors")))
    advice = f"name one of its folders: {_some(inner)}" if inner else "expected .safetensors, .gguf, .pth or .pt in it"
    raise ValueError(f"{folder} holds no checkpoint; {advice}")


def _belongs(file: Path, index: Path) -> bool:
    shard = SHARD.fullmatch(file.name)
    return shard is not None and shard["stem"] + INDEX == index.name and shard["suffix"] == SAFETENSORS


def _some(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:8]) + (", ..." if len(paths) > 8 else "")


def _gather(path: Path, files: Mapping[Path, tuple[dict[str, TensorInfo], dict[str, str]]]) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    location: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for file, (inside, said) in files.items():
        if twice := tensors.keys() & inside:
            name = min(twice)
            raise ValueError(f"{name} is both in {location[name]} and in {file.name}: the shards are not of one set")
        tensors |= inside
        location |= dict.fromkeys(inside, file)
        metadata |= said
    if not tensors:
        raise ValueError(f"{path} holds no tensors: {AGAIN}")
    return Checkpoint(path=path, tensors=tensors, location=location, metadata=metadata, identity=_identity(files))


def _identity(files: Iterable[Path]) -> str:
    """Return a digest of the files' paths, sizes and times of change."""
    facts = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
