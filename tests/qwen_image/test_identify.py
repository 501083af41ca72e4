import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wanqwen.core import storage
from wanqwen.core.blocks import Run
from wanqwen.core.ops import formats
from wanqwen.core.ops.linear import Linear
from wanqwen.core.types import TensorInfo
from wanqwen.core.weights import keymap
from wanqwen.core.weights.assemble import assemble
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.families import identify, recognised_by
from wanqwen.qwen_image.config import VARIANTS, QwenImageConfig
from wanqwen.qwen_image.identify import identify as identify_qwen_image
from wanqwen.qwen_image.identify import variant_of, with_variant
from wanqwen.qwen_image.keymap import TEXT_ENCODER_PREFIXES, TEXT_ENCODER_SPELLINGS
from wanqwen.qwen_image.transformer import QwenImageTransformer
from wanqwen.qwen_image.vl_config import VisionConfig, VLConfig
from wanqwen.tests.manifests import checkpoint, fake, on_meta, shapes

# manifest -> variant, format
DIFFUSION_MODELS = {
    "qwen_diffusers_transformer": ("t2i", "bf16"),
    "qwen_comfy_bf16": ("t2i", "bf16"),
    "qwen_comfy_fp8_e4m3fn": ("t2i", "fp8_e4m3fn"),
    "qwen_comfy_edit_2511_fp8mixed": ("edit-2511", "fp8_scaled"),
}
TEXT_ENCODERS = {
    "qwen_diffusers_text_encoder": ("qwen2.5-vl-7b", "bf16"),
    "qwen_comfy_qwen_2.5_vl_7b_bf16": ("qwen2.5-vl-7b", "bf16"),
    "qwen_comfy_qwen_2.5_vl_7b_fp8_scaled": ("qwen2.5-vl-7b", "fp8_scaled"),
}
PARAMETERS = 20_430_401_088  # of the published model
TINY = QwenImageConfig(
    num_layers=2, num_heads=3, dim=24, ffn_dim=40, text_dim=12, freq_dim=16, latent_channels=4, axes=(2, 2, 4)
)
OWN = {"num_heads": 3, "axes": [2, 2, 4]}
TINY_VL = VLConfig(
    hidden=64,
    intermediate=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=20,
    mrope_section=(4, 6, 6),
    max_pixels=12544,
    vision=VisionConfig(depth=2, hidden=16, intermediate=12, num_heads=2, out_hidden=64, full_attention=(1,)),
)
OWN_VL = {
    "num_heads": 2, "num_kv_heads": 1, "vision_heads": 2, "mrope_section": [4, 6, 6], "full_attention": [1],
    "window": 112, "max_pixels": 12544,
}  # fmt: skip
FP8 = torch.float8_e4m3fn


def infos(named: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype, shape) for name, shape in named.items()}


@lru_cache(maxsize=8)
def transformer(config: QwenImageConfig) -> dict[str, tuple[int, ...]]:
    return on_meta(lambda: QwenImageTransformer(config))


@lru_cache(maxsize=8)
def vl(config: VLConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of transformers' model of this size, in the official spelling."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = config.vision
    theirs = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": config.hidden, "intermediate_size": config.intermediate, "vocab_size": config.vocab_size,
            "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
        },
        vision_config={
            "depth": vision.depth, "hidden_size": vision.hidden, "intermediate_size": vision.intermediate,
            "num_heads": vision.num_heads, "out_hidden_size": vision.out_hidden,
        },
    )  # fmt: skip
    found = on_meta(lambda: Qwen2_5_VLForConditionalGeneration(theirs))
    match = keymap.pick(found, TEXT_ENCODER_SPELLINGS, TEXT_ENCODER_PREFIXES)
    assert match.unmatched == ("lm_head.weight",)
    return {official: found[name] for official, name in match.names.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", DIFFUSION_MODELS)
def test_transformer_equals_the_manifest_key_by_key_and_shape_by_shape(name: str, prefix: str) -> None:
    found = checkpoint(name)
    found = fake({prefix + key: info for key, info in found.tensors.items()}, name)
    identity = identify(found)
    assert (identity.family, identity.role) == ("qwen-image", "diffusion_model")
    assert (identity.variant, identity.weight_format) == DIFFUSION_MODELS[name]
    assert identity.spelling == (f"official, prefix {prefix}" if prefix else "official")
    assert identity.missing == identity.unexpected == ()
    assert set(identity.names.values()) | set(identity.ignored) == found.tensors.keys()
    assert [name.removeprefix(prefix) for name in identity.ignored] == (
        ["__index_timestep_zero__"] if "2511" in name else []
    )
    assert identity.config == QwenImageConfig(zero_cond_t="2511" in name)
    assert shapes(found, identity) == transformer(identity.config)
    assert sum(torch.Size(shape).numel() for shape in shapes(found, identity).values()) == PARAMETERS


@pytest.mark.parametrize("prefix", ["", "text_encoders.qwen25_7b.transformer."])
@pytest.mark.parametrize("spelling", TEXT_ENCODER_SPELLINGS[:2], ids=lambda spelling: spelling.name)
@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoder_equals_the_manifest_in_every_spelling(name: str, spelling, prefix: str) -> None:
    rename = keymap.Renamer(spelling.table)
    model = "model." if spelling.name == "transformers-5" and not prefix else ""
    tensors = {
        prefix + (model + renamed if (renamed := rename(key)) else key): info
        for key, info in checkpoint(name).tensors.items()
    }
    found = fake(tensors | {f"{prefix}tokenizer_json": TensorInfo("U8", (9,))}, name)
    identity = identify(found)
    assert (identity.family, identity.role) == ("qwen-image", "text_encoder")
    assert (identity.variant, identity.weight_format) == TEXT_ENCODERS[name]
    assert identity.spelling.startswith(spelling.name)
    assert identity.missing == identity.unexpected == ()
    ignored = {name.removeprefix(prefix) for name in identity.ignored}
    assert ignored == {"lm_head.weight", "tokenizer_json"} | ({"scaled_fp8"} if "fp8" in name else set())
    assert set(identity.names.values()).isdisjoint(identity.ignored)
    assert identity.config == VLConfig()
    assert shapes(found, identity) == vl(VLConfig())


@pytest.mark.parametrize("spelling", TEXT_ENCODER_SPELLINGS, ids=lambda spelling: spelling.name)
def test_language_model_without_its_vision_tower_is_recognised(spelling) -> None:
    rename = keymap.Renamer(spelling.table)
    tensors = {
        rename(name): info
        for name, info in checkpoint("qwen_diffusers_text_encoder").tensors.items()
        if name.startswith("model.")
    }
    identity = identify(fake(tensors))
    assert (identity.variant, identity.config) == ("qwen2.5-7b-text", VLConfig(vision=None))
    assert identity.missing == identity.unexpected == identity.ignored == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"controlnet_blocks.0.weight": (3,), "proj_out.weight": None}, "a ControlNet"),
        ({"transformer_blocks.0.attn.to_q.qweight": (3,), "txt_norm.weight": None}, "a 4-bit model"),
        ({"txt_norm.weight": None}, "a part of a Qwen-Image model"),
    ],
)
def test_what_is_no_whole_model_is_named(change, said: str) -> None:
    named = {name: shape for name, shape in (transformer(TINY) | change).items() if shape}
    assert identify_qwen_image(fake(infos(named))) is None
    with pytest.raises(ValueError, match=said):
        identify(fake(infos(named)))


@pytest.mark.parametrize(("layer", "said"), [("fc1", "Qwen2-VL"), ("linear_fc1", "Qwen3-VL")])
def test_other_vision_language_models_are_named(layer: str, said: str) -> None:
    named = {name.replace("blocks.0.mlp.gate_proj", f"blocks.0.mlp.{layer}"): s for name, s in vl(TINY_VL).items()}
    with pytest.raises(ValueError, match=said):
        identify(fake(infos(named)))


def test_missing_and_unexpected_are_listed() -> None:
    named = transformer(TINY) | {"stray": (1,)}
    del named["transformer_blocks.1.attn.norm_added_k.weight"]
    identity = identify(fake(infos(named), metadata={"wanqwen": json.dumps(OWN)}))
    assert identity.missing == ("transformer_blocks.1.attn.norm_added_k.weight",)
    assert identity.unexpected == ("stray",)


# The sizes of miniatures.


@pytest.mark.parametrize("own", [OWN, {"axes": [2, 2, 4]}])
def test_metadata_tells_the_division_of_heads(own) -> None:
    identity = identify(fake(infos(transformer(TINY)), metadata={"wanqwen": json.dumps(own)}))
    assert identity.config == TINY


def test_folder_tells_the_division_of_heads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "QwenImageTransformer2DModel", "axes_dims_rope": [2, 2, 4]})
    )
    assert identify(fake(infos(transformer(TINY)), path=tmp_path / "m.safetensors")).config == TINY


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({}, r"heads of 8, not 128.*\"axes\""),
        (OWN | {"num_heads": 2}, "says that it has 2 heads"),
        ({"axes": [4, 4]}, "axes can't be.*three numbers"),
        ({"axes": [2, 2, 2]}, "rotation widths"),
        ({"axes": "246"}, "axes can't be '246'"),
        (OWN | {"variant": "inpaint"}, "variant can't be 'inpaint'.*t2i"),
    ],
)
def test_metadata_that_does_not_fit_is_an_error(own, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        identify(fake(infos(transformer(TINY)), metadata={"wanqwen": json.dumps(own)}))


def test_metadata_tells_what_the_shapes_of_an_encoder_do_not() -> None:
    identity = identify(fake(infos(vl(TINY_VL)), metadata={"wanqwen": json.dumps(OWN_VL)}))
    assert (identity.variant, identity.config) == ("custom", TINY_VL)


@pytest.mark.parametrize("is_nested", [False, True], ids=["transformers 4", "transformers 5"])
def test_folder_tells_what_the_shapes_of_an_encoder_do_not(tmp_path: Path, is_nested: bool) -> None:
    text = {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    rope = {"mrope_section": [4, 6, 6], "rope_theta": 5e5}
    if is_nested:
        config = {"text_config": text | {"rope_parameters": rope}}
    else:
        config = text | {"rope_theta": 5e5, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    config |= {"model_type": "qwen2_5_vl"}
    config |= {"vision_config": {"num_heads": 2, "window_size": 56, "fullatt_block_indexes": [0]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # What lies in the folder goes before what the header says.
    found = fake(infos(vl(TINY_VL)), path=tmp_path / "m.safetensors", metadata={"wanqwen": json.dumps(OWN_VL)})
    vision = replace(TINY_VL.vision, window=56, full_attention=(0,))
    assert identify(found).config == replace(TINY_VL, eps=1e-5, rope_theta=5e5, vision=vision)


def test_config_of_another_model_beside_it_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 64}))
    found = checkpoint("qwen_comfy_qwen_2.5_vl_7b_bf16", tmp_path / "m.safetensors")
    assert identify(found).config == VLConfig()


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({}, '"num_heads"'),
        ({"num_heads": 2}, '"mrope_section"'),
        ({"num_heads": 2, "mrope_section": [4, 6, 6]}, '"full_attention"'),
        ({"num_heads": 2, "mrope_section": [4, 6, 6], "full_attention": [1]}, '"vision_heads"'),
        (OWN_VL | {"num_kv_heads": 2}, "says that it has 2 heads of keys.*make 1"),
        (OWN_VL | {"full_attention": [2]}, r"layers \(2,\)"),
        (OWN_VL | {"mrope_section": [4, 6, 7]}, "must add up to half"),
        (OWN_VL | {"num_heads": 100}, "100 heads"),
    ],
)
def test_encoder_whose_numbers_are_not_told_or_do_not_fit_is_an_error(own, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        identify(fake(infos(vl(TINY_VL)), metadata={"wanqwen": json.dumps(own)}))
    assert "fake.safetensors" in str(error.value)


def test_damaged_config_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        identify(fake(infos(transformer(TINY)), path=tmp_path / "m.safetensors"))


# Variants.

CLASS = "QwenImageTransformer2DModel"


def variant(path: Path, own=None, marker: bool = False, layered: bool = False) -> tuple[str, str]:
    named = transformer(replace(TINY, layered=layered)) | ({"__index_timestep_zero__": (0,)} if marker else {})
    metadata = {"wanqwen": json.dumps(OWN | (own or {}))}
    found = fake(infos(named), metadata=metadata, path=path)
    identity = identify(found)
    known, where = variant_of(found)
    assert identity.variant == known.name and recognised_by(found, identity) == where
    assert (identity.config.zero_cond_t, identity.config.layered) == (known.zero_cond_t, known.layered)
    assert identity.missing == identity.unexpected == ()
    return known.name, where


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen_image_bf16", "t2i"),
        ("qwen_image_2512_fp8_e4m3fn", "t2i"),
        ("qwen_image_edit_fp8_e4m3fn", "edit"),
        ("Qwen-Image-EDIT", "edit"),
        ("QwenImageEdit2509-bf16", "edit-2509"),
        ("qwen_image_edit_2511_bf16", "edit-2511"),
        ("Qwen_Image_Edit_Plus", "edit-2509"),
        ("qwen_image_credit_edition_20250911", "t2i"),
        ("qwen_image_2509_merge", "t2i"),
        ("qwen-image-plus", "t2i"),
        ("qwen_image_layered_bf16", "t2i"),
    ],
)
def test_name_of_the_file_tells_by_whole_words(tmp_path: Path, name: str, expected: str) -> None:
    found, where = variant(tmp_path / f"{name}.safetensors")
    assert found == expected
    assert (name in where) == (expected != "t2i")


def test_name_of_the_folder_tells(tmp_path: Path) -> None:
    file = "diffusion_pytorch_model-00001-of-00005.safetensors"
    assert variant(tmp_path / "Qwen-Image-Edit-2509" / "transformer" / file)[0] == "edit-2509"
    cached = tmp_path / "models--Qwen--Qwen-Image-Edit" / "snapshots" / "ac7f9318f633fc4b5778c59367c8128225f1e3de"
    assert variant(cached / "transformer" / file)[0] == "edit"
    assert variant(tmp_path / "edit" / "models" / file)[0] == "t2i", "folders further up say nothing"


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [("QwenImagePipeline", "t2i"), ("QwenImageEditPipeline", "edit"), ("QwenImageEditPlusPipeline", "edit-2509")],
)
def test_pipeline_of_a_diffusers_folder_goes_before_its_name(tmp_path: Path, pipeline: str, expected: str) -> None:
    folder = tmp_path / "qwen-edit-2511" / "transformer"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    found, where = variant(folder / "m.safetensors")
    assert found == expected and pipeline in where


def test_flag_of_a_diffusers_folder_goes_before_its_pipeline(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPlusPipeline"}))
    (folder / "config.json").write_text(json.dumps({"_class_name": CLASS, "zero_cond_t": True}))
    found, where = variant(folder / "m.safetensors")
    assert found == "edit-2511" and "zero_cond_t" in where
    (folder / "config.json").write_text(json.dumps({"_class_name": CLASS, "zero_cond_t": False}))
    assert variant(folder / "m.safetensors")[0] == "edit-2509"


def test_marker_and_metadata_go_before_the_name(tmp_path: Path) -> None:
    path = tmp_path / "qwen_image_edit_2509.safetensors"
    assert variant(path, marker=True)[0] == "edit-2511"
    found, where = variant(path, own={"variant": "t2i"})
    assert found == "t2i" and "metadata" in where


def test_layered_is_told_by_its_tensor_alone(tmp_path: Path) -> None:
    found, where = variant(tmp_path / "qwen_image_edit.safetensors", layered=True)
    assert found == "layered" and "addition_t_embedding" in where
    assert variant(tmp_path / "m.safetensors", own={"variant": "layered"})[0] == "t2i"


def test_user_may_choose_another_variant(tmp_path: Path) -> None:
    metadata = {"wanqwen": json.dumps(OWN)}
    plain = identify(fake(infos(transformer(TINY)), metadata=metadata))
    layered = identify(fake(infos(transformer(replace(TINY, layered=True))), metadata=metadata))
    for name in VARIANTS:
        fitting, other = (layered, plain) if name == "layered" else (plain, layered)
        chosen = with_variant(fitting, name)
        assert chosen == replace(fitting, variant=name, config=replace(TINY, zero_cond_t=name == "edit-2511",
                                                                       layered=name == "layered"))  # fmt: skip
        with pytest.raises(ValueError, match=f"'{name}' does not fit this file"):
            with_variant(other, name)
    assert with_variant(with_variant(plain, "edit-2511"), "edit") == with_variant(plain, "edit")
    with pytest.raises(ValueError, match="'edit-2510' is not known: choose one of t2i"):
        with_variant(plain, "edit-2510")


# From file to module.


def test_fp8mixed_file_gives_the_weights_it_stands_for(tmp_path: Path) -> None:
    """As qwen_image_edit_2511_fp8mixed is: blocks of scaled layers, but for one; records in two places; a marker."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape).bfloat16() * 0.1 for name, shape in transformer(TINY).items()}
    stored, meant, layers = dict(state), dict(state), {}
    record = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if tensor.dim() < 2 or not name.startswith("transformer_blocks.") or layer == "transformer_blocks.0.img_mod.1":
            continue
        scale = (tensor.abs().max() / 448).float()
        stored[name] = (tensor / scale).to(FP8)
        stored[f"{layer}.weight_scale"], stored[f"{layer}.input_scale"] = scale, torch.tensor(1.0)
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
        meant[name], layers[layer] = formats.dequantise(stored[name], scale, torch.float32), record
    stored["__index_timestep_zero__"] = torch.zeros(0)
    path = tmp_path / "edit.safetensors"
    quantised = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(stored, path, {"wanqwen": json.dumps(OWN), storage.METADATA_RECORD: quantised})
    found = open_checkpoint(path)
    identity = identify(found)
    assert (identity.variant, identity.weight_format) == ("edit-2511", "fp8_scaled")
    assert identity.config == replace(TINY, zero_cond_t=True)
    model = assemble(
        lambda: QwenImageTransformer(identity.config),
        identity.names,
        found,
        float32=lambda name: "norm" in name,
        dtype=torch.float32,
        ignored=identity.ignored,
    )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    assert {name for name, linear in linears.items() if linear.weight_scale is not None} == layers.keys()
    assert all(linears[name].weight.dtype == FP8 for name in layers)
    plain = QwenImageTransformer(identity.config)
    plain.load_state_dict({name: tensor.float() for name, tensor in meant.items()})
    x, t, text = torch.randn(1, 4, 1, 4, 6), torch.tensor([500.0]), torch.randn(1, 3, TINY.text_dim)
    reference, run = torch.randn(1, 4, 1, 2, 2), Run()
    with torch.no_grad():
        out, wanted = (m(x, t, m.prompt(text, run), run, references=[reference]) for m in (model, plain.eval()))
    assert wanted.abs().max() > 0.01
    assert (out - wanted).abs().max() <= 1e-6 * wanted.abs().max()
