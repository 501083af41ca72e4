import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from wanqwen.core.types import TensorInfo
from wanqwen.core.weights.reader import INDEX, open_checkpoint
from wanqwen.core.weights.tensors import read_tensors

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "c": torch.ones(4, dtype=torch.float8_e4m3fn),
    "empty": torch.zeros(0),
}


def write(path, tensors=TENSORS, metadata=None):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_shards(folder, index=True, stem="model"):
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    inside = [{"a.weight": TENSORS["a.weight"]}, {name: TENSORS[name] for name in ("b", "c", "empty")}]
    for name, tensors in zip(names, inside, strict=True):
        write(folder / name, tensors)
    weight_map = {tensor: name for name, tensors in zip(names, inside, strict=True) for tensor in tensors}
    if index:
        (folder / f"{stem}{INDEX}").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / name for name in names]


def same(checkpoint):
    found = dict(read_tensors(checkpoint, checkpoint.tensors))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    return True


def test_header_is_what_the_file_holds(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m.safetensors", metadata={"format": "pt"}))
    assert checkpoint.tensors["a.weight"] == TensorInfo("F32", (2, 3))
    assert checkpoint.tensors["c"] == TensorInfo("F8_E4M3", (4,))
    assert checkpoint.metadata == {"format": "pt"}
    assert same(checkpoint)


def test_opening_reads_no_weights(tmp_path):
    """A sparse file of 1 TB opens; were its weights read, this would not end."""
    path = write_raw(
        tmp_path / "big.safetensors", {"w": {"dtype": "F16", "shape": [1 << 39], "data_offsets": [0, 1 << 40]}}
    )
    try:
        os.truncate(path, path.stat().st_size + (1 << 40))
    except OSError:
        pytest.skip("no sparse files of 1 TB here")
    assert open_checkpoint(path).tensors["w"].shape == (1 << 39,)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("ask", ["first", "second", "folder"])
def test_every_way_into_a_set_of_shards(tmp_path, index, ask):
    first, second = write_shards(tmp_path, index)
    assert same(open_checkpoint({"first": first, "second": second, "folder": tmp_path}[ask]))


def test_the_index_itself_opens_the_set(tmp_path):
    write_shards(tmp_path)
    assert same(open_checkpoint(tmp_path / f"model{INDEX}"))


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard_is_named(tmp_path, index):
    first, second = write_shards(tmp_path, index)
    second.unlink()
    with pytest.raises(ValueError, match=r"missing from .*model-00002-of-00002"):
        open_checkpoint(first)


def test_a_name_in_two_shards_is_an_error(tmp_path):
    first, second = write_shards(tmp_path)
    write(second, TENSORS)
    with pytest.raises(ValueError, match=r"a\.weight is both in"):
        open_checkpoint(first)


def test_index_may_not_leave_its_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    write(tmp_path / "m.safetensors")
    (inner / f"m{INDEX}").write_text(json.dumps({"weight_map": {"a.weight": "../m.safetensors"}}))
    with pytest.raises(ValueError, match="other folders"):
        open_checkpoint(inner / f"m{INDEX}")


def test_folder_with_one_file(tmp_path):
    write(tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert same(open_checkpoint(tmp_path))


def test_ambiguous_folder_lists_what_it_holds(tmp_path):
    write(tmp_path / "one.safetensors")
    write(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"one\.safetensors, two\.safetensors"):
        open_checkpoint(tmp_path)


def test_pipeline_folder_says_which_folders_it_has(tmp_path):
    (tmp_path / "vae").mkdir()
    write(tmp_path / "vae" / "m.safetensors")
    with pytest.raises(ValueError, match="name one of its folders: vae"):
        open_checkpoint(tmp_path)


def test_every_cut_of_a_file_is_an_error(tmp_path):
    whole = write(tmp_path / "m.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.safetensors.*download it again"):
            open_checkpoint(cut)


SPAN = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "not json": b"{nonsense",
    "not utf-8": b"\xff\xfe{}",
    "a list": b"[]",
    "deep": b"[" * 200_000,
    "no dtype": {"w": {"shape": [2], "data_offsets": [0, 8]}},
    "wrong size": {"w": {**SPAN, "shape": [3]}},
    "gap": {"w": {**SPAN, "data_offsets": [4, 12]}},
    "overlap": {"v": SPAN, "w": {**SPAN, "data_offsets": [4, 12]}},
    "backwards": {"w": {**SPAN, "data_offsets": [8, 0]}},
    "text for a shape": {"w": {**SPAN, "shape": "2"}},
    "a name twice": b'{"w": %s, "w": %s}' % (json.dumps(SPAN).encode(), json.dumps(SPAN).encode()),
    "a side of less than nothing": {"w": {**SPAN, "shape": [-1, -2]}},
    "half a side": {"w": {**SPAN, "shape": [2.0]}},
    "truth for a side": {"w": {**SPAN, "shape": [2, True]}},
    "a number for a dtype": {"w": {**SPAN, "dtype": 32}},
    "nothing, endlessly": {"v": SPAN, "w": {**SPAN, "shape": [0, 1 << 63], "data_offsets": [8, 8]}},
    "no tensors": {"__metadata__": {"a": "b"}},
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_bad_header_is_one_clear_error(tmp_path, kind):
    path = write_raw(tmp_path / "bad.safetensors", BAD_HEADERS[kind], b"" if kind == "no tensors" else bytes(8))
    with pytest.raises(ValueError, match=r"bad\.safetensors.*download it again"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\xff" * 100, "not a safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_told_apart(tmp_path, content, said):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        open_checkpoint(path)


def test_missing_file_and_strange_suffix(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "m.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected \.safetensors"):
        open_checkpoint(tmp_path / "m.onnx")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_pickled_state_dict_plain_or_nested(tmp_path, wrap):
    torch.save(wrap(TENSORS), tmp_path / "m.pth")
    assert same(open_checkpoint(tmp_path / "m.pth"))


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("container", ["zip", "bare"])
def test_pickle_that_runs_code_is_refused_unrun(tmp_path, container):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    if container == "zip":
        torch.save({"w": torch.zeros(1), "x": Evil(marker)}, path)
        assert b"mkdir" in zipfile.ZipFile(path).read("evil/data.pkl")
    else:
        path.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        open_checkpoint(path)
    assert not marker.exists()


def test_truncated_and_foreign_pickles_are_clear_errors(tmp_path):
    torch.save(TENSORS, tmp_path / "m.pth")
    whole = (tmp_path / "m.pth").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "m.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m\.pth"):
            open_checkpoint(tmp_path / "m.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict"):
        open_checkpoint(tmp_path / "list.pth")
    torch.save({"epoch": 3, "w": torch.zeros(1)}, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match="other things under epoch"):
        open_checkpoint(tmp_path / "mixed.pth")


def test_identity_follows_the_content(tmp_path):
    path = write(tmp_path / "m.safetensors")
    before = open_checkpoint(path).identity
    assert before == open_checkpoint(path).identity
    write(path, {"a.weight": torch.zeros(7)})
    assert open_checkpoint(path).identity != before
