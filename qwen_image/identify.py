"""Which Qwen-Image model a checkpoint is: by its names and shapes, and where these don't tell, by what is around it."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.types import Checkpoint, Identity
from ..core.weights import keymap
from ..core.weights.identity import (
    METADATA_KEY,
    converted,
    count,
    identity,
    made,
    own_values,
    positive,
    read_json,
    shapes,
    whole_numbers,
)
from .config import AXES, HEAD_WIDTH, PATCH, VARIANTS, QwenImageConfig, Variant
from .files import FILES, NAME
from .keymap import (
    DIFFUSION_MODEL_IGNORED,
    DIFFUSION_MODEL_SPELLINGS,
    LANGUAGE_MODEL,
    LAYERED,
    LAYERS,
    TEXT_ENCODER_IGNORED,
    TEXT_ENCODER_PREFIXES,
    TEXT_ENCODER_SPELLINGS,
    VISION,
    VISION_BLOCKS,
    VISION_TOWER,
    ZERO_COND_T_MARKER,
)
from .vl_config import HEAD_WIDTH as VL_HEAD_WIDTH
from .vl_config import VISION_HEAD_WIDTH, VisionConfig, VLConfig

CONFIG_FILE = "config.json"
PIPELINE_FILE = "model_index.json"  # of a diffusers repository, beside the folders of its models
TRANSFORMER_FOLDER = "transformer"
TRANSFORMER_CLASS = "QwenImageTransformer2DModel"

# Names that only this transformer and this encoder have; the last of them is not in other language models.
DIFFUSION_MODEL_TELLING = (
    "transformer_blocks.0.img_mod.1.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
    "txt_norm.weight",
    "proj_out.weight",
)
TEXT_ENCODER_TELLING = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
)
OTHER_VISION = ("visual.blocks.0.mlp.fc1.weight", "visual.blocks.0.mlp.linear_fc1.weight")  # Qwen2-VL, Qwen3-VL

# The class of a diffusers pipeline -> the variant that it runs. Edit-2511 has the class of 2509 and a flag.
PIPELINES = {
    "QwenImagePipeline": "t2i",
    "QwenImageImg2ImgPipeline": "t2i",
    "QwenImageInpaintPipeline": "t2i",
    "QwenImageEditPipeline": "edit",
    "QwenImageEditInpaintPipeline": "edit",
    "QwenImageEditPlusPipeline": "edit-2509",
}
# A word beside "edit" in the name of a file or folder -> the variant, the most particular first.
EDIT = "edit"
WORDS = (("2511", "edit-2511"), ("2509", "edit-2509"), ("plus", "edit-2509"), (EDIT, "edit"))
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")


def _three(value: Any) -> tuple[int, ...]:
    found = whole_numbers(value)
    if len(found) != 3:
        raise ValueError("expected three numbers")
    return found


TRANSFORMER_KINDS = {"num_heads": positive, "axes": _three}
VL_KINDS = {
    "num_heads": positive,
    "num_kv_heads": positive,
    "mrope_section": _three,
    "rope_theta": float,
    "eps": float,
    "min_pixels": positive,
    "max_pixels": positive,
    "vision_heads": positive,
    "window": positive,
    "full_attention": whole_numbers,
}
VL_MODEL_TYPES = ("qwen2_5_vl", "qwen2_5_vl_text")
# Of VL_KINDS, what goes into the config as it is, where it is told.
VL_FIELDS = ("mrope_section", "rope_theta", "eps", "min_pixels", "max_pixels")
VISION_FIELDS = ("window", "full_attention")


def identify(checkpoint: Checkpoint) -> Identity | None:
    """Return what a checkpoint of the Qwen-Image family is, None if it is none. The VAE is Wan's, and known there.

    Raises ValueError where the file is one but lacks what tells its size, or contradicts itself.
    """
    return _diffusion_model(checkpoint) or _text_encoder(checkpoint)


def variant_of(checkpoint: Checkpoint) -> tuple[Variant, str]:
    """Return the variant of a diffusion model, and in words where it was recognised from.

    Only the layered model can be told by its weights. For the others: ComfyUI's marker tensor; `zero_cond_t` in the
    config.json, and the pipeline's class, of a diffusers folder; our own metadata; the name of the file or its folder.
    Raises ValueError where our own metadata names no known variant.
    """
    if _is_layered(checkpoint):
        return VARIANTS["layered"], f"the tensor {LAYERED}"
    told = next(_tellings(checkpoint), None)
    if told is None:
        return VARIANTS["t2i"], "nothing that says otherwise"
    name, where = told
    return VARIANTS[name], where


def with_variant(found: Identity, name: str) -> Identity:
    """Return a diffusion model's identity as another variant of the same weights, as its user says.

    Raises ValueError for an unknown name, and for the layered variant of other weights and the reverse.
    """
    if name not in VARIANTS:
        raise ValueError(f"Qwen-Image variant {name!r} is not known: choose one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    if variant.layered != found.config.layered:
        has = "has" if found.config.layered else "lacks"
        others = [other.name for other in VARIANTS.values() if other.layered == found.config.layered]
        raise ValueError(
            f"Qwen-Image variant {name!r} does not fit this file: it {has} the tensor {LAYERED} of the layered model. "
            f"Choose {' or '.join(others)}, or the file that belongs to {name!r}."
        )
    return replace(found, variant=name, config=replace(found.config, zero_cond_t=variant.zero_cond_t))


def _diffusion_model(checkpoint: Checkpoint) -> Identity | None:
    match = keymap.pick(checkpoint.tensors, DIFFUSION_MODEL_SPELLINGS)
    if match is None or not all(name in match.names for name in DIFFUSION_MODEL_TELLING):
        return None
    variant, _ = variant_of(checkpoint)
    config = _transformer_config(checkpoint, match, variant)
    return identity(
        checkpoint,
        match,
        keymap.account(match, FILES.parameters(config), DIFFUSION_MODEL_IGNORED),
        family=NAME,
        role="diffusion_model",
        variant=variant.name,
        config=config,
    )


def _transformer_config(checkpoint: Checkpoint, match: keymap.Match, variant: Variant) -> QwenImageConfig:
    shape = shapes(checkpoint, match.names, "Qwen-Image diffusion model")
    dim, token_dim = shape("img_in.weight", 2)
    head_width = shape("transformer_blocks.0.attn.norm_q.weight", 1)[0]
    told = own_values(checkpoint, TRANSFORMER_KINDS) | converted(
        {"axes": _folder_config(checkpoint).get("axes_dims_rope")}, TRANSFORMER_KINDS, str(_beside(checkpoint))
    )
    if told.get("num_heads", dim // head_width) * head_width != dim:
        raise ValueError(
            f"{checkpoint.path}: says that it has {told.get('num_heads', 'equal')} heads, but its width is {dim} and "
            f"that of a head {head_width}"
        )
    if "axes" not in told and head_width != HEAD_WIDTH:
        raise ValueError(
            f"{checkpoint.path}: a Qwen-Image with heads of {head_width}, not {HEAD_WIDTH}, does not say how they are "
            f'divided among frame, row and column; its metadata needs {METADATA_KEY} = {{"axes": [A, B, C]}}'
        )
    sizes = {
        "num_layers": count(match.names, "transformer_blocks."),
        "num_heads": dim // head_width,
        "dim": dim,
        "ffn_dim": shape("transformer_blocks.0.img_mlp.net.0.proj.weight", 2)[0],
        "text_dim": shape("txt_in.weight", 2)[1],
        "freq_dim": shape("time_text_embed.timestep_embedder.linear_1.weight", 2)[1],
        "latent_channels": token_dim // PATCH**2,
        "axes": told.get("axes", AXES),
    }
    return made(checkpoint, QwenImageConfig, sizes | {"zero_cond_t": variant.zero_cond_t, "layered": variant.layered})


def _is_layered(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(f"{LAYERED}.weight") for name in checkpoint.tensors)


def _tellings(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield variants and where they were found, the surest first; the layered one is known otherwise."""
    if any(name.endswith(ZERO_COND_T_MARKER) for name in checkpoint.tensors):
        yield "edit-2511", f"the marker tensor {ZERO_COND_T_MARKER}"
    if _folder_config(checkpoint).get("zero_cond_t"):
        yield "edit-2511", f"zero_cond_t in {_beside(checkpoint)}"
    pipeline = checkpoint.path.parent.parent / PIPELINE_FILE
    if checkpoint.path.parent.name == TRANSFORMER_FOLDER:
        name = read_json(pipeline).get("_class_name")
        if name in PIPELINES:
            yield PIPELINES[name], f"{name} in {pipeline}"
    own = own_values(checkpoint, {"variant": _variant_name}).get("variant")
    if own and not VARIANTS[own].layered:
        yield own, f"the file's metadata {METADATA_KEY}"
    for name in _called(checkpoint.path):
        words = [word.lower() for word in WORD.findall(name)]
        for word, variant in WORDS:
            if EDIT in words and word in words:
                yield variant, f"the word {word!r} in {name!r}"


def _called(path: Path) -> Iterator[str]:
    """Yield the name of a file and that of the folder which is called after the model."""
    yield path.name
    folder = path.parent
    if folder.name == TRANSFORMER_FOLDER:
        folder = folder.parent
    if folder.parent.name == "snapshots":  # of the Hugging Face cache: models--OWNER--NAME/snapshots/REVISION
        folder = folder.parent.parent
    yield folder.name


def _variant_name(value: Any) -> str:
    if value not in VARIANTS:
        raise ValueError(f"expected one of {', '.join(VARIANTS)}")
    return value


def _beside(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.parent / CONFIG_FILE


def _folder_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the config.json of a diffusers folder of this transformer, nothing for other files."""
    found = read_json(_beside(checkpoint))
    return found if found.get("_class_name") == TRANSFORMER_CLASS else {}


def _text_encoder(checkpoint: Checkpoint) -> Identity | None:
    match = keymap.pick(checkpoint.tensors, TEXT_ENCODER_SPELLINGS, TEXT_ENCODER_PREFIXES)
    if match is None or not all(name in match.names for name in TEXT_ENCODER_TELLING):
        return None
    if any(name.endswith(OTHER_VISION) for name in match.unmatched):
        return None
    told = own_values(checkpoint, VL_KINDS) | _folder_values(checkpoint)
    config = _vl_config(checkpoint, match, told)
    rows, layers = LANGUAGE_MODEL, {LAYERS: config.num_layers}
    if config.vision is not None:
        rows, layers = rows | VISION_TOWER, layers | {VISION_BLOCKS: config.vision.depth}
    found = keymap.account(match, keymap.expand(rows, layers), TEXT_ENCODER_IGNORED)
    return identity(
        checkpoint,
        match,
        found,
        family=NAME,
        role="text_encoder",
        variant=_encoder_variant(config),
        config=config,
    )


def _encoder_variant(config: VLConfig) -> str:
    published = VLConfig()
    if config == published:
        return "qwen2.5-vl-7b"
    return "qwen2.5-7b-text" if config == replace(published, vision=None) else "custom"


def _vl_config(checkpoint: Checkpoint, match: keymap.Match, told: dict[str, Any]) -> VLConfig:
    shape = shapes(checkpoint, match.names, "Qwen2.5-VL")
    vocab_size, hidden = shape("model.embed_tokens.weight", 2)
    heads = told.get("num_heads") or _heads(checkpoint, hidden, VL_HEAD_WIDTH, "num_heads")
    if hidden % heads:
        raise ValueError(f"{checkpoint.path}: says that it has {heads} heads, but its width of {hidden} is no multiple")
    head_width = hidden // heads
    kv_heads = shape("model.layers.0.self_attn.k_proj.weight", 2)[0] // head_width
    if told.get("num_kv_heads", kv_heads) != kv_heads:
        raise ValueError(
            f"{checkpoint.path}: says that it has {told['num_kv_heads']} heads of keys, but its tensors make "
            f"{kv_heads} of width {head_width}"
        )
    if "mrope_section" not in told and head_width != VL_HEAD_WIDTH:
        raise _untold(checkpoint, f"how heads of {head_width} are divided among time, row and column", "mrope_section")
    has_vision = any(name.startswith(VISION) for name in match.names)
    sizes = {
        "hidden": hidden,
        "intermediate": shape("model.layers.0.mlp.gate_proj.weight", 2)[0],
        "num_layers": count(match.names, f"{LAYERS}."),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "vocab_size": vocab_size,
        "vision": _vision_config(checkpoint, match, told) if has_vision else None,
    }
    return made(checkpoint, VLConfig, sizes | {field: told[field] for field in VL_FIELDS if field in told})


def _vision_config(checkpoint: Checkpoint, match: keymap.Match, told: dict[str, Any]) -> VisionConfig:
    shape = shapes(checkpoint, match.names, "Qwen2.5-VL")
    hidden, _, temporal_patch, patch_size, _ = shape("visual.patch_embed.proj.weight", 5)
    depth = count(match.names, f"{VISION_BLOCKS}.")
    if "full_attention" not in told and depth != VisionConfig().depth:
        raise _untold(checkpoint, f"which of {depth} vision layers attend to the whole picture", "full_attention")
    sizes = {
        "depth": depth,
        "hidden": hidden,
        "intermediate": shape("visual.blocks.0.mlp.gate_proj.weight", 2)[0],
        "num_heads": told.get("vision_heads") or _heads(checkpoint, hidden, VISION_HEAD_WIDTH, "vision_heads"),
        "out_hidden": shape("visual.merger.mlp.2.weight", 2)[0],
        "patch_size": patch_size,
        "temporal_patch": temporal_patch,
        "merge": math.isqrt(shape("visual.merger.mlp.0.weight", 2)[1] // hidden),
    }
    return made(checkpoint, VisionConfig, sizes | {field: told[field] for field in VISION_FIELDS if field in told})


def _heads(checkpoint: Checkpoint, width: int, head_width: int, key: str) -> int:
    if width % head_width:
        raise _untold(checkpoint, f"how many heads its width of {width} has (not heads of {head_width})", key)
    return width // head_width


def _untold(checkpoint: Checkpoint, what: str, key: str) -> ValueError:
    return ValueError(
        f"{checkpoint.path}: looks like a Qwen2.5-VL, but neither its shapes nor a {CONFIG_FILE} beside it tell "
        f"{what}; "
        f'its metadata needs {METADATA_KEY} = {{"{key}": ...}}, or put the {CONFIG_FILE} of the model beside it'
    )


def _folder_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the config.json of a Hugging Face folder tells, by the names of VL_KINDS.

    transformers 4 has the language model's values at the top, 5 below text_config; the rotation moved as well.
    """
    top = read_json(_beside(checkpoint))
    if top.get("model_type") not in VL_MODEL_TYPES:
        return {}
    text = top.get("text_config") or top
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    vision = top.get("vision_config") or {}
    values = {
        "num_heads": text.get("num_attention_heads"),
        "num_kv_heads": text.get("num_key_value_heads"),
        "mrope_section": rope.get("mrope_section"),
        "rope_theta": text.get("rope_theta") or rope.get("rope_theta"),
        "eps": text.get("rms_norm_eps"),
        "vision_heads": vision.get("num_heads"),
        "window": vision.get("window_size"),
        "full_attention": vision.get("fullatt_block_indexes"),
    }
    return converted(values, VL_KINDS, str(_beside(checkpoint)))
