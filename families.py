"""The families of models that this pack knows, and which of them a checkpoint belongs to: told without PyTorch."""

from math import prod

from .core.types import Checkpoint, Family, FamilyFiles, Identity, Preset
from .core.weights.lora import Fit, LoraFile, fit, is_lora, read_names
from .qwen_image.files import FILES as QWEN_IMAGE
from .qwen_image.identify import identify as identify_qwen_image
from .qwen_image.identify import variant_of
from .qwen_image.identify import with_variant as qwen_image_variant
from .wan.files import FILES as WAN
from .wan.identify import identify as identify_wan

FAMILIES: tuple[FamilyFiles, ...] = (WAN, QWEN_IMAGE)
IDENTIFIERS = (identify_wan, identify_qwen_image)
SHOWN, LONGEST = 6, 120  # names in an error, and letters of each

# What people put in the wrong socket: a part of a name that tells -> what it is, and what to do.
PACKED = (
    (
        ".qweight",
        "a 4-bit model (SVDQuant of Nunchaku, GPTQ, AWQ), which this version does not read: use an fp8 or "
        "16-bit file, or GGUF Q4_K",
    ),
    (
        "bitsandbytes__",
        "a 4-bit model of bitsandbytes, which this version does not read: use an fp8 or 16-bit file, or GGUF Q4_K",
    ),
)
LORA = "a LoRA, not a model: load it with a LoRA node"
STRANGERS = (
    (
        "v.patch_embd.",
        "the picture part (mmproj) of a language model, in a file of its own: choose the file of its text part; for "
        "edits take Qwen2.5-VL as .safetensors, which has both",
    ),
    ("vace_blocks.", "the VACE half of a model alone: use a whole VACE model"),
    ("downsamples.0.downsamples.", "a Wan 2.2 VAE: use the Wan 2.1 VAE"),
    ("encoder.block.0.layer.0.SelfAttention", "a T5 text encoder, not the UMT5 (umt5-xxl) of Wan"),
    ("controlnet_blocks.", "a ControlNet, which this version does not read yet"),
    ("transformer_blocks.0.img_mod.", "a part of a Qwen-Image model, or one repacked in a way that is not known"),
    ("visual.blocks.0.mlp.fc1.", "Qwen2-VL, not the Qwen2.5-VL of Qwen-Image"),
    ("visual.blocks.0.mlp.linear_fc1.", "Qwen3-VL, not the Qwen2.5-VL of Qwen-Image"),
    (
        "vision_model.encoder.layers.0.",
        "an image encoder, but no CLIP: Wan takes clip_vision_h.safetensors",
    ),
    ("visual.transformer.resblocks.", "a CLIP in open_clip's own naming: Wan takes clip_vision_h.safetensors"),
    (".layer_scale2.lambda1", "a DINOv2 image encoder: Wan takes clip_vision_h.safetensors"),
    ("layers.0.self_attn.q_proj.", "a language model, but not the Qwen2.5-VL of Qwen-Image"),
    ("double_blocks.0.", "a Flux or Hunyuan model"),
    (
        "first_stage_model.",
        "an all-in-one checkpoint: this pack takes model, text encoder and VAE as files of their own",
    ),
)


def identify(checkpoint: Checkpoint) -> Identity:
    """Return what a checkpoint is; raise ValueError, with what it seems to be, if no family knows it."""
    for identify_one in IDENTIFIERS:
        if identity := identify_one(checkpoint):
            return identity
    names = list(checkpoint.tensors)
    stranger = _seen(names, PACKED) or (LORA if is_lora(checkpoint) else _seen(names, STRANGERS))
    raise ValueError(
        f"{checkpoint.path} is none of the models this pack knows (Wan 2.1 diffusion models, VAE, UMT5, CLIP ViT-H; "
        "Qwen-Image diffusion models, VAE, Qwen2.5-VL)"
        + (f"; it looks like {stranger}" if stranger else "")
        + f". It holds {len(names)} tensors: {_some(names)}"
    )


def _seen(names: list[str], table: tuple[tuple[str, str], ...]) -> str | None:
    return next((what for part, what in table if any(part in name for name in names)), None)


def family(name: str) -> Family:
    """Return the family of an `Identity.family`, with its models; these need PyTorch, which is imported now."""
    from .qwen_image.family import FAMILY as QWEN_IMAGE_MODELS
    from .wan.family import FAMILY as WAN_MODELS

    return next(known for known in (WAN_MODELS, QWEN_IMAGE_MODELS) if known.name == name)


def family_of_lora(checkpoint: Checkpoint) -> tuple[FamilyFiles, LoraFile]:
    """Return the family that a LoRA is for, whose names most of its tensors have. Raises ValueError if it is none's."""
    read = [(known, read_names(checkpoint, known.spellings)) for known in FAMILIES]
    known, file = min(read, key=lambda pair: len(pair[1].unknown))
    if not file.parts:
        raise ValueError(
            f"{checkpoint.path} is a LoRA of none of the models this pack knows (Wan 2.1, Qwen-Image). It holds "
            f"{len(checkpoint.tensors)} tensors: {_some(list(checkpoint.tensors))}"
        )
    return known, file


def fits_of_lora(known: FamilyFiles, file: LoraFile) -> dict[str, Fit]:
    """Return how a LoRA fits each published model of its family, those that it fits best; none if it fits none."""
    fits = {name: fit(file, known.parameters(config), known.parts) for name, config in known.variants.items()}
    most = max((found.num_used for found in fits.values()), default=0)
    return {name: found for name, found in fits.items() if found.num_used == most and most}


def width_of_lora(file: LoraFile) -> int | None:
    """Return the width of the model that a LoRA was made for, as most of its tensors have it; None if none tells."""
    widths = [
        file.checkpoint.tensors[name].shape
        for tensors in file.parts.values()
        for role, name in tensors.items()
        if role in ("down", "diff")
    ]
    counted = [prod(shape[1:]) if len(shape) > 1 else shape[0] for shape in widths if shape]
    return max(set(counted), key=counted.count, default=None)


def presets_of_lora(known: FamilyFiles, checkpoint: Checkpoint) -> dict[str, Preset]:
    """Return the presets that a LoRA wants by its name, as nothing else in a file tells that it is a distillation."""
    name = "".join(letter for letter in checkpoint.path.name.lower() if letter.isalnum())
    return {key: preset for key, preset in known.presets.items()
            if preset.words and all(word in name for word in preset.words)}  # fmt: skip


def recognised_by(checkpoint: Checkpoint, identity: Identity) -> str:
    """Return in words where the variant of a checkpoint was recognised from."""
    if identity.family == QWEN_IMAGE.name and identity.role == "diffusion_model":
        return variant_of(checkpoint)[1]
    return "names and shapes of its tensors"


def with_variant(identity: Identity, name: str) -> Identity:
    """Return a diffusion model's identity as the variant that its user says it is. Raises ValueError if it can't be."""
    if identity.family != QWEN_IMAGE.name:
        raise ValueError(f"a {identity.family} model tells its variant itself: {identity.variant}, not {name}")
    return qwen_image_variant(identity, name)


def _some(names: list[str]) -> str:
    return ", ".join(name[:LONGEST] for name in names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
