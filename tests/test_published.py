"""Published files as people have them: renamed, in another order, cut, changed, or turned into GGUF."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from wanqwen.__main__ import main
from wanqwen.core.ops.formats import layout
from wanqwen.core.storage import companion
from wanqwen.core.types import Checkpoint, Identity, TensorInfo
from wanqwen.core.weights.assemble import Weights, prepare
from wanqwen.core.weights.keymap import Renamer
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.families import family, identify
from wanqwen.loading import load_model
from wanqwen.plans import Question, facts
from wanqwen.qwen_image.keymap import LANGUAGE_MODEL_GGUF
from wanqwen.wan.keymap import TEXT_ENCODER_GGUF
from wanqwen.wan.vae import WanVAE

from .gguf_files import write_sparse
from .manifests import MANIFESTS, checkpoint, fake

NO_MODELS = ("lora_", "name_maps", "_df11_", "vace_module")
FILES = sorted(path.name.removesuffix(".json.gz") for path in MANIFESTS.iterdir())
FILES = [name for name in FILES if not any(part in name for part in NO_MODELS)]
PREFIX = "model.diffusion_model."


def facts_of(identity: Identity) -> tuple[object, ...]:
    return identity.family, identity.role, identity.variant, identity.weight_format, identity.config


def prepared(found: Checkpoint, identity: Identity) -> Weights | None:
    """Return how a model or a VAE would be loaded; encoders are built by other means."""
    if identity.role == "diffusion_model":
        known = family(identity.family)
        build, float32 = (lambda: known.build(identity.config)), known.float32
    elif identity.role == "vae":
        build, float32 = (lambda: WanVAE(identity.config)), (lambda name: False)
    else:
        return None
    return prepare(build, identity.names, found, float32=float32, dtype=torch.bfloat16, ignored=identity.ignored)


def changed(found: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
    return fake(tensors, path=found.path)


@pytest.mark.parametrize("name", FILES)
def test_order_and_prefix_change_nothing_and_every_key_has_its_place(name: str) -> None:
    found = checkpoint(name)
    identity = identify(found)
    names = list(found.tensors)
    random.Random(0).shuffle(names)
    is_bare = identity.role == "diffusion_model" and not names[0].startswith(PREFIX)
    prefix = PREFIX if is_bare else ""
    other = changed(found, {prefix + key: found.tensors[key] for key in names})
    again = identify(other)
    assert facts_of(again) == facts_of(identity)
    assert not again.missing and not again.unexpected
    assert {key.removeprefix(prefix) for key in again.names.values()} == set(identity.names.values())
    if without_records := not any(key.endswith(".comfy_quant") for key in names):
        prepared(other, again)
    assert without_records or "fp8mixed" in name, "records are read from the file itself"


def some_weights(name: str, identity: Identity, count: int) -> list[str]:
    """Return the official names of some weights, others in each file."""
    weights = sorted(official for official in identity.names if companion(official) is None)
    return random.Random(name).sample(weights, count)


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_is_gone_is_named(name: str) -> None:
    found = checkpoint(name)
    identity = identify(found)
    for official in some_weights(name, identity, 3):
        key = identity.names[official]
        rest = changed(found, {other: info for other, info in found.tensors.items() if other != key})
        try:
            assert identify(rest).missing == (official,)
        except ValueError as error:  # what tells the kind or the size of the model is gone
            assert official in str(error) or "none of the models" in str(error)


@pytest.mark.parametrize("name", FILES)
def test_a_key_of_another_shape_is_named(name: str) -> None:
    found = checkpoint(name)
    identity = identify(found)
    if "fp8mixed" in name or prepared(found, identity) is None:
        return
    for official in some_weights(name, identity, 1):
        key = identity.names[official]
        info = found.tensors[key]
        again = changed(found, {**found.tensors, key: replace(info, shape=(*info.shape[:-1], info.shape[-1] + 1))})
        try:
            prepared(again, identify(again))
        except ValueError as error:
            # Of a tensor that tells a size, all that don't have that size are named, the first few of them at least.
            assert official in str(error) or "of another shape" in str(error) or "looks like" in str(error)
        else:
            raise AssertionError(f"{official} was taken in another shape")


# GGUF. What stays out of blocks, and what gets more bits, by the tools that make these files.
WHOLE = (
    *("modulation", "patch_embedding.", "text_embedding.", "time_projection.", "time_embedding.", "img_emb.", "head."),
    *("img_in.", "txt_in.", "time_text_embed.", "norm_out.", "proj_out."),
)
MORE_BITS = (".v.weight", ".to_v.weight", ".ffn.2.weight", ".net.2.weight", "ffn_down.weight", "attn_v.weight")
LLAMA = {"wan21": TEXT_ENCODER_GGUF, "qwen-image": LANGUAGE_MODEL_GGUF}
# Manifest -> the format of most weights, that of some, and what the file is then.
GGUF = {
    "wan21_official_t2v_1.3B": ("Q8_0", "Q8_0", "t2v-1.3B"),
    "wan21_official_t2v_14B": ("Q4_K", "Q6_K", "t2v-14B"),
    "wan21_official_i2v_14B_480P_and_720P": ("Q3_K", "Q4_K", "i2v-14B"),
    "wan21_official_flf2v_14B_720P": ("Q5_K", "Q6_K", "flf2v-14B"),
    "wan21_official_vace_14B": ("Q2_K", "Q3_K", "vace-14B"),
    "qwen_comfy_bf16": ("Q4_K", "Q5_K", "t2i"),
    "wan21_comfy_umt5_xxl_fp16": ("Q5_K", "Q6_K", "umt5-xxl"),
    "qwen_comfy_qwen_2.5_vl_7b_bf16": ("Q4_K", "Q6_K", "qwen2.5-7b-text"),
}


def in_gguf(name: str, most: str, some: str) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the tensors of a published file as the tools turn it into GGUF, some of which leave out leading ones."""
    found = checkpoint(name)
    identity = identify(found)
    rename = Renamer(LLAMA[identity.family]) if identity.role == "text_encoder" else str
    for official, key in identity.names.items():
        info = found.tensors[key]
        if not official.startswith("visual."):
            shape = info.shape
            if len(shape) == 1 or "modulation" in official:
                stored, shape = "F32", shape[1:] if shape[0] == 1 else shape
            elif official.startswith(WHOLE) or "pos_embedding" in official or shape[-1] % 256:
                stored, shape = "F16", shape[1:] if shape[0] == 1 else shape
            else:
                stored = some if official.endswith(MORE_BITS) else most
            yield rename(official), TensorInfo(stored, shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def file_of(folder: Path, name: str) -> Path:
    """Return a file of full size, made once."""
    path = folder / f"{name}.gguf"
    return path if path.exists() else write_sparse(path, dict(in_gguf(name, *GGUF[name][:2])))


@pytest.mark.parametrize("name", GGUF)
def test_published_models_in_gguf_are_recognised_with_every_key(folder: Path, name: str) -> None:
    found = open_checkpoint(file_of(folder, name))
    identity = identify(found)
    most, _, variant = GGUF[name]
    original = identify(checkpoint(name))
    assert (identity.family, identity.role) == (original.family, original.role)
    assert identity.variant == variant and identity.weight_format == f"gguf {most}"
    assert not identity.missing and not identity.unexpected and not identity.ignored
    assert len(identity.names) == len(found.tensors)
    if identity.role == "diffusion_model":
        assert identity.config == original.config
        if weights := prepared(found, identity):
            for official, held in weights.module.state_dict().items():
                dtype, shape = layout(found.tensors[identity.names[official]])
                in_file = prod(shape) * dtype.itemsize
                assert held.nbytes <= in_file or held.dtype == torch.float32, official
    else:
        assert identity.spelling == "llama.cpp"


def test_the_commands_take_gguf(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(folder, "wan21_official_t2v_14B")
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["variant"], found["format"], found["parameters"]) == ("t2v-14B", "gguf Q4_K", 14_288_491_584)
    assert found["dtypes"] == {"F32": 40 * 17 + 8, "Q4_K": 40 * 7, "Q6_K": 40 * 3, "F16": 7}
    assert main(["plan", "--model", str(path), "--size", "832x480x81", "--vram", "12", "--ram", "32"]) == 0
    assert "(t2v-14B, gguf Q4_K) at 832x480x81" in capsys.readouterr().out


def test_blocks_leave_room_that_bf16_does_not(folder: Path) -> None:
    small = load_model(file_of(folder, "wan21_official_t2v_14B"))
    plan = facts(small, Question(width=832, height=480, frames=81, vram=24, ram=32))
    assert plan["resident"] == plan["blocks"] == 40


def test_a_text_encoder_is_not_taken_for_a_model(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is a text encoder .*wan21 umt5-xxl\. Expected a diffusion model"):
        load_model(file_of(folder, "wan21_comfy_umt5_xxl_fp16"))
