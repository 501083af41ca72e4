"""DFloat11 files as published and as we write them: what they hold, and what is said of files that are not whole."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wanqwen.__main__ import main
from wanqwen.conversion import convert
from wanqwen.core.types import Checkpoint
from wanqwen.core.weights.convert import Wish
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.core.weights.tensors import read_tensors
from wanqwen.families import identify
from wanqwen.loading import load_model
from wanqwen.tests import dfloat11_reference
from wanqwen.tests.dfloat11_files import words, write_bf16, write_dfloat11, write_pair, write_published

from ...manifests import manifest
from ...nodes import tiny

QWEN, WAN = "qwen_df11_transformer", "wan21_df11_t2v_14B_diffusers_PARTIAL"


@pytest.mark.parametrize("has_config", [True, False])
def test_the_published_qwen_image_is_a_whole_model(
    tmp_path: Path, has_config: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = manifest(QWEN)
    [layers] = found["config_json"]["dfloat11_config"]["pattern_dict"].values()
    path = write_published(tmp_path / "Qwen-Image-Edit-2509-DF11.safetensors", found["tensors"], layers)
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps(found["config_json"]))
    for place in (path, tmp_path):
        identity = identify(open_checkpoint(place))
        assert (identity.variant, identity.weight_format) == ("edit-2509", "dfloat11")
        assert not identity.missing and not identity.unexpected and identity.config.num_layers == 60
    handle = load_model(path)
    assert handle.checkpoint.tensors["transformer_blocks.7.img_mlp.net.2.weight"].shape == (3072, 12288)
    main(["inspect", str(path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "dfloat11" and 20.4e9 < facts["parameters"] < 20.5e9
    main(["plan", "--model", str(path), "--size", "1328x1328", "--json", "--vram", "24"])
    plan = json.loads(capsys.readouterr().out)
    # A block as it is stored; one in bf16, 0.68 GB, is a part of what computation takes.
    assert 0.46 < plan["block_gb"] < 0.49 and plan["computation_gb"] > 0.68 and plan["peak_gb"] < 24


def published_wan(folder: Path) -> Path:
    """Write the published Wan in its folder, a file for each of the blocks whose sizes are known, numbered anew."""
    found = manifest(WAN)
    [layers] = found["config_json"]["dfloat11_config"]["pattern_dict"].values()
    files: dict[str, dict] = {}
    for name, info in found["tensors"].items():
        if match := re.match(r"blocks\.(\d+)\.(.*)", name):
            number = found["blocks_listed"].index(int(match[1]))
            files.setdefault(f"blocks_{number}", {})[f"blocks.{number}.{match[2]}"] = info
        else:
            files.setdefault("diffusion_pytorch_model", {})[name] = info
    for stem, tensors in files.items():
        write_published(folder / f"{stem}.safetensors", tensors, layers)
    (folder / "config.json").write_text(json.dumps(found["config_json"]))
    return folder


def test_the_published_wan_is_one_model_of_a_file_for_each_block(tmp_path: Path) -> None:
    folder = published_wan(tmp_path)
    for place in (folder, folder / "blocks_3.safetensors", folder / "diffusion_pytorch_model.safetensors"):
        identity = identify(open_checkpoint(place))
        assert (identity.role, identity.weight_format) == ("diffusion_model", "dfloat11")
        assert identity.config.num_layers == 11 and identity.config.dim == 5120
        # The manifest is a part of the header: the head's own projection and the rest of it are there.
        assert not identity.missing and not identity.unexpected, identity
    assert len(load_model(folder).checkpoint.groups) == 11
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="holds several checkpoints"):
        open_checkpoint(folder)


def test_a_file_of_ours_and_its_config_leave_a_folder_of_several_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"dfloat11_config": {"pattern_dict": {r"blocks\.\d+": ["ffn.0"]}}})
    )
    for name in ("ours.safetensors", "another.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds several checkpoints: another\.gguf, ours\.safetensors"):
        open_checkpoint(tmp_path)


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return dict(read_tensors(checkpoint, checkpoint.tensors))


def same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[key].view(torch.uint8), wanted[key].view(torch.uint8)) for key in wanted
    )


@pytest.mark.parametrize("name", ["wan_dit", "qwen_dit"])
def test_what_is_converted_is_read_again_with_its_config_and_without(tmp_path: Path, name: str) -> None:
    plain, made = write_pair(name, tmp_path)
    wanted = weights_of(open_checkpoint(plain))
    config = json.loads((made.parent / "config.json").read_text())["dfloat11_config"]
    assert config["threads_per_block"] == [512] and config["bytes_per_thread"] == 8
    assert made.stat().st_size < 0.8 * plain.stat().st_size
    for path in (made, made.parent):
        assert same_bits(weights_of(open_checkpoint(path)), wanted)
    (made.parent / "config.json").unlink()
    checkpoint = open_checkpoint(made)
    assert same_bits(weights_of(checkpoint), wanted) and len(checkpoint.groups) == 4
    identity = identify(checkpoint)
    assert identity.weight_format == "dfloat11" and not identity.missing and not identity.unexpected


def test_what_was_converted_is_converted_back(tmp_path: Path) -> None:
    plain, made = write_pair("wan_dit", tmp_path)
    back = convert(made, tmp_path / "back.safetensors", Wish(target="bf16"), lambda text: None)
    other = write_dfloat11(made, tmp_path / "diffusers.safetensors", spelling="diffusers")
    found, wanted = load_file(back), load_file(plain)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    assert same_bits(found, {name: tensor.bfloat16() for name, tensor in wanted.items()})
    assert not [key for key in open_checkpoint(back).metadata if key.startswith("dfloat11_")]
    layers = json.loads(open_checkpoint(other).metadata["dfloat11_config"])["pattern_dict"]
    assert layers == manifest(WAN)["config_json"]["dfloat11_config"]["pattern_dict"], "the very groups of the published"
    with pytest.raises(ValueError, match=r"is DFloat11, .*choose dfloat11, or bf16"):
        convert(made, tmp_path / "same.safetensors", Wish(spelling="diffusers"), lambda text: None)


def test_weights_that_the_format_can_not_hold_are_named_and_can_be_kept(tmp_path: Path) -> None:
    plain = write_bf16(tiny.write_qwen_model(tmp_path / "source.safetensors"), tmp_path / "plain.safetensors")
    state, name = load_file(plain), "transformer_blocks.1.attn.to_k.weight"
    state[name][3, 4] = torch.inf
    save_file(state, plain, dict(open_checkpoint(plain).metadata))
    out = tmp_path / "df11.safetensors"
    with pytest.raises(ValueError, match=rf"{name} can't be compressed .*infinite values or NaN\. --keep {name}"):
        write_dfloat11(plain, out)
    assert not out.exists() and len(list(tmp_path.iterdir())) == 2
    checkpoint = open_checkpoint(write_dfloat11(plain, out, keep=(name,)))
    assert same_bits(weights_of(checkpoint), load_file(plain))
    assert [len(weights) for weights in checkpoint.groups.values()] == [14, 13]
    load_model(out)


def test_a_file_of_another_model_beside_is_left_alone(tmp_path: Path) -> None:
    """A folder of ComfyUI's holds many models, and the config of one of them at most."""
    plain, made = write_pair(tiny.write_qwen_model(tmp_path / "source.safetensors"), tmp_path)
    other = plain.rename(made.with_name("other.safetensors"))
    assert identify(open_checkpoint(other)).weight_format == "bf16"
    assert identify(open_checkpoint(made)).weight_format == "dfloat11"
    second, said = made.with_name("second.safetensors"), []
    before = (made.parent / "config.json").read_bytes()
    convert(other, second, Wish(target="dfloat11"), said.append)
    assert (made.parent / "config.json").read_bytes() == before and "stays as it is" in said[-1]


def test_the_official_loader_finds_its_way_through_our_files(tmp_path: Path) -> None:
    """What it does with names, config and tensors, done here, on the class of diffusers that it is used with."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 24}
    build: Callable[[], nn.Module] = lambda: diffusers.QwenImageTransformer2DModel(  # noqa: E731
        **sizes, in_channels=16, out_channels=4, axes_dims_rope=(8, 12, 12)
    ).bfloat16()
    wanted = build()
    plain, own = tmp_path / "plain.safetensors", {"axes": [8, 12, 12], "num_heads": 2}
    save_file({n: tensor.clone() for n, tensor in wanted.state_dict().items()}, plain, {"wanqwen": json.dumps(own)})
    (tmp_path / "df11").mkdir()
    write_dfloat11(plain, tmp_path / "df11" / "model.safetensors")
    config = json.loads((tmp_path / "df11" / "config.json").read_text())["dfloat11_config"]
    [published] = manifest(QWEN)["config_json"]["dfloat11_config"]["pattern_dict"].items()
    assert config["pattern_dict"] == dict([published]), "the very groups of the published file"
    model = build()
    for parameter in model.parameters():
        parameter.data.zero_()
    groups: dict[str, dict[str, Tensor]] = {}
    for file in (tmp_path / "df11").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name in model.state_dict():
                assert model.get_parameter(name).shape == tensor.shape
                model.get_parameter(name).data.copy_(tensor)
            else:
                module, _, kind = name.rpartition(".")
                assert model.get_submodule(module) is not None
                groups.setdefault(module, {})[kind] = tensor
    for module, planes in groups.items():
        [layers] = [names for pattern, names in config["pattern_dict"].items() if re.fullmatch(pattern, module)]
        parts = dfloat11_reference.decode(planes).tensor_split(planes["split_positions"])
        for layer, part in zip(layers, parts, strict=True):
            linear = model.get_submodule(f"{module}.{layer}")
            linear.weight.data = part.view(linear.out_features, linear.in_features)
    assert len(groups) == 2
    for (name, found), true in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(words(found), words(true)), name


def damaged(tmp_path: Path, change: Callable[[dict[str, Tensor], dict], None]) -> Path:
    """Write a small model as the official tool does, with its config beside, and with something changed."""
    _, made = write_pair(tiny.write_qwen_model(tmp_path / "source.safetensors"), tmp_path)
    state, config = load_file(made), made.with_name("config.json")
    own, said = open_checkpoint(made).metadata["wanqwen"], json.loads(config.read_text())
    change(state, said["dfloat11_config"])
    save_file(state, made, {"wanqwen": own})
    config.write_text(json.dumps(said))
    return made.parent


BLOCK = "transformer_blocks.1."


def without(name: str) -> Callable[[dict[str, Tensor], dict], None]:
    return lambda state, config: state.__delitem__(BLOCK + name)


def changed(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor], dict], None]:
    return lambda state, config: state.update({BLOCK + name: tensor})


def said(**values: object) -> Callable[[dict[str, Tensor], dict], None]:
    return lambda state, config: config.update(values)


DAMAGES = {
    "lacks a plane": (without("gaps"), "transformer_blocks.1: a DFloat11 group without gaps"),
    "lacks its splits": (without("split_positions"), "holds 1 weights, and its config names 14"),
    "plane of another size": (
        changed("gaps", torch.zeros(5, dtype=torch.uint8)),
        r"don't belong together .*gaps \[5\]",
    ),
    "plane of another dtype": (changed("sign_mantissa", torch.zeros(9)), "parts of a DFloat11 group are F32"),
    "splits out of order": (
        changed("split_positions", torch.arange(13).flip(0)),
        r"divides \d+ weights at 11, after 12",
    ),
    "splits of another kind": (changed("split_positions", torch.zeros(13)), r"is F32 \[13\], expected one row of I64"),
    "bias that does not fit": (
        changed("attn.to_q.bias", torch.zeros(47)),
        r"2304 weights of .*attn.to_q.weight don't fit its bias \[47\]",
    ),
    "no bias": (without("attn.to_q.bias"), "nothing says how many rows .*attn.to_q.weight has"),
    "a weight twice": (
        changed("attn.to_q.weight", torch.zeros(48, 48)),
        "attn.to_q.weight is both in a DFloat11 group and apart from it",
    ),
    "another geometry": (said(bytes_per_thread=4), "says bytes_per_thread 4, and only 8 can be read"),
    "no such order": (said(pattern_dict={"other": []}), "nothing says which weights .* in which order: put the config"),
    "no table": (said(pattern_dict=[1]), "pattern_dict in its DFloat11 config is no table"),
    "no pattern": (said(pattern_dict={"(": []}), "'\\(' in its DFloat11 config is no pattern"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_files_that_are_not_whole_are_refused_before_a_weight_is_read(
    tmp_path: Path, change: Callable[[dict[str, Tensor], dict], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_checkpoint(damaged(tmp_path, change))


def test_a_file_whose_order_nobody_published_is_refused_without_its_config(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "wan.safetensors")
    _, made = write_pair(source, tmp_path)
    save_file(load_file(made), tmp_path / "bare.safetensors", {"wanqwen": open_checkpoint(source).metadata["wanqwen"]})
    with pytest.raises(ValueError, match=r"bare\.safetensors: nothing says which weights the DFloat11 group blocks\.0"):
        open_checkpoint(tmp_path / "bare.safetensors")


def test_a_published_order_is_known_without_a_config(tmp_path: Path) -> None:
    folder = damaged(tmp_path, lambda state, config: None)
    (folder / "config.json").unlink()
    assert same_bits(weights_of(open_checkpoint(folder)), load_file(tmp_path / "bf16.safetensors"))
