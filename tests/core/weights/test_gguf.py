"""GGUF containers: what they hold, and what is wrong with those that can't be."""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from wanqwen.core.types import TensorInfo
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.core.weights.tensors import read_tensors
from wanqwen.tests.gguf_files import Blocks, random_blocks, write

TENSORS: dict[str, torch.Tensor | Blocks] = {
    "a.weight": random_blocks("Q4_K", 3, 512),
    "b": torch.arange(6.0).reshape(1, 2, 3),
    "c.weight": torch.randn(2, 3, 1, 2, 2).half(),
    "d.bias": torch.tensor([1.5, -2.0]).bfloat16(),
    "e.weight": random_blocks("Q5_1", 5, 32),
}


def same(path: Path) -> bool:
    checkpoint = open_checkpoint(path)
    found = dict(read_tensors(checkpoint, checkpoint.tensors))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor[1] if isinstance(tensor, tuple) else tensor)
    return True


def test_header_is_what_the_file_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", TENSORS, {"wanqwen": '{"num_heads": 2}'})
    checkpoint = open_checkpoint(path)
    assert dict(checkpoint.tensors) == {
        "a.weight": TensorInfo("Q4_K", (3, 512)),
        "b": TensorInfo("F32", (1, 2, 3)),
        "c.weight": TensorInfo("F16", (2, 3, 1, 2, 2)),
        "d.bias": TensorInfo("BF16", (2,)),
        "e.weight": TensorInfo("Q5_1", (5, 32)),
    }
    assert checkpoint.metadata["general.architecture"] == "wan"
    assert checkpoint.metadata["wanqwen"] == '{"num_heads": 2}'
    assert same(path)


def test_a_set_of_parts_and_a_folder_are_opened(tmp_path: Path) -> None:
    names = list(TENSORS)
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for path, inside in zip(parts, (names[:2], names[2:]), strict=True):
        write(path, {name: TENSORS[name] for name in inside})
    assert same(parts[0]) and same(parts[1]) and same(tmp_path)
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"missing from .*m-00002-of-00002\.gguf"):
        open_checkpoint(parts[0])


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def fact(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def raw(
    path: Path, tensors: list[bytes], facts: Sequence[bytes] = (), data: int = 32, version: int = 3, alignment: int = 32
) -> Path:
    """Write a header of given parts, and `data` bytes after it."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(facts)) + b"".join(facts) + b"".join(tensors)
    path.write_bytes(header + bytes(-len(header) % alignment) + bytes(data))
    return path


def test_facts_of_every_kind_are_stepped_over(tmp_path: Path) -> None:
    scalars = {0: b"\1", 1: b"\1", 2: b"\1\0", 3: b"\1\0", 4: bytes(4), 5: bytes(4), 6: bytes(4), 7: b"\1"}
    scalars |= {10: bytes(8), 11: bytes(8), 12: bytes(8)}
    facts = [fact(f"one.{kind}", kind, value) for kind, value in scalars.items()]
    facts += [fact(f"nine.{kind}", 9, struct.pack("<IQ", kind, 9) + value * 9) for kind, value in scalars.items()]
    facts += [fact("words", 9, struct.pack("<IQ", 8, 2) + string("a") + string("bc")), fact("text", 8, string("é"))]
    found = open_checkpoint(raw(tmp_path / "m.gguf", [tensor("w", (2, 4), 0, 0)], facts))
    assert found.tensors == {"w": TensorInfo("F32", (2, 4))} and found.metadata["text"] == "é"
    assert "words" not in found.metadata and "nine.0" not in found.metadata


def test_the_alignment_of_the_file_is_kept(tmp_path: Path) -> None:
    facts = [fact("general.alignment", 4, struct.pack("<I", 1))]
    path = raw(tmp_path / "m.gguf", [tensor("abcd", (2,), 0, 0)], facts, data=8, alignment=1)
    content = bytearray(path.read_bytes())
    content[-8:] = struct.pack("<2f", 1.5, -3.0)
    path.write_bytes(content)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["abcd"].start % 4, "the tensor begins between two floats"
    [(_, found)] = read_tensors(checkpoint, ["abcd"])
    assert torch.equal(found, torch.tensor([1.5, -3.0]))


def test_a_shape_that_was_flattened_is_given_back(tmp_path: Path) -> None:
    shape = struct.pack("<IQ4i", 5, 4, 2, 1, 2, 2)
    facts = [fact("comfy.gguf.orig_shape.w", 9, shape)]
    found = open_checkpoint(raw(tmp_path / "m.gguf", [tensor("w", (2, 4), 0, 0)], facts))
    assert found.tensors["w"].shape == (2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"'w' is \[2, 5\], and said to have been \(2, 1, 2, 2\)"):
        open_checkpoint(raw(tmp_path / "m.gguf", [tensor("w", (2, 5), 0, 0)], facts, data=40))


HUGE = 1 << 62
BAD = {
    "version 1": ({"version": 1}, r"version 1: expected version 2 or 3"),
    "big-endian": ({"version": 3 << 24}, r"for big-endian machines"),
    "a format of the future": ({"tensors": [tensor("w", (8,), 99, 0)]}, None),
    "half a block": ({"tensors": [tensor("w", (2, 33), 8, 0)]}, r"\[2, 33\] in Q8_0, whose rows are multiples of 32"),
    "a number in blocks": ({"tensors": [tensor("w", (), 8, 0)]}, r"multiples of 32"),
    "nine dimensions": ({"tensors": [tensor("w", (1,) * 9, 0, 0)]}, r"9 dimensions"),
    "a name twice": ({"tensors": [tensor("w", (2,), 0, 0), tensor("w", (2,), 0, 8)]}, r"'w' is there twice"),
    "overlap": ({"tensors": [tensor("v", (8,), 0, 0), tensor("w", (2,), 0, 24)]}, r"'w' begins .* inside of 'v'"),
    "beyond the end": ({"tensors": [tensor("w", (9,), 0, 0)]}, r"cut off: w \(F32 \[9\]\) goes to byte"),
    "more than there is": ({"tensors": [tensor("w", (HUGE, HUGE), 0, 0)]}, r"'w' is said to be .* more than can be"),
    "nothing, endlessly": ({"tensors": [tensor("w", (0, HUGE, 256), 8, 0)]}, r"'w' is said to be .* more than can be"),
    "a petabyte": ({"tensors": [tensor("w", (1 << 48,), 0, 0)]}, r"cut off: w"),
    "far away": ({"tensors": [tensor("w", (2,), 0, HUGE)]}, r"cut off: w"),
    "a list without end": ({"facts": [fact("k", 9, struct.pack("<IQ", 0, HUGE))]}, r"cut off in its header"),
    "texts without end": ({"facts": [fact("k", 9, struct.pack("<IQ", 8, HUGE))]}, r"cut off in its header"),
    "a long name": ({"facts": [struct.pack("<Q", HUGE)]}, r"a name of \d+ bytes"),
    "lists of lists": ({"facts": [fact("k", 9, struct.pack("<IQ", 9, 1))]}, r"value of kind 9"),
    "a strange kind": ({"facts": [fact("k", 77, b"")]}, r"value of kind 77"),
    "not UTF-8": ({"facts": [struct.pack("<Q", 1) + b"\xff" + bytes(8)]}, r"not UTF-8"),
    "alignment 3": ({"facts": [fact("general.alignment", 4, struct.pack("<I", 3))]}, r"general\.alignment is 3"),
    "alignment 0": ({"facts": [fact("general.alignment", 4, bytes(4))]}, r"general\.alignment is 0"),
    "alignment in words": ({"facts": [fact("general.alignment", 8, string("32"))]}, r"general\.alignment is 32"),
    "a fact twice": ({"facts": [fact("k", 0, b"\0"), fact("k", 0, b"\0")]}, r"'k' is stated twice"),
    "no tensors": ({"tensors": []}, r"holds no tensors"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_can_not_be_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    parts, said = BAD[kind]
    path = raw(tmp_path / "bad.gguf", **{"tensors": [tensor("w", (8,), 0, 0)], **parts})
    if said is None:  # is named, and refused where it is to be used
        assert open_checkpoint(path).tensors["w"].dtype == "GGML type 99"
    else:
        with pytest.raises(ValueError, match=rf"bad\.gguf.*{said}"):
            open_checkpoint(path)


def test_every_cut_of_a_file_is_an_error(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", TENSORS).read_bytes().rstrip(b"\0")
    cut = tmp_path / "cut.gguf"
    for size in (*range(0, 900), *range(900, len(whole) - 32, 47)):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf.*download it again"):
            open_checkpoint(cut)


def test_a_gguf_file_under_another_name_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", TENSORS)
    path.rename(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors is a GGUF file under another name"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_opening_reads_no_weights_and_no_vocabulary(tmp_path: Path) -> None:
    """1,000 tensors of 1 TB, and a vocabulary as text encoders have it; were all that read, this would not end."""
    words = b"".join(string(f"word{i}") for i in range(300_000))
    facts = [fact("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 300_000) + words)]
    each = 1 << 30
    tensors = [tensor(f"blocks.{i}.weight", (each // 4,), 0, i * each) for i in range(1000)]
    path = raw(tmp_path / "big.gguf", tensors, facts, data=0)
    try:
        os.truncate(path, path.stat().st_size + 1000 * each)
    except OSError:
        pytest.skip("no sparse files of 1 TB here")
    assert len(open_checkpoint(path).tensors) == 1000
