"""Damaged and hostile files: an error of ours or a sound reading, never anything else.

`pytest tests/core/weights/test_fuzz.py --hypothesis-profile=fuzz` tries 30,000 of them.
"""

import json
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import save
from wanqwen.core.ops import formats
from wanqwen.core.storage import DTYPE_BYTES
from wanqwen.core.types import Checkpoint
from wanqwen.core.weights.gguf import SCALARS, TYPES, read_lists
from wanqwen.core.weights.reader import INDEX, open_checkpoint
from wanqwen.core.weights.tensors import read_tensors
from wanqwen.tests.gguf_files import random_blocks, write

# What a header of so many bytes may take in memory: objects for what it holds, but nothing for what it only promises.
FIXED, PER_BYTE = 256 << 10, 200

HUGE = (1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
sizes = st.one_of(st.integers(0, 40), st.sampled_from(HUGE))
names = st.one_of(st.sampled_from(["a", "blocks.0.ffn.0.weight", "__metadata__", "", "../x"]), st.text(max_size=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def holds(path: Path, content: bytes) -> None:
    """Write a file, open it and read all of it that can be; anything but a ValueError that names it is a failure."""
    path.unlink(missing_ok=True)  # a failure found before may hold the old file mapped, which must not shrink then
    path.write_bytes(content)
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(path)
    except ValueError as error:
        assert type(error) is ValueError and path.name.split(".")[0] in str(error), repr(error)
        event("refused")
        return
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < FIXED + PER_BYTE * size, f"{peak} bytes for a file of {size}"
    event("opened")
    inside(checkpoint)


def inside(checkpoint: Checkpoint) -> None:
    """Read every tensor of a kind that can be, and what its blocks mean; its bytes must be in the file."""
    for name, info in checkpoint.tensors.items():
        assert all(type(side) is int and side >= 0 for side in info.shape) and isinstance(info.dtype, str)
        file = checkpoint.location[name]
        try:
            [(_, tensor)] = read_tensors(checkpoint, [name])
        except ValueError as error:
            assert "can't be read" in str(error)
            continue
        assert info.start >= 0 and info.start + tensor.nbytes <= file.stat().st_size
        assert tensor.flatten().view(torch.uint8).sum(dtype=torch.int64) >= 0
        if tensor.dtype != torch.bool:
            assert formats.dequantise(tensor, None, torch.float32, info.dtype).shape == info.shape


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), sizes),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=8,
)
shapes = st.one_of(st.lists(st.integers(-2, 9), max_size=4), st.lists(sizes, max_size=3), json_values)
spans = st.one_of(st.lists(st.integers(0, 99), min_size=2, max_size=2), st.lists(sizes, max_size=3), json_values)
dtypes = st.one_of(st.sampled_from([*DTYPE_BYTES, "Q4_K", "F4", ""]), json_values)
entries = st.fixed_dictionaries({}, optional={"dtype": dtypes, "shape": shapes, "data_offsets": spans})
headers = st.dictionaries(names, st.one_of(entries, json_values), max_size=4)


@st.composite
def sound_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Return a header whose tensors follow one another, and the bytes that they take."""
    header, end = {}, 0
    for name in draw(st.lists(names.filter(lambda name: name != "__metadata__"), min_size=1, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPE_BYTES)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        size = DTYPE_BYTES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, end


@given(
    header=st.one_of(sound_headers(), st.tuples(headers, st.integers(0, 200))),
    length=st.one_of(st.none(), st.none(), sizes),
)
def test_safetensors_of_any_header(folder: Path, header: tuple[Any, int], length: int | None) -> None:
    text = json.dumps(header[0]).encode()
    stated = len(text) if length is None else length
    path = folder / "m.safetensors"
    holds(path, struct.pack("<Q", stated) + text + bytes(header[1]))


WHOLE = save({"a.weight": torch.ones(3, 4), "b": torch.ones(2).bfloat16(), "c": torch.ones(5, dtype=torch.uint8)})
PLACES = st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=9)), max_size=6)


def damaged(whole: bytes, places: list[tuple[int, bytes]], cut: int) -> bytes:
    content = bytearray(whole)
    for at, new in places:
        content[at : at + len(new)] = new
    return bytes(content[: len(content) - cut])


@given(places=PLACES, cut=st.integers(0, 40))
def test_safetensors_with_damage(folder: Path, places: list[tuple[int, bytes]], cut: int) -> None:
    path = folder / "m.safetensors"
    holds(path, damaged(WHOLE, places, cut))


def text_of(text: str, length: int | None = None) -> bytes:
    content = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(content) if length is None else length) + content


facts = st.one_of(
    st.builds(lambda value: struct.pack("<IQ", 10, value), sizes),
    st.builds(lambda kind, value: struct.pack("<I", kind) + value, st.integers(0, 14), st.binary(max_size=12)),
    st.builds(lambda text: struct.pack("<I", 8) + text_of(text), st.text(max_size=8)),
    st.builds(
        lambda kind, count, items: struct.pack("<IIQ", 9, kind, count) + items,
        st.sampled_from([*SCALARS, 8, 9]),
        sizes,
        st.binary(max_size=60),
    ),
)
keys = st.one_of(st.sampled_from(["general.alignment", "comfy.gguf.orig_shape.a", "k"]), st.text(max_size=6))


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    """Return a header that is sound but for what is drawn to be strange, and some bytes after it."""
    parts = [text_of(key) + draw(facts) for key in draw(st.lists(keys, max_size=3))]
    num_facts, end = len(parts), 0
    tensor_names = draw(st.lists(names, min_size=1, max_size=4, unique=draw(st.booleans())))
    for name in tensor_names:
        shape = draw(
            st.lists(st.integers(0, 3), max_size=3) if draw(st.integers(0, 3)) else st.lists(sizes, max_size=9)
        )
        if draw(st.integers(0, 3)):
            shape = [256 * draw(st.integers(0, 2)), *shape]
        kind = draw(st.one_of(st.sampled_from([*TYPES]), st.integers(0, 99)))
        offset = end if draw(st.integers(0, 5)) else draw(st.one_of(st.integers(0, 3000), st.sampled_from(HUGE)))
        parts.append(text_of(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        end += 1 << 14
    counts = [count if draw(st.integers(0, 9)) else draw(sizes) for count in (len(tensor_names), num_facts)]
    version = 3 if draw(st.integers(0, 9)) else draw(st.integers(0, 4))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(parts)
    return header + bytes(
        -len(header) % 32 + (draw(st.integers(0, end + (1 << 14))) if draw(st.booleans()) else end + (1 << 14))
    )


@given(content=gguf_files())
def test_gguf_of_any_header(folder: Path, content: bytes) -> None:
    path = folder / "m.gguf"
    holds(path, content)
    path.write_bytes(content)
    with suppress(ValueError):  # nothing else
        assert all(len(found) <= len(content) for found in read_lists(path, ["k"]).values())


@pytest.fixture(scope="module")
def whole_gguf(folder: Path) -> bytes:
    tensors = {"a.weight": random_blocks("Q4_K", 2, 256), "b": torch.ones(3, 4), "c": random_blocks("Q8_0", 1, 32)}
    path = write(folder / "whole.gguf", tensors, {"wanqwen": "{}"})
    content = path.read_bytes()
    path.unlink()
    return content


@given(places=PLACES, cut=st.integers(0, 400))
def test_gguf_with_damage(folder: Path, whole_gguf: bytes, places: list[tuple[int, bytes]], cut: int) -> None:
    path = folder / "m.gguf"
    holds(path, damaged(whole_gguf, places, cut))


SHARDS = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
shard_names = st.one_of(
    st.sampled_from([*SHARDS, f"m{INDEX}", "", ".", "..", "/", "x" * 300, "a\0b", "\ud800", "C:m"]), json_values
)
indices = st.one_of(
    st.fixed_dictionaries({"weight_map": st.dictionaries(names, shard_names, max_size=4)}),
    st.fixed_dictionaries({"weight_map": json_values}),
    json_values,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for i, name in enumerate(SHARDS):
        (folder / name).write_bytes(save({f"{i}.weight": torch.ones(2, 3)}))
    return folder


@given(index=indices)
def test_index_of_anything(shards: Path, index: Any) -> None:
    path = shards / f"m{INDEX}"
    holds(path, json.dumps(index).encode())


@given(places=PLACES, cut=st.integers(0, 30))
def test_index_with_damage(shards: Path, places: list[tuple[int, bytes]], cut: int) -> None:
    path = shards / f"m{INDEX}"
    sound = json.dumps({"weight_map": {"0.weight": SHARDS[0], "1.weight": SHARDS[1]}}).encode()
    holds(path, damaged(sound, places, cut))


def test_depth_and_long_numbers_are_refused(folder: Path, shards: Path) -> None:
    for text in (b"[" * 200_000, b'{"weight_map": ' + b"9" * 5000 + b"}", b'{"a": [' + b"9" * 5000 + b"]}"):
        (shards / f"m{INDEX}").write_bytes(text)
        (folder / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        for path in (shards / f"m{INDEX}", folder / "m.safetensors"):
            with pytest.raises(ValueError, match="download it again"):
                open_checkpoint(path)
