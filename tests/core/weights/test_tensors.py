"""How tensors lie in the files that they are mapped from."""

import errno
import mmap
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wanqwen.core.types import Checkpoint
from wanqwen.core.weights import mapping
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.core.weights.tensors import read_tensors

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.bfloat16)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file(STATE, tmp_path / "mapped.safetensors")
    return open_checkpoint(tmp_path / "mapped.safetensors")


def maps_of(path: Path) -> list[str]:
    """Return how a file is mapped, once for each map."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f" {path}")]
    return [access for _, access, *_ in lines]


def is_open(path: Path) -> bool:
    found = Path("/proc/self/fd").iterdir()
    return any(os.readlink(file) == str(path) for file in found if file.is_symlink())


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="what is mapped is read from Linux's /proc")
@pytest.mark.parametrize(("how", "access"), [(mapping.READ_ONLY, "r--p"), ({"access": mmap.ACCESS_READ}, "r--s")])
def test_a_file_is_mapped_to_be_read_only_and_as_long_as_a_tensor_is_there(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, how: dict[str, int], access: str
) -> None:
    monkeypatch.setattr(mapping, "READ_ONLY", how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dict(read_tensors(checkpoint, STATE))
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())
    assert maps_of(checkpoint.path) == [access]
    row = found.pop("a")[1]
    found.clear()
    assert row.tolist() == [3, 4, 5] and maps_of(checkpoint.path) == [access]
    del row
    assert not maps_of(checkpoint.path) and not is_open(checkpoint.path)


@pytest.mark.parametrize("size", [0, 100])
def test_a_file_that_was_cut_off_since_is_said_to_be(checkpoint: Checkpoint, size: int) -> None:
    os.truncate(checkpoint.path, size)
    with pytest.raises(ValueError, match=r"mapped.safetensors ends before [ab] does: it was cut off"):
        dict(read_tensors(checkpoint, STATE))


def test_a_drive_that_maps_no_files_is_said_to(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(ValueError, match=r"mapped.safetensors can't be mapped .*: .* copy it to a disk"):
        dict(read_tensors(checkpoint, STATE))
