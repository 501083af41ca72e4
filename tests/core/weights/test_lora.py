"""What a LoRA's names say: which parameters of which model, in whose dialect, and why some of it is not used."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wanqwen.core.types import Checkpoint, Family, Lora, ModelHandle, TensorInfo
from wanqwen.core.weights import lora
from wanqwen.families import FAMILIES, family_of_lora, fits_of_lora, presets_of_lora
from wanqwen.loading import load_model, with_lora

from ... import loras
from ...manifests import checkpoint, fake, manifest
from ...nodes import tiny

WAN, QWEN = FAMILIES
LIGHTX2V = "lora_wan_lightx2v_i2v_14B_480p_rank64_bf16"
LIGHTNING = ("lora_qwen_lightning_bf16", "lora_qwen_lightning_fp32_v1.0")


def held(found: Checkpoint, family: Family, variant: str) -> lora.Fit:
    file = lora.read_names(found, family.spellings)
    return lora.fit(file, family.parameters(family.variants[variant]), family.parts)


@pytest.mark.parametrize(
    ("name", "family", "fitting"),
    [(LIGHTX2V, WAN, ["i2v-14B", "flf2v-14B"])] + [(name, QWEN, ["all but layered", "layered"]) for name in LIGHTNING],
)
def test_published_files_are_used_to_the_last_tensor(name: str, family: Family, fitting: list[str]) -> None:
    found = checkpoint(name)
    known, file = family_of_lora(found)
    assert known is family and lora.is_lora(found) and file.ranks == [64] and not file.unknown
    fits = fits_of_lora(known, file)
    assert list(fits) == fitting
    for fit in fits.values():
        assert fit.num_used == len(found.tensors) == manifest(name)["n_tensors"] and not fit.unused


def test_an_image_to_video_file_on_a_text_to_video_model_leaves_the_image_branch_out() -> None:
    found = checkpoint(LIGHTX2V)
    fit = held(found, WAN, "t2v-14B")
    [(reason, names)] = fit.unused.items()
    assert reason == "this model has no image branch, which those for image to video have"
    assert {name for name in found.tensors if "_img" in name or "img_emb" in name} == set(names)
    assert fit.num_used + len(names) == len(found.tensors)


def test_another_width_is_told() -> None:
    fit = held(checkpoint(LIGHTX2V), WAN, "t2v-1.3B")
    assert "another size: 5120 x 5120 where this model has 1536 x 1536" in fit.unused
    # The bias of the last layer has as many numbers in models of all sizes.
    assert list(fit.parts) == ["head.head.bias"]


def one(name: str, *shape: int, dtype: str = "F32") -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype, shape)}


def test_a_patch_embedding_for_more_channels_does_not_fit() -> None:
    fit = held(fake(one("diffusion_model.patch_embedding.diff", 5120, 36, 1, 2, 2)), WAN, "t2v-14B")
    assert list(fit.unused) == ["another size: 5120 x 36 x 1 x 2 x 2 where this model has 5120 x 16 x 1 x 2 x 2"]
    assert not held(fake(one("diffusion_model.patch_embedding.diff", 5120, 36, 1, 2, 2)), WAN, "i2v-14B").unused


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (one("blocks.31.self_attn.q.lora_A.weight", 4, 1536), "this model has 30 blocks"),
        (one("blocks.0.self_attn.q.diff_x", 4), "no model of this family has such names"),
        (one("blocks.0.self_attn.qkv.diff", 4), "no model of this family has such names"),
        (one("blocks.0.self_attn.q.lora_A.weight", 4, 1536), "a change of a kind that is not known (down)"),
        (one("vace_blocks.0.self_attn.q.diff", 1536, 1536), "this model has no VACE branch"),
        (one("blocks.0.norm3.lora_B.bias", 1536), "a change of a kind that is not known (lora_B.bias)"),
        (one("blocks.0.norm3.diff", 1536, dtype="F8_E8M0"), "stored as F8_E8M0, which can't be read"),
        (one("blocks.0.diff_m", 6, 1536), "another size: 6 x 1536 where this model has 1 x 6 x 1536"),
        (one("blocks.0.norm3.diff_b", 1, 1536), "another size: 1 x 1536 where this model has 1536"),
        (one("blocks.0.norm1.diff", 1536), "no model of this family has such names"),
        (
            one("blocks.0.ffn.0.lora_up.weight", 8960, 4)
            | one("blocks.0.ffn.0.lora_mid.weight", 4, 4)
            | one("blocks.0.ffn.0.lora_down.weight", 4, 1536),
            "a change of a kind that is not known (down, lora_mid.weight, up)",
        ),
        (
            one("blocks.0.ffn.0.lora_up.weight", 8960, 4)
            | one("blocks.0.ffn.0.lora_down.weight", 4, 1536)
            | one("blocks.0.ffn.0.dora_scale", 1536, 1),
            "magnitudes of another size: 1536 x 1 where this model has 8960 x 1536",
        ),
        (
            one("blocks.0.ffn.0.lora_up.weight", 8960, 8) | one("blocks.0.ffn.0.lora_down.weight", 4, 1536),
            "factors that don't belong together",
        ),
        (
            one("blocks.0.ffn.0.lora_up.weight", 8960, 0) | one("blocks.0.ffn.0.lora_down.weight", 0, 1536),
            "factors that don't belong together",
        ),
        (
            one("blocks.0.ffn.0.lora_up.weight", 8960, 4)
            | one("blocks.0.ffn.0.lora_down.weight", 4, 1536)
            | one("blocks.0.ffn.0.alpha", 2),
            "alpha is not one number but 2",
        ),
    ],
)
def test_what_is_not_used_has_a_reason(tensors: dict[str, TensorInfo], reason: str) -> None:
    fit = held(fake(tensors), WAN, "t2v-1.3B")
    assert list(fit.unused) == [reason] and set(fit.unused[reason]) == set(tensors) and not fit.parts


def test_what_a_file_has_twice_counts_once_and_is_told() -> None:
    once = one("blocks.0.ffn.0.lora_up.weight", 8960, 4) | one("blocks.0.ffn.0.lora_down.weight", 4, 1536)
    again = one("lora_unet_blocks_0_ffn_0.lora_down.weight", 4, 1536)
    fit = held(fake(once | again), WAN, "t2v-1.3B")
    [(reason, names)] = fit.unused.items()
    assert "twice" in reason and set(names) == set(again)
    assert set(fit.parts["blocks.0.ffn.0.weight"].values()) == set(once)


def test_underscores_are_looked_up_and_never_guessed() -> None:
    """`to_out_0` and `net_0_proj` have dots before digits, `to_add_out` and `add_q_proj` none at all."""
    layers = ("attn_to_out_0", "attn_to_add_out", "attn_add_q_proj", "img_mlp_net_0_proj", "txt_mlp_net_2", "img_mod_1")
    tensors = {}
    for layer in layers:
        tensors |= one(f"lora_unet_transformer_blocks_59_{layer}.diff", 4)
    file = lora.read_names(fake(tensors), QWEN.spellings)
    paths = ("attn.to_out.0", "attn.to_add_out", "attn.add_q_proj", "img_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1")
    assert [path for path, _ in file.parts] == [f"transformer_blocks.59.{path}" for path in paths]
    assert file.dialect == "official names with underscores, prefix lora_unet_: diff"
    for family in FAMILIES:
        flat = [path.replace(".", "_") for spelling in family.spellings for path in set(spelling.table.values())]
        assert max(flat.count(name) for name in flat) <= len(family.spellings)


def test_a_dialect_is_named() -> None:
    file = lora.read_names(checkpoint(LIGHTX2V), WAN.spellings)
    assert file.dialect == "official names, prefix diffusion_model.: lora_down, lora_up, diff, diff_b"
    mixed = one("transformer.blocks.0.attn1.to_q.lora_A.weight", 4, 8) | one("lora_unet_blocks_1_attn2_to_k.alpha")
    assert lora.read_names(fake(mixed), WAN.spellings).dialect == (
        "diffusers names, prefix transformer. and diffusers names with underscores, prefix lora_unet_: lora_A, alpha"
    )


def test_peft_s_own_folder_states_alpha(tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 16, "use_rslora": True, "alpha_pattern": {"ffn.0": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = fake(one("x"), path=tmp_path / "adapter_model.safetensors")
    assert lora.scale_of(found, 4, None, "base_model.model.blocks.0.ffn.2.lora_A.weight") == 8
    assert lora.scale_of(found, 4, None, "base_model.model.blocks.0.ffn.0.lora_B.weight") == 1
    assert lora.scale_of(found, 4, None, "base_model.model.blocks.0.ffn.0.lora_A.default.weight") == 1
    assert lora.scale_of(found, 4, 1.0, "base_model.model.blocks.0.ffn.0.lora_B.weight") == 0.25
    assert lora.scale_of(fake(one("x"), path=tmp_path / "other.safetensors"), 4, None, "x") == 1


def test_alpha_of_a_text_encoder_beside_is_not_the_model_s() -> None:
    config = {"transformer.lora_alpha": 16, "text_encoder.lora_alpha": 2}
    found = fake(one("x"), metadata={"lora_adapter_metadata": json.dumps(config)})
    assert lora.scale_of(found, 4, None, "transformer.blocks.0.ffn.2.lora_A.weight") == 4


@pytest.mark.parametrize("config", [{"lora_alpha": "?"}, {"alpha_pattern": ["x"]}, {"alpha_pattern": {"(": 1}}])
def test_an_alpha_that_can_t_be_read_names_the_file(config: dict[str, object]) -> None:
    found = fake(one("x"), "bad", metadata={"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(ValueError, match=r"bad\.safetensors: what .* says of alpha can't be read"):
        lora.scale_of(found, 4, None, "blocks.0.ffn.2.lora_A.weight")


@pytest.fixture
def handle(tmp_path: Path) -> ModelHandle:
    return load_model(tiny.write_model(tmp_path / "tiny.safetensors"))


def header_only(path: Path, tensors: dict[str, TensorInfo]) -> Path:
    """Write a sparse file of this header: of full size, its bytes taking no room."""
    header, end = {}, 0
    for name, info in tensors.items():
        size = torch.Size(info.shape).numel() * {"BF16": 2, "F32": 4, "I64": 8}[info.dtype]
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(
    ("name", "made_for"),
    [(LIGHTX2V, "wan21 i2v-14B, flf2v-14B, of width 5120"), (LIGHTNING[0], "qwen-image .*, of width 3072")],
)
def test_a_file_for_another_model_says_which(handle: ModelHandle, tmp_path: Path, name: str, made_for: str) -> None:
    path = header_only(tmp_path / f"{name}.safetensors", dict(checkpoint(name).tensors))
    with pytest.raises(ValueError, match=rf"{name}.* does not fit this model, tiny.* \(wan21 .* made for {made_for}: "):
        with_lora(handle, path)


def test_what_is_no_lora_is_refused(handle: ModelHandle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny.safetensors is no LoRA: none of its \d+ tensors"):
        with_lora(handle, handle.checkpoint.path)
    save_file({"down_blocks.0.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "sd.safetensors")
    with pytest.raises(ValueError, match="is a LoRA of none of the models this pack knows"):
        with_lora(handle, tmp_path / "sd.safetensors")


def test_a_part_that_is_not_used_is_reported_with_its_reason(handle: ModelHandle, tmp_path: Path) -> None:
    written = loras.low_rank(loras.official(handle.checkpoint.path), loras.DIALECTS["official"])
    more = {"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.zeros(2, 48), "odd": torch.zeros(1)}
    path = loras.write(tmp_path / "x.safetensors", replace(written, tensors=written.tensors | more))
    found, lines = with_lora(handle, path)
    count = len(written.tensors)
    assert lines == [
        f"x.safetensors: {count} of {count + 2} tensors used, for {count // 2} parameters; official names, prefix "
        "diffusion_model.: lora_A, lora_B; rank 2 to 3",
        "1 not used (diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight): this model has no image branch, which "
        "those for image to video have",
        "1 not used (odd): no model of this family has such names",
    ]
    assert len(found.loras) == 1 and not handle.loras


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32", "lightx2v-4"),
        ("wan2.1_t2v_1.3B_self_forcing_dmd_lora", "self-forcing-4"),
        ("Wan21_CausVid_14B_T2V_lora_rank32", "causvid-4"),
        ("my_cat", None),
    ],
)
def test_a_distilled_lora_asks_for_its_preset(
    handle: ModelHandle, tmp_path: Path, file: str, preset: str | None
) -> None:
    written = loras.low_rank(loras.official(handle.checkpoint.path), loras.DIALECTS["kohya"])
    _, lines = with_lora(handle, loras.write(tmp_path / f"{file}.safetensors", written))
    told = [line for line in lines if "preset" in line]
    assert [line.split("preset ")[1].split(" ")[0] for line in told] == ([preset] if preset else [])


@pytest.mark.parametrize("steps", [4, 8])
def test_lightning_asks_for_as_many_steps_as_its_name_says(steps: int) -> None:
    for name in (f"Qwen-Image-Lightning-{steps}steps-V1.0", f"Qwen-Image-Edit-2509-Lightning-{steps}steps-V1.0-bf16"):
        assert list(presets_of_lora(QWEN, fake({}, name))) == [f"lightning-{steps}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": float("nan")}, "strength is nan"),
        ({"start": 0.5, "end": 0.5}, "start 0.5 and end 0.5"),
        ({"start": -0.1}, "start -0.1"),
        ({"end": 1.5}, "end 1.5"),
    ],
)
def test_strengths_and_ranges_that_make_no_sense_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"LoRA fake.safetensors: .*{message}"):
        Lora(checkpoint=fake({}), parts={}, **change)


def test_a_range_is_counted_in_steps() -> None:
    def steps(start: float, end: float, total: int) -> list[int]:
        found = Lora(checkpoint=fake({}), parts={}, start=start, end=end)
        return [step for step in range(total) if found.is_active(step, total)]

    assert steps(0.0, 1.0, 3) == [0, 1, 2]
    assert steps(0.3, 0.7, 10) == [3, 4, 5, 6]  # although 0.7 * 10 is a little more than 7
    assert steps(0.0, 0.5, 5) == [0, 1, 2] and steps(0.5, 1.0, 5) == [3, 4]
