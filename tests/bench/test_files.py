"""What benches measure is what they say: files are whole, and ways of loading bring all of a file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from wanqwen.bench import inspect_files, load_file
from wanqwen.bench.files import shapes_of, write_random
from wanqwen.bench.models import WAN
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.core.weights.tensors import read_tensors
from wanqwen.families import identify
from wanqwen.wan.config import WanConfig

SMALL = WanConfig(dim=128, ffn_dim=192, num_heads=1, num_layers=2, text_dim=64)


def test_random_files_are_whole(tmp_path: Path) -> None:
    shapes = shapes_of(WAN, SMALL)
    found = open_checkpoint(write_random(tmp_path / "m.safetensors", shapes))
    assert {name: info.shape for name, info in found.tensors.items()} == shapes
    assert all(tensor.float().std() > 0.01 for _, tensor in read_tensors(found, found.tensors) if tensor.numel() > 99)


def test_every_way_of_loading_brings_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_random(tmp_path / "m.safetensors", shapes_of(WAN, SMALL))
    assert bytes(load_file.floor(path)) == path.read_bytes()
    whole = load_file.mapped(path)
    crossed: list[bytes] = []
    monkeypatch.setattr(load_file._NoCopies, "load", lambda link, slot, device, host: crossed.append(_content(host)))
    for way in (load_file.card, load_file.slabs):
        loaded = way(path)
        for block, held in zip(WAN.blocks(whole), crossed, strict=True):
            parts = [part for part in block.state_dict().values() if part.numel() > 99]
            assert parts and all(_content(part) in held for part in parts)
        others = {name: part for name, part in loaded.module.state_dict().items() if not part.is_meta}
        assert others and all(torch.equal(part, whole.state_dict()[name]) for name, part in others.items())
        kept = [_content(loaded.masters[i].bytes) for i in sorted(loaded.masters)]
        assert kept == ([] if way is load_file.card else crossed)
        crossed.clear()


def _content(tensor: Tensor) -> bytes:
    return load_file._bytes(tensor).numpy().tobytes()


def test_one_model_in_each_container_is_the_same(tmp_path: Path) -> None:
    files = inspect_files.write_all(tmp_path, shapes_of(WAN, SMALL))
    found = [identify(open_checkpoint(path)) for path in files]
    assert len(found) == 4 and len({(one.variant, one.config) for one in found}) == 1
    assert all(not one.missing and not one.unexpected for one in found)
