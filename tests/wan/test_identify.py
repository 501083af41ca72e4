import json
from dataclasses import replace

import pytest
import torch
from wanqwen.core.types import TensorInfo
from wanqwen.core.weights.assemble import prepare
from wanqwen.core.weights.keymap import Renamer
from wanqwen.families import identify
from wanqwen.tests.manifests import checkpoint, fake, on_meta, shapes
from wanqwen.wan.config import VAEConfig, WanConfig
from wanqwen.wan.family import keep_float32
from wanqwen.wan.identify import identify as identify_wan
from wanqwen.wan.keymap import TEXT_ENCODER_SPELLINGS
from wanqwen.wan.transformer import WanTransformer
from wanqwen.wan.vae import WanVAE

SMALL = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
LARGE = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

# manifest -> variant, format, spelling
T2V = {
    "wan21_official_t2v_1.3B": ("t2v-1.3B", "fp32", "official"),
    "wan21_official_t2v_14B": ("t2v-14B", "fp32", "official"),
    "wan21_comfy_t2v_1.3B_fp16": ("t2v-1.3B", "fp16", "official, prefix model.diffusion_model."),
    "wan21_comfy_t2v_14B_fp16_INFERRED": ("t2v-14B", "fp16", "official"),
    "wan21_comfy_t2v_14B_fp8_e4m3fn_INFERRED": ("t2v-14B", "fp8_e4m3fn", "official"),
    "wan21_comfy_t2v_14B_fp8_scaled_INFERRED": ("t2v-14B", "fp8_scaled", "official"),
    "wan22_comfy_t2v_14B_fp8_scaled_same_arch": ("t2v-14B", "fp8_scaled", "official"),
    "wan21_diffusers_t2v_1.3B": ("t2v-1.3B", "fp32", "diffusers"),
    "wan21_diffusers_t2v_14B": ("t2v-14B", "fp32", "diffusers"),
    "wan21_kijai_t2v_14B_fp8_e4m3fn_INFERRED": ("t2v-14B", "fp8_e4m3fn", "official"),
}
VAE = {
    "wan21_official_vae": ("vae", "fp32", "official"),
    "wan21_comfy_wan_2.1_vae": ("vae", "fp16", "official"),
    "wan21_diffusers_vae": ("vae", "fp32", "diffusers"),
    "wan21_kijai_vae_bf16": ("vae", "bf16", "official"),
    "qwen_comfy_vae": ("vae", "bf16", "official"),
    "qwen_diffusers_vae": ("vae", "bf16", "diffusers"),
}
UMT5 = {
    "wan21_official_umt5_xxl_enc_bf16": ("umt5-xxl", "bf16", "official"),
    "wan21_comfy_umt5_xxl_fp16": ("umt5-xxl", "fp16", "huggingface"),
    "wan21_comfy_umt5_xxl_fp8_e4m3fn_scaled": ("umt5-xxl", "fp8_scaled", "huggingface"),
    "wan21_diffusers_umt5_xxl": ("umt5-xxl", "bf16", "huggingface"),
    "wan21_kijai_umt5_xxl_enc_bf16": ("umt5-xxl", "bf16", "official"),
}
PICTURES = {
    "wan21_official_i2v_14B_480P_and_720P": ("i2v-14B", "fp32", "official"),
    "wan21_comfy_i2v_14B_bf16": ("i2v-14B", "bf16", "official"),
    "wan21_comfy_i2v_14B_fp16": ("i2v-14B", "fp16", "official"),
    "wan21_comfy_i2v_14B_fp8_e4m3fn": ("i2v-14B", "fp8_e4m3fn", "official"),
    "wan21_comfy_i2v_480p_14B_fp8_scaled": ("i2v-14B", "fp8_scaled", "official"),
    "wan21_kijai_i2v_14B_fp8_e4m3fn": ("i2v-14B", "fp8_e4m3fn", "official"),
    "wan21_kijai_i2v_14B_fp8_e4m3fn_scaled_KJ": ("i2v-14B", "fp8_scaled", "official"),
    "wan21_diffusers_i2v_14B": ("i2v-14B", "fp32", "diffusers"),
    "wan21_official_flf2v_14B_720P": ("flf2v-14B", "fp32", "official"),
    "wan21_comfy_flf2v_720p_14B_fp16": ("flf2v-14B", "fp16", "official"),
    "wan21_diffusers_flf2v_14B": ("flf2v-14B", "fp32", "diffusers"),
}
VACE = {
    "wan21_official_vace_1.3B": ("vace-1.3B", "fp32 and bf16", "official"),
    "wan21_official_vace_14B": ("vace-14B", "fp32 and bf16", "official"),
    "wan21_diffusers_vace_1.3B": ("vace-1.3B", "fp32 and bf16", "diffusers"),
    "wan21_diffusers_vace_14B": ("vace-14B", "fp32 and bf16", "diffusers"),
    "wan21_comfy_vace_1.3B_fp16_INFERRED": ("vace-1.3B", "fp16", "official"),
    "wan21_comfy_vace_14B_fp16_INFERRED": ("vace-14B", "fp16", "official"),
}
OTHERS = {
    "wan21_official_clip_xlm_roberta_vit_h_14": ("clip-vit-h", "fp32", "official"),
    "wan21_comfy_clip_vision_h": ("clip-vit-h", "fp16", "huggingface, prefix vision_model."),
    "wan21_kijai_clip_visual_fp16_INFERRED": ("clip-vit-h", "fp16", "official"),
}
ALL = T2V | VAE | UMT5 | PICTURES | VACE | OTHERS
PARAMETERS = {  # counted, section 2 of the specification
    "t2v-1.3B": 1_418_996_800,
    "t2v-14B": 14_288_491_584,
    "i2v-14B": 16_394_878_784,
    "flf2v-14B": 16_395_536_704,
    "vace-1.3B": 2_153_972_032,
    "vace-14B": 17_337_592_896,
    "vae": 126_892_531,
}


@pytest.mark.parametrize("name", ALL)
def test_every_manifest_is_recognised_with_every_key_accounted_for(name):
    found = checkpoint(name)
    identity = identify(found)
    assert (identity.variant, identity.weight_format, identity.spelling) == ALL[name]
    assert identity.missing == identity.unexpected == ()
    assert len(identity.names) + len(identity.ignored) == len(found.tensors)
    assert set(identity.names.values()).isdisjoint(identity.ignored)
    if identity.variant in PARAMETERS:
        total = sum(torch.Size(shape).numel() for shape in shapes(found, identity).values())
        assert total == PARAMETERS[identity.variant]


@pytest.mark.parametrize("name", T2V | PICTURES | VACE)
def test_transformer_equals_the_manifest_key_by_key_and_shape_by_shape(name):
    found = checkpoint(name)
    identity = identify(found)
    assert identity.role == "diffusion_model"
    if name in PICTURES:
        wanted = replace(LARGE, in_dim=36, image_dim=1280, image_positions=514 if "flf2v" in name else 0)
    else:
        wanted, step = (SMALL, 2) if "1.3B" in name else (LARGE, 5)
    if name in VACE:
        wanted = replace(wanted, vace_layers=tuple(range(0, wanted.num_layers, step)), vace_dim=96)
    assert identity.config == wanted
    assert on_meta(lambda: WanTransformer(identity.config)) == shapes(found, identity)


@pytest.mark.parametrize("name", PICTURES | VACE)
def test_every_tensor_of_a_model_of_pictures_or_controls_has_a_place(name):
    found = checkpoint(name)
    identity = identify(found)
    weights = prepare(
        lambda: WanTransformer(identity.config),
        identity.names,
        found,
        float32=keep_float32,
        dtype=torch.bfloat16,
        ignored=identity.ignored,
    )
    kept = {n for n, p in weights.module.named_parameters() if p.dtype == torch.float32}
    norms = {f"img_emb.proj.{i}.{leaf}" for i in (0, 4) for leaf in ("weight", "bias")}
    wanted = norms | ({"img_emb.emb_pos"} if identity.config.image_positions else set())
    assert {n for n in kept if n.startswith("img_emb.")} == (wanted if name in PICTURES else set())
    embedding = {f"vace_patch_embedding.{leaf}" for leaf in ("weight", "bias")} if name in VACE else set()
    of_blocks = {n for n in kept if n.startswith("vace_")} - embedding
    assert embedding <= kept and all("norm" in n or n.endswith("modulation") for n in of_blocks)


@pytest.mark.parametrize("name", VAE)
def test_vae_equals_the_manifest_key_by_key_and_shape_by_shape(name):
    found = checkpoint(name)
    identity = identify(found)
    assert (identity.role, identity.config) == ("vae", VAEConfig())
    assert on_meta(lambda: WanVAE(identity.config)) == shapes(found, identity)


@pytest.mark.parametrize("name", UMT5)
def test_text_encoder_equals_the_manifest_key_by_key_and_shape_by_shape(name):
    from transformers import UMT5Config, UMT5EncoderModel

    found = checkpoint(name)
    identity = identify(found)
    config = identity.config
    assert identity.role == "text_encoder"
    theirs = UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.dim_attn // config.num_heads,
        d_ff=config.dim_ffn,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        wanted = {key: tuple(p.shape) for key, p in UMT5EncoderModel(theirs).named_parameters()}
    rename = Renamer(TEXT_ENCODER_SPELLINGS[1].table)
    assert {rename(key): shape for key, shape in shapes(found, identity).items()} == wanted


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_wan_lightx2v_i2v_14B_480p_rank64_bf16", "a LoRA"),
        ("wan21_kijai_vace_module_1_3B_bf16_INFERRED", "VACE half"),
        ("lora_qwen_lightning_bf16", "a LoRA"),
    ],
)
def test_what_is_no_model_of_ours_is_named(name, said):
    found = checkpoint(name)
    assert identify_wan(found) is None
    with pytest.raises(ValueError, match=said) as error:
        identify(found)
    assert next(iter(found.tensors)) in str(error.value)


@pytest.mark.parametrize("kind", ["hada_w1_a", "lokr_w1", "lora_down.weight", "diff_b"])
def test_loras_of_every_kind_are_sent_to_their_node(kind):
    found = fake({f"lora_unet_blocks_0_self_attn_q.{kind}": TensorInfo("F32", (4, 8))})
    with pytest.raises(ValueError, match="a LoRA, not a model: load it with a LoRA node"):
        identify(found)


def test_the_picture_part_of_a_language_model_is_sent_for_the_text_part():
    names = ("v.patch_embd.weight", "v.blk.0.attn_q.weight", "mm.0.weight")
    found = fake({name: TensorInfo("F16", (8, 8)) for name in names})
    with pytest.raises(ValueError, match=r"picture part \(mmproj\).*choose the file of its text part"):
        identify(found)


def tiny(config, metadata=None):
    return fake(
        {name: TensorInfo("F32", s) for name, s in on_meta(lambda: WanTransformer(config)).items()}, "tiny", metadata
    )


def test_metadata_tells_what_shapes_do_not():
    config = WanConfig(dim=48, ffn_dim=112, num_heads=3, num_layers=2, freq_dim=32, text_dim=40, text_len=64)
    identity = identify(tiny(config, {"wanqwen": json.dumps({"num_heads": 3, "text_len": 64, "other": "x"})}))
    assert (identity.variant, identity.config) == ("custom", config)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "width 48 is not made of heads of 128"),
        ({"wanqwen": "3"}, "not JSON"),
        ({"wanqwen": "{"}, "not JSON"),
        ({"wanqwen": '{"num_heads": "three"}'}, "num_heads can't be 'three'"),
        ({"wanqwen": '{"num_heads": 0}'}, "num_heads can't be '0'"),
    ],
)
def test_unknown_number_of_heads_is_an_error(metadata, said):
    config = WanConfig(dim=48, ffn_dim=112, num_heads=3, num_layers=2)
    with pytest.raises(ValueError, match=said):
        identify(tiny(config, metadata))


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(dim=3),
        VAEConfig(dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)),
        VAEConfig(
            dim=4, z_dim=8, dim_mult=(1, 1, 3, 2, 2), num_res_blocks=3, temporal_downsample=(True, False, False, True)
        ),
        VAEConfig(dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(False,), channels=4),
    ],
)
def test_vae_geometry_is_read_from_the_layers(config):
    tensors = {name: TensorInfo("F32", shape) for name, shape in on_meta(lambda: WanVAE(config)).items()}
    identity = identify(fake(tensors))
    assert (identity.variant, identity.config) == ("vae-rgba" if config.channels == 4 else "vae", config)
    assert identity.missing == identity.unexpected == ()


def test_vae_for_other_pixels_is_an_error():
    config = VAEConfig(dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(False,), channels=12)
    tensors = {name: TensorInfo("F32", shape) for name, shape in on_meta(lambda: WanVAE(config)).items()}
    with pytest.raises(ValueError, match="pixels of 12 channels"):
        identify(fake(tensors))


@pytest.mark.parametrize("index", ["1000", "999999999", "9" * 5000])
def test_a_layer_of_an_endless_number_is_none(index):
    found = checkpoint("wan21_official_t2v_1.3B")
    name = f"blocks.{index}.modulation"
    identity = identify(fake({**found.tensors, name: TensorInfo("F32", (1, 6, 1536))}))
    assert identity.config.num_layers == 30 and identity.unexpected == (name,) and not identity.missing


def test_wan22_image_model_is_not_taken_for_t2v_14B():
    """It has the tensors of T2V-14B, but for 36 input channels."""
    found = checkpoint("wan21_official_t2v_14B")
    tensors = {**found.tensors, "patch_embedding.weight": TensorInfo("F32", (5120, 36, 1, 2, 2))}
    identity = identify(fake(tensors))
    assert (identity.variant, identity.config.in_dim, identity.config.out_dim) == ("custom", 36, 16)


def test_custom_size_of_another_task_says_the_task():
    found = checkpoint("wan21_official_vace_1.3B")
    tensors = {n: info for n, info in found.tensors.items() if not n.startswith(("blocks.29.", "vace_blocks.14."))}
    identity = identify(fake(tensors))
    assert (identity.variant, identity.config.vace_layers) == ("vace-custom", tuple(range(0, 28, 2)))


def test_a_file_may_say_which_blocks_have_vace_blocks():
    found, layers = checkpoint("wan21_official_vace_1.3B"), [*range(14), 29]
    told = replace(found, metadata={"wanqwen": json.dumps({"vace_layers": layers})})
    assert identify(told).config.vace_layers == tuple(layers)
    told = replace(found, metadata={"wanqwen": json.dumps({"vace_layers": [1, 0]})})
    with pytest.raises(ValueError, match=r"into the blocks \(1, 0\), where .* some of the 30 blocks, in order"):
        identify(told)


def test_missing_and_unexpected_are_listed():
    found = checkpoint("wan21_comfy_t2v_1.3B_fp16")
    prefix = "model.diffusion_model."
    tensors = {**found.tensors, "stray": TensorInfo("F32", (1,)), f"{prefix}blocks.3.extra": TensorInfo("F32", (1,))}
    del tensors[f"{prefix}blocks.5.norm3.bias"]
    identity = identify(fake(tensors))
    assert identity.missing == ("blocks.5.norm3.bias",)
    assert set(identity.unexpected) == {"stray", f"{prefix}blocks.3.extra"}


def test_file_without_the_tensor_that_tells_its_size_is_an_error():
    found = checkpoint("wan21_official_t2v_1.3B")
    tensors = {name: info for name, info in found.tensors.items() if name != "time_embedding.0.weight"}
    with pytest.raises(ValueError, match=r"lacks time_embedding\.0\.weight"):
        identify(fake(tensors))


def test_embedding_under_its_second_name_is_enough():
    found = checkpoint("wan21_diffusers_umt5_xxl")
    second = {
        ("encoder.embed_tokens.weight" if name == "shared.weight" else name): i for name, i in found.tensors.items()
    }
    alone, both = identify(fake(second)), identify(fake(second | dict(found.tensors)))
    assert alone.names["token_embedding.weight"] == "encoder.embed_tokens.weight"
    assert both.names["token_embedding.weight"] == "shared.weight"
    assert both.ignored == ("encoder.embed_tokens.weight",)
    assert alone.missing == both.missing == alone.unexpected == both.unexpected == ()
