import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from wanqwen.core.types import TensorInfo
from wanqwen.core.weights.gguf import read_gguf
from wanqwen.core.weights.reader import open_checkpoint, read_header
from wanqwen.core.weights.tensors import read_tensors
from wanqwen.core.weights.write import GGUF, SAFETENSORS, check_place, left_behind, write_file

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.bias": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0),
    "one": torch.tensor(2.5),
    "ünder.scored": torch.full((2, 1, 5), 7, dtype=torch.uint8),
}
INFOS = {
    "a.weight": TensorInfo("F32", (3, 4)),
    "a.bias": TensorInfo("BF16", (3,)),
    "none": TensorInfo("F32", (0,)),
    "one": TensorInfo("F32", ()),
    "ünder.scored": TensorInfo("U8", (2, 1, 5)),
}


def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path: Path) -> None:
    path, said = tmp_path / "model.safetensors", {"format": "pt", "about": 'a "quoted"\nword'}
    counted = []
    write_file(path, SAFETENSORS, INFOS, said, iter(TENSORS.items()), counted.append)
    assert path.stat().st_size == SAFETENSORS.size(INFOS, said)
    assert sum(counted) == path.stat().st_size
    infos, metadata = read_header(path)
    assert infos == INFOS and metadata == said
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == said and set(opened.keys()) == set(TENSORS)
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in TENSORS.items())
    assert all(info.start % 8 == 0 for name, info in infos.items() if name == "a.weight")


def test_gguf_is_read_by_us_and_by_the_package(tmp_path: Path) -> None:
    path, infos = tmp_path / "model.gguf", {name: info for name, info in INFOS.items() if info.dtype != "U8"}
    infos["q"] = TensorInfo("Q8_0", (2, 64))
    blocks = torch.from_numpy(gguf.quantize(torch.randn(2, 64).numpy(), gguf.GGMLQuantizationType.Q8_0))
    said = {"general.architecture": "wan", "general.file_type": 7, "note": "hers"}
    write_file(path, GGUF, infos, said, ((name, TENSORS.get(name, blocks)) for name in infos))
    assert path.stat().st_size == GGUF.size(infos, said)
    read, metadata = read_gguf(path)
    assert read == infos and metadata == {key: str(value) for key, value in said.items()}
    assert all(info.start % 32 == 0 for info in read.values())
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert found["q"].tensor_type.name == "Q8_0" and (found["q"].data == blocks.numpy()).all()
    assert list(found["a.weight"].shape) == [4, 3] and (found["a.weight"].data == TENSORS["a.weight"].numpy()).all()


def test_what_turns_out_smaller_than_planned_is_stated_as_it_is(tmp_path: Path) -> None:
    path, planned = tmp_path / "model.safetensors", {"packed": TensorInfo("U8", (100_000,)), **INFOS}
    content = {"packed": torch.arange(9, dtype=torch.uint8), **TENSORS}
    write_file(path, SAFETENSORS, planned, {}, iter(content.items()))
    found = open_checkpoint(path)
    assert found.tensors == {**INFOS, "packed": TensorInfo("U8", (9,))}
    assert all(torch.equal(tensor, content[name]) for name, tensor in read_tensors(found, content))


def failing(after: int, error: BaseException) -> Iterator[tuple[str, Tensor]]:
    for i, (name, tensor) in enumerate(TENSORS.items()):
        if i == after:
            raise error
        yield name, tensor


@pytest.mark.parametrize("after", range(len(TENSORS)))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "No space left")])
def test_a_file_is_whole_or_not_there(tmp_path: Path, after: int, error: BaseException) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / ".model.safetensors.0badf00d.part"
    path.write_text("what was there before")
    other.write_text("another program's")
    with pytest.raises(type(error)):
        write_file(path, SAFETENSORS, INFOS, {}, failing(after, error))
    assert path.read_text() == "what was there before"
    assert sorted(file.name for file in tmp_path.iterdir()) == [other.name, path.name]


def test_a_place_that_can_not_be_taken_does_not_cost_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(old: Path, new: Path) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    path = tmp_path / "model.safetensors"
    path.write_text("open in another program")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match=r"can't be replaced \(Access is denied\)\. The new file is whole.* rename it"):
        write_file(path, SAFETENSORS, INFOS, {}, TENSORS.items())
    [whole] = left_behind(path)
    assert path.read_text() == "open in another program"
    monkeypatch.undo()
    os.replace(whole, path)
    found = open_checkpoint(path)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read_tensors(found, found.tensors))


def test_a_file_takes_its_place_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "model.safetensors", []

    def synced(handle: int) -> None:
        calls.append((os.fstat(handle).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", synced)
    write_file(path, SAFETENSORS, INFOS, {}, TENSORS.items())
    assert calls[0] == (path.stat().st_size, False)


def test_a_name_that_the_system_refuses_is_said(tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 240}.safetensors"
    with pytest.raises(ValueError, match=r"can't be written .*: choose another name or folder"):
        write_file(path, SAFETENSORS, INFOS, {}, TENSORS.items())


@pytest.mark.skipif(os.name == "nt", reason="limits of processes are POSIX")
def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    infos = {f"{i}": TensorInfo("F32", (1 << 18,)) for i in range(8)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, before[1]))
        with pytest.raises(OSError):
            write_file(tmp_path / "m.safetensors", SAFETENSORS, infos, {}, ((n, torch.zeros(1 << 18)) for n in infos))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_place_is_checked_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.safetensors"
    source.write_text("x")
    taken, link = tmp_path / "taken.safetensors", tmp_path / "link.safetensors"
    taken.write_text("y")
    link.hardlink_to(source)
    check_place(tmp_path / "new.safetensors", 10, [source])
    check_place(taken, 10, [source], replace=True)
    for path, replace, complaint in (
        (taken, False, "exists: choose another name, or give --force"),
        (source, True, "is the file that is read"),
        (link, True, "is the file that is read"),
        (tmp_path, True, "is a folder"),
        (tmp_path / "none" / "new.safetensors", False, "there is no folder"),
    ):
        with pytest.raises(ValueError, match=complaint):
            check_place(path, 10, [source], replace)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    with pytest.raises(ValueError, match=r"will have 14\.30 GB, and .* has 1\.00 GB free"):
        check_place(tmp_path / "new.safetensors", 14_300_000_000, [source])


def test_a_header_is_json_that_any_reader_takes(tmp_path: Path) -> None:
    header = SAFETENSORS.header(INFOS, {}, 0)
    assert len(header) % 8 == 0 and int.from_bytes(header[:8], "little") == len(header) - 8
    assert json.loads(header[8:])["a.bias"] == {"dtype": "BF16", "shape": [3], "data_offsets": [48, 54]}
