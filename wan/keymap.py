"""How the tools of the field name the tensors of Wan 2.1. Official names are those of the Wan-AI checkpoints.

ComfyUI's files keep the official names of the transformer and the VAE, with or without a prefix.
"""

from collections.abc import Iterable

from ..core.types import Spelling
from ..core.weights.keymap import BARE, LAYER, WEIGHT, below, table, under

# Official and diffusers disagree on the numbers of the block's norms: official norm1 and norm2 have no parameters, and
# the affine norm3 before the cross-attention is diffusers' norm2.
_BLOCK = {
    "modulation": "scale_shift_table",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "norm3": "norm2",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    **below("blocks.{}", "blocks.{}", _BLOCK),
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "blocks.{}.cross_attn.k_img": "blocks.{}.attn2.add_k_proj",
    "blocks.{}.cross_attn.v_img": "blocks.{}.attn2.add_v_proj",
    "blocks.{}.cross_attn.norm_k_img": "blocks.{}.attn2.norm_added_k",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "vace_patch_embedding": "vace_patch_embedding",
    **below("vace_blocks.{}", "vace_blocks.{}", _BLOCK),
    "vace_blocks.0.before_proj": "vace_blocks.0.proj_in",
    "vace_blocks.{}.after_proj": "vace_blocks.{}.proj_out",
}

# diffusers' I2V folders hold zeros under norm_added_q, which nothing reads; model_type.* are empty markers.
DIFFUSION_MODEL_IGNORED = ("blocks.*.attn2.norm_added_q.weight", "model_type.*")

# Pieces of names of what only some models have, for telling why a LoRA does not fit.
PARTS = {
    "_img": "image branch, which those for image to video have",
    "img_emb": "image branch, which those for image to video have",
    "vace_": "VACE branch",
}

TEXT_ENCODER = {
    "token_embedding": ("shared", WEIGHT),
    **under(
        "blocks.{}",
        "encoder.block.{}",
        {
            "norm1": ("layer.0.layer_norm", WEIGHT),
            "attn.q": ("layer.0.SelfAttention.q", WEIGHT),
            "attn.k": ("layer.0.SelfAttention.k", WEIGHT),
            "attn.v": ("layer.0.SelfAttention.v", WEIGHT),
            "attn.o": ("layer.0.SelfAttention.o", WEIGHT),
            "pos_embedding.embedding": ("layer.0.SelfAttention.relative_attention_bias", WEIGHT),
            "norm2": ("layer.1.layer_norm", WEIGHT),
            "ffn.gate.0": ("layer.1.DenseReluDense.wi_0", WEIGHT),
            "ffn.fc1": ("layer.1.DenseReluDense.wi_1", WEIGHT),
            "ffn.fc2": ("layer.1.DenseReluDense.wo", WEIGHT),
        },
    ),
    "norm": ("encoder.final_layer_norm", WEIGHT),
}
# llama.cpp's names, in GGUF files.
TEXT_ENCODER_GGUF = {
    "token_embedding": "token_embd",
    "blocks.{}.norm1": "enc.blk.{}.attn_norm",
    "blocks.{}.attn.q": "enc.blk.{}.attn_q",
    "blocks.{}.attn.k": "enc.blk.{}.attn_k",
    "blocks.{}.attn.v": "enc.blk.{}.attn_v",
    "blocks.{}.attn.o": "enc.blk.{}.attn_o",
    "blocks.{}.pos_embedding.embedding": "enc.blk.{}.attn_rel_b",
    "blocks.{}.norm2": "enc.blk.{}.ffn_norm",
    "blocks.{}.ffn.gate.0": "enc.blk.{}.ffn_gate",
    "blocks.{}.ffn.fc1": "enc.blk.{}.ffn_up",
    "blocks.{}.ffn.fc2": "enc.blk.{}.ffn_down",
    "norm": "enc.output_norm",
}
# The tokenizer of ComfyUI's files, the second name of the tied embedding, and the decoder of whole UMT5 checkpoints.
TEXT_ENCODER_IGNORED = (
    *("spiece_model", "encoder.embed_tokens.weight", "decoder.*", "lm_head.weight"),
    *("dec.*", "output.weight"),
)


# Official and transformers' names of the CLIP visual tower. q, k and v are fused in the one and apart in the other, so
# that each has rows of its own.
_TOWER = {
    "visual.cls_embedding": ("embeddings.class_embedding", BARE),
    "visual.pos_embedding": ("embeddings.position_embedding.weight", BARE),
    "visual.patch_embedding": ("embeddings.patch_embedding", WEIGHT),
    "visual.pre_norm": ("pre_layrnorm", LAYER),  # sic
    **under(
        "visual.transformer.{}",
        "encoder.layers.{}",
        {
            "norm1": ("layer_norm1", LAYER),
            "attn.proj": ("self_attn.out_proj", LAYER),
            "norm2": ("layer_norm2", LAYER),
            "mlp.0": ("mlp.fc1", LAYER),
            "mlp.2": ("mlp.fc2", LAYER),
        },
    ),
}
IMAGE_ENCODER = table(_TOWER)
IMAGE_ENCODER_FUSED = "visual.transformer.{}.attn.to_qkv"
IMAGE_ENCODER_APART = tuple(f"encoder.layers.{{}}.self_attn.{name}_proj" for name in "qkv")  # in the fused order
IMAGE_ENCODER_OFFICIAL = {path: leaves for path, (_, leaves) in _TOWER.items()} | {IMAGE_ENCODER_FUSED: LAYER}
IMAGE_ENCODER_HUGGINGFACE = dict(_TOWER.values()) | dict.fromkeys(IMAGE_ENCODER_APART, LAYER)
# What transformers puts before its names, by its version and by what else is in the file.
IMAGE_ENCODER_PREFIXES = ("", "vision_model.")
# Wan takes the rows before the last norm and never compares them with a text.
IMAGE_ENCODER_IGNORED = (
    "textual.*",
    "log_scale",
    "visual.post_norm.*",
    "visual.head",
    "text_model.*",
    "logit_scale",
    "text_projection.weight",
    "post_layernorm.*",
    "embeddings.position_ids",
    "visual_projection.weight",
)


def _same(paths: Iterable[str]) -> dict[str, str]:
    return {path: path for path in paths}


_HUGGINGFACE = table(TEXT_ENCODER)

DIFFUSION_MODEL_SPELLINGS = (
    Spelling(name="official", table=_same(_DIFFUSERS)),
    Spelling(name="diffusers", table=_DIFFUSERS),
)
TEXT_ENCODER_SPELLINGS = (
    Spelling(name="official", table=_same(_HUGGINGFACE)),
    Spelling(name="huggingface", table=_HUGGINGFACE),
    # Files that keep the tied embedding under its second name only.
    Spelling(name="huggingface", table=_HUGGINGFACE | {"token_embedding": "encoder.embed_tokens"}),
    Spelling(name="llama.cpp", table=TEXT_ENCODER_GGUF),
)
IMAGE_ENCODER_SPELLINGS = (
    Spelling(name="official", table=_same(IMAGE_ENCODER_OFFICIAL)),
    Spelling(name="huggingface", table=_same(IMAGE_ENCODER_HUGGINGFACE)),
)

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLE = {"resample.1": "resample.1", "time_conv": "time_conv"}
_ATTENTION = {path: path for path in ("norm", "to_qkv", "proj")}
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_MIDDLE = {
    "middle.0": ("mid_block.resnets.0", _RESIDUAL),
    "middle.1": ("mid_block.attentions.0", _ATTENTION),
    "middle.2": ("mid_block.resnets.1", _RESIDUAL),
}
VAE_MAX_LEVELS = 8


def vae_spellings(num_res_blocks: int) -> tuple[Spelling, ...]:
    """Return the spellings of a VAE with this many residual blocks per encoder level (the decoder has one more).

    The number matters to diffusers' decoder alone, which counts levels where the official one counts layers.
    """
    diffusers = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for part in ("encoder", "decoder"):
        diffusers |= {f"{part}.{path}": f"{part}.{other}" for path, other in _ENDS.items()}
        for path, (other, inner) in _MIDDLE.items():
            diffusers |= below(f"{part}.{path}", f"{part}.{other}", inner)
    diffusers |= below("encoder.downsamples.{}", "encoder.down_blocks.{}", _RESIDUAL | _RESAMPLE)
    per_level = num_res_blocks + 2
    for i in range(VAE_MAX_LEVELS * per_level):
        level, layer = divmod(i, per_level)
        up = f"decoder.up_blocks.{level}"
        if layer == per_level - 1:
            diffusers |= below(f"decoder.upsamples.{i}", f"{up}.upsamplers.0", _RESAMPLE)
        else:
            diffusers |= below(f"decoder.upsamples.{i}", f"{up}.resnets.{layer}", _RESIDUAL)
    return Spelling(name="official", table=_official_vae()), Spelling(name="diffusers", table=diffusers)


def _official_vae() -> dict[str, str]:
    paths = ["conv1", "conv2", *(f"{part}.{path}" for part in ("encoder", "decoder") for path in _ENDS)]
    for part, levels in (("encoder", "downsamples"), ("decoder", "upsamples")):
        paths += [f"{part}.{path}.{leaf}" for path, (_, inner) in _MIDDLE.items() for leaf in inner]
        paths += [f"{part}.{levels}.{{}}.{leaf}" for leaf in _RESIDUAL | _RESAMPLE]
    return _same(paths)
