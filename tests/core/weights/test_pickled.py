"""Headers of .pth files, read without PyTorch: what PyTorch's own reader says, or nothing."""

import time
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn
from wanqwen.core.ops import formats
from wanqwen.core.types import TensorInfo
from wanqwen.core.weights.pickled import BYTE_ORDER, PICKLE, STORAGE_DTYPES, plain_state
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.core.weights.tensors import infos_of_pickle, read_tensors

BASE = torch.arange(24.0).view(4, 6)
DTYPES = [formats.DTYPES[name] for name in STORAGE_DTYPES.values()]
STATES: dict[str, dict[str, Any]] = {
    "dtypes": {str(dtype): torch.zeros(2, 3, dtype=dtype) for dtype in DTYPES},
    "a module's": nn.Sequential(nn.Conv3d(2, 3, 1), nn.BatchNorm1d(4), nn.Linear(5, 5, bias=False)).state_dict(),
    "parameters": {"a": nn.Parameter(BASE.clone()), "b": nn.Parameter(BASE[0].clone(), requires_grad=False)},
    "views of one storage": {"whole": BASE, "turned": BASE.T, "part": BASE[1:3, ::2], "row": BASE[3], "again": BASE},
    "odd shapes": {"number": torch.tensor(3.0), "none": torch.zeros(0, 7), "spread": torch.ones(1).expand(5, 9)},
    "many": {f"blocks.{i}.weight": torch.zeros(i % 3, 2) for i in range(700)},
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_plain_states_are_what_pytorch_says(tmp_path: Path, name: str, kind: type) -> None:
    path = tmp_path / "m.pth"
    torch.save(kind(STATES[name]), path)
    found = plain_state(path)
    assert found == infos_of_pickle(path) == dict(open_checkpoint(path).tensors)
    assert list(found) == list(STATES[name])


@pytest.mark.parametrize("name", STATES)
def test_what_lies_in_order_is_read_from_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    torch.save(STATES[name], tmp_path / "m.pth")
    checkpoint, saved = open_checkpoint(tmp_path / "m.pth"), torch.load(tmp_path / "m.pth")
    in_order = [key for key, tensor in saved.items() if tensor.is_contiguous()]
    assert [key for key, info in checkpoint.tensors.items() if info.start is not None] == in_order
    every = dict(read_tensors(checkpoint, saved))  # what does not lie so included, as PyTorch reads it
    monkeypatch.delattr(torch, "load")
    for found in (every, dict(read_tensors(checkpoint, in_order))):
        assert all(t.dtype == saved[key].dtype and torch.equal(t, saved[key]) for key, t in found.items())
    assert every.keys() == saved.keys()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_what_is_not_plain_is_left_to_pytorch(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "m.pth"
    torch.save({"a": torch.zeros(2, dtype=dtype)}, path)
    assert plain_state(path) is None
    assert dict(open_checkpoint(path).tensors) == infos_of_pickle(path)


@pytest.mark.parametrize("change", ["compressed", "without numbers", "too few numbers", "big-endian"])
def test_an_archive_that_does_not_hold_its_numbers_as_they_are_is_not_plain(tmp_path: Path, change: str) -> None:
    path, other = tmp_path / "m.pth", tmp_path / "other.pth"
    torch.save({"a": BASE}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other, "w") as copy:
        for entry in archive.infolist():
            content, is_numbers = archive.read(entry), "/data/" in entry.filename
            if is_numbers and change == "without numbers":
                continue
            if change == "big-endian" and entry.filename.endswith(BYTE_ORDER):
                content = b"big"
            how = zipfile.ZIP_DEFLATED if is_numbers and change == "compressed" else zipfile.ZIP_STORED
            copy.writestr(entry.filename, content[: -4 if is_numbers and change == "too few numbers" else None], how)
    assert plain_state(path) is not None
    assert plain_state(other) is None


def rewritten(path: Path, change: Any) -> None:
    """Write the archive again with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, change(content) if name.endswith(PICKLE) else content)


@given(places=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=3)), min_size=1, max_size=4))
def test_of_a_damaged_pickle_nothing_else_is_said_than_pytorch_says(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, bytes]]
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "m.pth"
    torch.save(OrderedDict(a=BASE, b=BASE.T, c=nn.Parameter(torch.ones(3, 2))), path)

    def damage(content: bytes) -> bytes:
        changed = bytearray(content)
        for at, new in places:
            at %= len(content)
            changed[at : at + len(new)] = new
        return bytes(changed[: len(content)])

    rewritten(path, damage)
    found = plain_state(path)
    event("nothing said" if found is None else "said")
    if found and all(isinstance(info, TensorInfo) and isinstance(name, str) for name, info in found.items()):
        with suppress(ValueError):  # PyTorch may refuse it, as it will when the tensors are to be read
            assert found == infos_of_pickle(path)


def one_tensor(path: Path, change: Any) -> Path:
    """Write an archive of one tensor [4, 6] whose pickle has been changed."""
    torch.save({"a": BASE}, path)
    rewritten(path, change)
    return path


def memo(obj: bytes, at: int) -> bytes:
    return obj + b"q" + bytes([at])


SHAPE = b"K\x04K\x06"  # of the tensor, as two numbers of a byte
# Each would take minutes or all memory, or end Python, if it were followed as far as it goes.
HOSTILE = {
    "a shape of very many sides": lambda pickle: pickle.replace(
        SHAPE + b"\x86", b"(" + memo(b"\x8a\xff" + b"\x7f" * 255, 200) + b"h\xc8" * 100_000 + b"t"
    ),
    "a deep key": lambda pickle: pickle[:2] + b"}K\x01" + b"\x85" * 200_000 + b"K\x01s0" + pickle[2:],
    "a table doubled by copying": lambda pickle: (
        pickle[:2]
        + b"ccollections\nOrderedDict\nq\xc8}"
        + b"".join(b"K" + bytes([i]) + b"K\x01s" for i in range(200))
        + b"q\xc9h\xc8h\xc9\x85R" * 50_000
        + pickle[2:]
    ),
    "instructions without end": lambda pickle: pickle[:2] + b"}0" * 5_000_000 + pickle[2:],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_not_followed(tmp_path: Path, kind: str) -> None:
    path = one_tensor(tmp_path / "m.pth", HOSTILE[kind])
    started = time.process_time()
    tracemalloc.start()
    try:
        found = plain_state(path)
    except ValueError as error:
        found = None
        assert kind == "a deep key" and "m.pth" in str(error)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found is None and peak < 100 << 20 and time.process_time() - started < 20
    if kind == "a shape of very many sides":
        with pytest.raises(ValueError, match=r"m\.pth"):
            open_checkpoint(path)


@pytest.mark.parametrize("shape", [b"]q\xc8(" + SHAPE + b"e", b"}q\xc8(K\x04NK\x06Nu"], ids=["list", "table"])
def test_a_shape_that_could_still_change_is_none(tmp_path: Path, shape: bytes) -> None:
    path = one_tensor(tmp_path / "m.pth", lambda pickle: pickle.replace(SHAPE + b"\x86", shape, 1))
    assert plain_state(path) is None
