"""How models of the Qwen-Image family are written: in which spellings, and which weights published files round."""

from dataclasses import replace

from ..core.types import Checkpoint, Identity
from ..core.weights.export import Export, renamed, stated_shapes
from .family import keep_float32
from .files import FILES
from .identify import VL_FIELDS
from .keymap import (
    DIFFUSION_MODEL_SPELLINGS,
    TEXT_ENCODER_PREFIXES,
    TEXT_ENCODER_SPELLINGS,
    TOKENIZER,
    ZERO_COND_T_MARKER,
)
from .vl_config import VLConfig

OFFICIAL, DIFFUSERS, COMFYUI, HUGGINGFACE = "official", "diffusers", "comfyui", "huggingface"
ARCHITECTURE, TEXT_ARCHITECTURE = "qwen_image", "qwen2vl"  # as GGUF files call them


def export_of(checkpoint: Checkpoint, identity: Identity) -> Export:
    """Return how a checkpoint of this family can be written."""
    return EXPORTS[identity.role](checkpoint, identity)


def _diffusion_model(checkpoint: Checkpoint, identity: Identity) -> Export:
    [official] = DIFFUSION_MODEL_SPELLINGS
    shapes = FILES.parameters(identity.config)
    config = identity.config
    return Export(
        shapes=shapes,
        spellings=dict.fromkeys((OFFICIAL, DIFFUSERS, COMFYUI), official),
        respell=renamed(identity, shapes),
        # As Comfy-Org's qwen_image_edit_2511_fp8mixed.
        quantised=("transformer_blocks.*.weight",),
        whole=("transformer_blocks.0.img_mod.1.weight",),
        linears=("*.weight",),
        float32=keep_float32,
        marks={ZERO_COND_T_MARKER: (OFFICIAL, COMFYUI)} if config.zero_cond_t else {},
        told={"num_heads": config.num_heads, "axes": list(config.axes), "variant": identity.variant},
        gguf=ARCHITECTURE,
        gguf_spelling=official,
    )


def _text_encoder(checkpoint: Checkpoint, identity: Identity) -> Export:
    official, transformers_5, _, llama_cpp = TEXT_ENCODER_SPELLINGS
    transformers_5 = replace(transformers_5, prefix=TEXT_ENCODER_PREFIXES[1])
    shapes = stated_shapes(checkpoint, identity)
    config: VLConfig = identity.config
    return Export(
        shapes=shapes,
        spellings={
            **dict.fromkeys((OFFICIAL, HUGGINGFACE, DIFFUSERS, COMFYUI), official),
            transformers_5.name: transformers_5,
        },
        respell=renamed(identity, shapes),
        quantised=("model.layers.*.weight", "visual.blocks.*.weight", "visual.merger.mlp.*.weight"),
        carried=(TOKENIZER,),
        told=_told(config) if identity.variant == "custom" else {},
        # GGUF files of it hold the language model alone.
        gguf=None if config.vision else TEXT_ARCHITECTURE,
        gguf_spelling=llama_cpp,
    )


def _told(config: VLConfig) -> dict[str, object]:
    told: dict[str, object] = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    told |= {name: getattr(config, name) for name in VL_FIELDS}
    if config.vision is not None:
        told |= {"vision_heads": config.vision.num_heads, "window": config.vision.window}
        told["full_attention"] = list(config.vision.full_attention)
    return told


EXPORTS = {"diffusion_model": _diffusion_model, "text_encoder": _text_encoder}
