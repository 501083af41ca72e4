"""Which Wan 2.1 model a checkpoint is, from its names and shapes alone."""

from collections.abc import Mapping
from math import prod

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
from .config import (
    HEAD_WIDTH,
    IMAGE_ENCODER_VARIANTS,
    VAE_VARIANTS,
    VARIANTS,
    ImageEncoderConfig,
    TextEncoderConfig,
    VAEConfig,
    WanConfig,
)
from .files import FILES, NAME
from .keymap import (
    DIFFUSION_MODEL_IGNORED,
    DIFFUSION_MODEL_SPELLINGS,
    IMAGE_ENCODER_HUGGINGFACE,
    IMAGE_ENCODER_IGNORED,
    IMAGE_ENCODER_OFFICIAL,
    IMAGE_ENCODER_PREFIXES,
    IMAGE_ENCODER_SPELLINGS,
    TEXT_ENCODER,
    TEXT_ENCODER_IGNORED,
    TEXT_ENCODER_SPELLINGS,
    vae_spellings,
)
from .shapes import vae as vae_shapes

METADATA_FIELDS = {"num_heads": positive, "text_len": positive, "eps": float, "vace_layers": whole_numbers}
IMAGE_ENCODER_FIELDS = {"num_heads": positive}

CONFIG_FILE = "config.json"
CLIP_MODEL_TYPES = ("clip_vision_model", "clip")  # of transformers' config.json: the tower, or a whole CLIP
ACTIVATION = "gelu"  # of the CLIP that Wan was trained with

IMAGE_WIDTH, IMAGE_POSITIONS = "img_emb.proj.0.bias", "img_emb.emb_pos"
CONTROL_EMBEDDING = "vace_patch_embedding.weight"
# The name that only this task's models have, the most particular first.
TELLING = (
    ("flf2v", IMAGE_POSITIONS),
    ("i2v", IMAGE_WIDTH),
    ("vace", CONTROL_EMBEDDING),
    ("t2v", "patch_embedding.weight"),
)

# Rows of each spelling of the image encoder; its stack, and the names that tell its sizes and that it is a CLIP.
IMAGE_ENCODERS = {
    "official": (
        IMAGE_ENCODER_OFFICIAL,
        (
            "visual.transformer",
            "visual.patch_embedding.weight",
            "visual.pos_embedding",
            "visual.transformer.0.mlp.0.bias",
            "visual.cls_embedding",
        ),
    ),
    "huggingface": (
        IMAGE_ENCODER_HUGGINGFACE,
        (
            "encoder.layers",
            "embeddings.patch_embedding.weight",
            "embeddings.position_embedding.weight",
            "encoder.layers.0.mlp.fc1.bias",
            "embeddings.class_embedding",
        ),
    ),
}


def identify(checkpoint: Checkpoint) -> Identity | None:
    """Return what a checkpoint of the Wan family is, None if it is none.

    Raises ValueError where the file is one but lacks what tells its size.
    """
    for role in (_diffusion_model, _vae, _text_encoder, _image_encoder):
        if found := role(checkpoint):
            return found
    return None


def _diffusion_model(checkpoint: Checkpoint) -> Identity | None:
    match = keymap.pick(checkpoint.tensors, DIFFUSION_MODEL_SPELLINGS)
    # The bias tells as well as the weight, which is not there in compressed files.
    if match is None or "blocks.0.self_attn.q.bias" not in match.names or "head.modulation" not in match.names:
        return None
    task = next((task for task, name in TELLING if name in match.names), "t2v")
    config = _transformer_config(checkpoint, match)
    size = (task, config.in_dim, config.dim, config.ffn_dim, config.num_layers)
    custom = "custom" if task == "t2v" else f"{task}-custom"
    return identity(
        checkpoint,
        match,
        keymap.account(match, FILES.parameters(config), DIFFUSION_MODEL_IGNORED),
        family=NAME,
        role="diffusion_model",
        variant=VARIANTS.get(size, custom),
        config=config,
    )


def _transformer_config(checkpoint: Checkpoint, match: keymap.Match) -> WanConfig:
    shape = shapes(checkpoint, match.names, "Wan diffusion model")
    dim, in_dim, *patch = shape("patch_embedding.weight", 5)
    ours = own_values(checkpoint, METADATA_FIELDS)
    image = {
        "image_dim": shape(IMAGE_WIDTH, 1)[0] if IMAGE_WIDTH in match.names else 0,
        "image_positions": shape(IMAGE_POSITIONS, 2, 3)[-2] if IMAGE_POSITIONS in match.names else 0,
    }
    if "num_heads" not in ours and dim % HEAD_WIDTH:
        raise ValueError(
            f"{checkpoint.path}: a Wan model of width {dim} is not made of heads of {HEAD_WIDTH}, and the file does "
            f'not say how many it has; the safetensors metadata needs {METADATA_KEY} = {{"num_heads": N}}'
        )
    num_layers = count(match.names, "blocks.")
    sizes = {
        "dim": dim,
        "in_dim": in_dim,
        "patch_size": tuple(patch),
        "ffn_dim": shape("blocks.0.ffn.0.bias", 1)[0],
        "num_layers": num_layers,
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "out_dim": shape("head.head.bias", 1)[0] // prod(patch),
        "num_heads": dim // HEAD_WIDTH,
    }
    if CONTROL_EMBEDDING in match.names and not image["image_dim"]:  # nobody published both in one
        sizes["vace_layers"] = _spread(num_layers, count(match.names, "vace_blocks."))
        sizes["vace_dim"] = shape(CONTROL_EMBEDDING, 5)[1]
    return made(checkpoint, WanConfig, sizes | ours | image)


def _spread(num_layers: int, num_chosen: int) -> tuple[int, ...]:
    """Return which of a model's blocks have a VACE block: from the first on, as far apart as they fit evenly.

    No file records it. Of the published sizes it is every second block (1.3B) and every fifth (14B).
    """
    step = (num_layers - 1) // max(1, num_chosen - 1)
    return tuple(range(0, num_chosen * step, step)) if step else tuple(range(num_chosen))


def _vae(checkpoint: Checkpoint) -> Identity | None:
    up = "decoder.up_blocks.0.resnets."
    resnets = count([name[name.find(up) :] for name in checkpoint.tensors if up in name], up)
    match = keymap.pick(checkpoint.tensors, vae_spellings(max(resnets - 1, 1)), (*keymap.PREFIXES, "vae."))
    telling = (
        "encoder.conv1.weight",
        "decoder.head.2.weight",
        "conv2.weight",
        "encoder.downsamples.0.residual.2.weight",
    )
    if match is None or not all(name in match.names for name in telling):
        return None
    config = _vae_config(checkpoint, match.names)
    found = keymap.account(match, vae_shapes(config))
    return identity(
        checkpoint,
        match,
        found,
        family=NAME,
        role="vae",
        variant=VAE_VARIANTS[config.channels],
        config=config,
    )


def _vae_config(checkpoint: Checkpoint, names: Mapping[str, str]) -> VAEConfig:
    """Read the encoder's list of layers: residual blocks, and at the end of each level but the last a resampling."""
    shape = shapes(checkpoint, names, "Wan VAE")
    dim, channels = shape("encoder.conv1.weight", 5)[:2]
    widths, blocks, temporal = [0], [0], []
    for i in range(count(names, "encoder.downsamples.")):
        layer = f"encoder.downsamples.{i}"
        # Either parameter of a layer tells that it is there; the other one may be what the file lacks.
        if any(f"{layer}.resample.1{leaf}" in names for leaf in keymap.LAYER):
            temporal.append(any(f"{layer}.time_conv{leaf}" in names for leaf in keymap.LAYER))
            widths.append(0)
            blocks.append(0)
        else:
            widths[-1] = shape(f"{layer}.residual.6.bias", 1)[0]
            blocks[-1] += 1
    if len(set(blocks)) > 1 or any(width % dim or not width for width in widths):
        raise ValueError(
            f"{checkpoint.path}: looks like a Wan VAE, but its encoder has levels of {blocks} blocks and {widths} "
            f"channels where a Wan VAE has equally many blocks per level and multiples of {dim} channels"
        )
    if channels not in VAE_VARIANTS:
        raise ValueError(
            f"{checkpoint.path}: looks like a Wan VAE, but for pixels of {channels} channels where 3 (RGB) or 4 (RGB "
            "and alpha) are expected"
        )
    return VAEConfig(
        dim=dim,
        z_dim=shape("conv2.weight", 5)[0],
        dim_mult=tuple(width // dim for width in widths),
        num_res_blocks=blocks[0],
        temporal_downsample=tuple(temporal),
        channels=channels,
    )


def _text_encoder(checkpoint: Checkpoint) -> Identity | None:
    prefixes = (*keymap.PREFIXES, "text_encoder.", "text_encoders.umt5xxl.transformer.")
    match = keymap.pick(checkpoint.tensors, TEXT_ENCODER_SPELLINGS, prefixes)
    if match is None:
        return None
    layers = count(match.names, "blocks.")
    # A position table in every layer is what sets UMT5 apart from T5, which has one in the first only.
    if not layers or f"blocks.{layers - 1}.pos_embedding.embedding.weight" not in match.names:
        return None
    shape = shapes(checkpoint, match.names, "UMT5 encoder")
    vocab_size, dim = shape("token_embedding.weight", 2)
    num_buckets, num_heads = shape("blocks.0.pos_embedding.embedding.weight", 2)
    config = TextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        dim_attn=shape("blocks.0.attn.q.weight", 2)[0],
        dim_ffn=shape("blocks.0.ffn.fc1.weight", 2)[0],
        num_heads=num_heads,
        num_layers=layers,
        num_buckets=num_buckets,
    )
    found = keymap.account(match, keymap.expand(TEXT_ENCODER, {"blocks": layers}), TEXT_ENCODER_IGNORED)
    variant = "umt5-xxl" if config == TextEncoderConfig() else "custom"
    return identity(checkpoint, match, found, family=NAME, role="text_encoder", variant=variant, config=config)


def _image_encoder(checkpoint: Checkpoint) -> Identity | None:
    match = keymap.pick(checkpoint.tensors, IMAGE_ENCODER_SPELLINGS, IMAGE_ENCODER_PREFIXES)
    if match is None:
        return None
    rows, telling = IMAGE_ENCODERS[match.spelling.name]
    stack, patch, positions, hidden, class_token = telling
    if patch not in match.names or class_token not in match.names:
        return None
    shape = shapes(checkpoint, match.names, "CLIP image encoder")
    dim = shape(patch, 4)[0]
    name, heads = IMAGE_ENCODER_VARIANTS.get(dim, ("custom", None))
    told = _folder_values(checkpoint) | own_values(checkpoint, IMAGE_ENCODER_FIELDS)
    if heads is None and not told:
        raise ValueError(
            f"{checkpoint.path}: looks like a CLIP image encoder, but nothing tells how many heads its width of {dim} "
            f'has; its metadata needs {METADATA_KEY} = {{"num_heads": N}}, or put the {CONFIG_FILE} of the model '
            "beside it"
        )
    sizes = {
        "dim": dim,
        "dim_ffn": shape(hidden, 1)[0],
        "num_layers": count(match.names, f"{stack}."),
        "patch_size": shape(patch, 4)[-1],
        "num_positions": shape(positions, 2, 3)[-2],
        "num_heads": heads,
    }
    config = made(checkpoint, ImageEncoderConfig, sizes | told)
    expected = keymap.expand({path: (path, leaves) for path, leaves in rows.items()}, {stack: config.num_layers})
    found = keymap.account(match, expected, IMAGE_ENCODER_IGNORED)
    is_like_it = name == "clip-vit-h" and config != ImageEncoderConfig()
    variant = f"{name}-custom" if is_like_it else name
    return identity(checkpoint, match, found, family=NAME, role="image_encoder", variant=variant, config=config)


def _folder_values(checkpoint: Checkpoint) -> dict[str, int]:
    """Return what the config.json of a Hugging Face folder tells of an image encoder; nothing for other files.

    Raises ValueError where it tells of another activation than Wan's encoder has.
    """
    file = checkpoint.path.parent / CONFIG_FILE
    top = read_json(file)
    if top.get("model_type") not in CLIP_MODEL_TYPES:
        return {}
    vision = top.get("vision_config") or top
    activation = vision.get("hidden_act", "quick_gelu")  # transformers' default, and OpenAI's
    if activation != ACTIVATION:
        raise ValueError(
            f"{file}: this image encoder was trained with {activation}, the CLIP ViT-H of Wan with {ACTIVATION}: use "
            "that one (clip_vision_h.safetensors)"
        )
    return converted({"num_heads": vision.get("num_attention_heads")}, IMAGE_ENCODER_FIELDS, str(file))
