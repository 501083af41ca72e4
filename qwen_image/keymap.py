"""How the tools of the field name the tensors of Qwen-Image and of its text encoder.

The official names of the transformer are diffusers', which ComfyUI's files keep, with or without a prefix. Those of the
text encoder are what Hugging Face's transformers 4 wrote, as the published files and ComfyUI's have them.
"""

from collections.abc import Mapping

from ..core.types import Spelling
from ..core.weights.keymap import LAYER, WEIGHT

ZERO_COND_T_MARKER = "__index_timestep_zero__"  # empty tensor of ComfyUI's Qwen-Image-Edit-2511
LAYERED = "time_text_embed.addition_t_embedding"
TOKENIZER = "tokenizer_json"  # the bytes of a tokenizer.json, U8, inside text encoder files of our own
LAYERS = "model.layers"  # the stacks, as `keymap.expand` wants them
VISION_BLOCKS = "visual.blocks"
VISION = "visual."

Leaves = Mapping[str, tuple[str, ...]]  # module path -> its parameters


def _under(parent: str, rows: Leaves) -> dict[str, tuple[str, ...]]:
    return {f"{parent}.{path}": leaves for path, leaves in rows.items()}


def _rows(paths: Leaves) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {path: (path, leaves) for path, leaves in paths.items()}


_BLOCK = (
    *(f"{stream}_{path}" for stream in ("img", "txt") for path in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
    *(f"attn.{path}" for path in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
    *(f"attn.{path}" for path in ("to_out.0", "to_add_out", "norm_q", "norm_k", "norm_added_q", "norm_added_k")),
)
_DIFFUSION_MODEL = (
    *("img_in", "txt_norm", "txt_in", "norm_out.linear", "proj_out", LAYERED),
    *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
    *(f"transformer_blocks.{{}}.{path}" for path in _BLOCK),
)
DIFFUSION_MODEL_IGNORED = (ZERO_COND_T_MARKER,)
DIFFUSION_MODEL_SPELLINGS = (Spelling(name="official", table={path: path for path in _DIFFUSION_MODEL}),)

_DECODER_LAYER = {
    "input_layernorm": WEIGHT,
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), LAYER),
    "self_attn.o_proj": WEIGHT,
    "post_attention_layernorm": WEIGHT,
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), WEIGHT),
}
_VISION_BLOCK = {
    **dict.fromkeys(("norm1", "norm2"), WEIGHT),
    **dict.fromkeys(("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), LAYER),
}
LANGUAGE_MODEL = _rows(
    {
        "model.embed_tokens": WEIGHT,
        **_under("model.layers.{}", _DECODER_LAYER),
        "model.norm": WEIGHT,
    }
)
VISION_TOWER = _rows(
    {
        "visual.patch_embed.proj": WEIGHT,
        **_under("visual.blocks.{}", _VISION_BLOCK),
        "visual.merger.ln_q": WEIGHT,
        "visual.merger.mlp.0": LAYER,
        "visual.merger.mlp.2": LAYER,
    }
)
# llama.cpp's names, in GGUF files; these hold no vision tower.
LANGUAGE_MODEL_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
    "model.norm": "output_norm",
}
# Nothing is generated, so the head that turns rows into words is not needed; frequencies are computed.
TEXT_ENCODER_IGNORED = ("lm_head.*", TOKENIZER, "*.inv_freq", "output.weight", "rope_freqs.weight")


def _renamed(language_model: str, vision: str) -> dict[str, str]:
    return {path: language_model + path.removeprefix("model.") for path in LANGUAGE_MODEL} | {
        path: vision + path.removeprefix(VISION) for path in VISION_TOWER
    }


TEXT_ENCODER_SPELLINGS = (
    Spelling(name="official", table=_renamed("model.", VISION)),
    # transformers 5, and 4.52 on in memory; `model.` is a prefix.
    Spelling(name="transformers-5", table=_renamed("language_model.", VISION)),
    # The language model saved on its own.
    Spelling(name="language model alone", table=_renamed("", VISION)),
    Spelling(name="llama.cpp", table=LANGUAGE_MODEL_GGUF),
)
# Besides whole files: diffusers pipelines in one file, and ComfyUI's checkpoints and saved text encoders.
TEXT_ENCODER_PREFIXES = (
    "",
    "model.",
    "text_encoder.",
    "qwen25_7b.transformer.",
    "text_encoders.qwen25_7b.transformer.",
)
