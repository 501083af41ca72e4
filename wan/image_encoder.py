"""The CLIP ViT-H/14 of Wan 2.1: from a picture to the rows that I2V and FLF2V attend to. Built by transformers.

Wan takes the residual stream before the last block, without a norm: the last block and the head are neither built nor
read.
"""
# B pictures, H W pixels, P positions (a class row, then the patches row by row), E width

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.text import META, Design, EmbeddingCache, Footprint, Part, Placement
from ..core.types import Checkpoint, Identity
from ..core.weights import keymap
from ..core.weights.keymap import Share
from .config import ImageEncoderConfig
from .keymap import IMAGE_ENCODER, IMAGE_ENCODER_APART, IMAGE_ENCODER_FUSED

log = logging.getLogger(__name__)

EPS = 1e-5  # of every CLIP's norms; not in the checkpoint
# Of the colours that CLIP was trained on, as published with it (OpenAI, CLIP/clip/clip.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BLOCKS = "encoder.layers"
SHALLOW = 3  # blocks of the twin whose memory is counted, of which the last one is left out: all are alike
RUNNABLE = ("clip-vit-h", "custom")  # variants that a Wan may have been trained with; "custom" are miniatures
# Both are stored with a dimension of 1 in front by the official code.
SHARES = {"embeddings.class_embedding": Share(), "embeddings.position_embedding.weight": Share()}
NOT_COMPUTED = ("last_hidden_state", "image_embeds", "mm_projected", "all_hidden_states")


@dataclass(frozen=True, slots=True)
class ImageRows:
    """The rows [B, P, E] of pictures, float32 on the CPU, as nodes expect them of a CLIP_VISION_OUTPUT."""

    penultimate_hidden_states: Tensor

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __getattr__(self, name: str) -> Any:
        if name in NOT_COMPUTED:
            raise AttributeError(
                f"{name} is not computed by the image encoder of Wan, which gives penultimate_hidden_states only: use "
                "ComfyUI's Load CLIP Vision for nodes of other models."
            )
        raise AttributeError(name)


class ImageEncoder:
    """Turn pictures into rows; the weights are read for a picture that is not in the cache, and let go after it.

    `dtype` None means what `dtype_on` says. Raises ValueError if the checkpoint is not a complete CLIP of Wan's kind.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        identity: Identity,
        *,
        dtype: torch.dtype | None = None,
        cache: EmbeddingCache | None = None,
        placement: Placement | None = None,
    ):
        check(checkpoint, identity)
        self.checkpoint, self.identity, self.dtype = checkpoint, identity, dtype
        self.config: ImageEncoderConfig = identity.config
        self.cache = EmbeddingCache() if cache is None else cache
        self.placement = placement or Placement()

    def encode(self, images_BHWC: Tensor, fit: str = "official") -> Tensor:
        """Return the rows [B, P, E] of pictures with values in [0, 1], float32 on the CPU; see FITS for `fit`.

        Raises ValueError for what are no pictures, and where float16 is too narrow for them.
        """
        images = checked(images_BHWC)
        dtype = self.dtype_on(self.placement.device)
        shown = [preprocess(image, self.config.image_size, fit) for image in images]
        keys = [self._key(pixels, dtype) for pixels in shown]
        rows = {key: self.cache.get(key) for key in keys}
        fresh = {key: pixels for key, pixels in zip(keys, shown, strict=True) if rows[key] is None}
        if fresh:
            log.info("Opening the image encoder %s as %s", self.checkpoint.path, dtype)
            part = self._load(dtype)
            with torch.no_grad(), part.on(self.placement, lambda: working_bytes(self.config, dtype)) as run:
                for key, pixels in fresh.items():
                    rows[key] = _finite(run(pixels.to(self.placement.device)).float().cpu(), dtype)
                    self.cache.put(key, rows[key])
        return torch.cat([rows[key] for key in keys])

    def encode_image(self, image: Tensor, crop: bool = True) -> ImageRows:
        """Encode as the nodes for ComfyUI's CLIP_VISION ask for it, which is what a loader's output is used as."""
        return ImageRows(self.encode(image, "crop" if crop else "official"))

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return what is computed in on a device: float32 on a CPU, else float16, but bfloat16 if stored so.

        The official code runs this encoder in float16, and its activations fit. What was stored in bfloat16 may not.
        """
        if self.dtype is not None:
            return self.dtype
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if self.identity.weight_format == "bf16" else torch.float16

    def footprint(self) -> Footprint:
        """Return what a picture takes on the device; no weight is read for it."""
        return needed(self.config, self.dtype_on(self.placement.device))

    def _load(self, dtype: torch.dtype) -> Part:
        return load(self.config, self.checkpoint, self.identity.names, dtype=dtype, ignored=self.identity.ignored)

    def _key(self, pixels_1CHW: Tensor, dtype: torch.dtype) -> tuple[str, ...]:
        content = hashlib.sha256(pixels_1CHW.numpy().tobytes()).hexdigest()
        return "image", content, self.checkpoint.identity or str(self.checkpoint.path), str(dtype)


class VisionModel(Protocol):
    """What nodes know of a CLIP_VISION, ours or ComfyUI's."""

    def encode_image(self, image: Tensor, crop: bool) -> Any: ...


def encode_with(clip_vision: VisionModel, images_BHWC: Tensor) -> Tensor:
    """Return the rows [1, B*P, E] of pictures, one after the other, by an image encoder of ours or of ComfyUI's."""
    return rows_of(clip_vision.encode_image(checked(images_BHWC), crop=False)).flatten(0, 1)[None]


def rows_of(output: Any) -> Tensor:
    """Return the rows [B, P, E] of a CLIP_VISION_OUTPUT, float32 on the CPU.

    Raises ValueError for something else, and for NaN or infinite values. Whether a model takes rows of that width is
    seen where they meet it.
    """
    rows = getattr(output, "penultimate_hidden_states", None)
    if not isinstance(rows, Tensor) or rows.dim() != 3:
        found = f"{tuple(rows.shape)}" if isinstance(rows, Tensor) else type(output).__name__
        raise ValueError(
            f"The CLIP vision output holds no rows of a picture [pictures, rows, width], but {found}: make it with "
            "CLIP Vision Encode and the image encoder of Wan (Load Wan Image Encoder, clip_vision_h.safetensors)."
        )
    rows = rows.to("cpu", torch.float32)
    if not torch.isfinite(rows).all():
        raise ValueError(
            "The CLIP vision output holds NaN or infinite values: load the image encoder in fp32, or its file again."
        )
    return rows


def checked(images_BHWC: Tensor) -> Tensor:
    """Return pictures as float32 RGB on the CPU; an alpha channel is dropped, and the log says so.

    Raises ValueError for what are no pictures [B, H, W, 3 or 4], for none, and for NaN or infinite values.
    """
    shape = tuple(images_BHWC.shape)
    if len(shape) != 4 or shape[-1] not in (3, 4) or 0 in shape:
        raise ValueError(
            f"Image encoder: got pictures of shape {shape}; [pictures, height, width, 3 (RGB) or 4 (with alpha)] is "
            "expected, and at least one picture of at least one pixel."
        )
    if shape[-1] == 4:
        log.warning("Image encoder: the picture has an alpha channel, which is dropped.")
    images = images_BHWC[..., :3].to("cpu", torch.float32)
    if not torch.isfinite(images).all():
        raise ValueError("Image encoder: the picture holds NaN or infinite values: check the node that made it.")
    return images


def preprocess(image_HWC: Tensor, size: int, fit: str) -> Tensor:
    """Return a picture in [0, 1] as the tower takes it: [1, 3, size, size], in CLIP's colours. See FITS for `fit`.

    Raises ValueError for another `fit`.
    """
    if fit not in FITS:
        raise ValueError(f"The image encoder fits pictures in the ways {', '.join(FITS)}, not {fit!r}.")
    pixels_1CHW = FITS[fit](image_HWC.movedim(-1, 0)[None], size)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in (MEAN, STD))
    return ((pixels_1CHW - mean) / std).contiguous()


def _squash(pixels_1CHW: Tensor, size: int) -> Tensor:
    """Resize both sides to `size`, as the official code does: no antialiasing, no clamping."""
    resized = F.interpolate(pixels_1CHW * 2 - 1, size=(size, size), mode="bicubic", align_corners=False)
    return resized * 0.5 + 0.5


def _crop(pixels_1CHW: Tensor, size: int) -> Tensor:
    """Resize the shorter side to `size` with antialiasing and take the middle, rounded to 8 bits: as ComfyUI does."""
    height, width = pixels_1CHW.shape[-2:]
    scale = size / min(height, width)
    scaled = (round(scale * height), round(scale * width))
    if (height, width) != (size, size):
        pixels_1CHW = F.interpolate(pixels_1CHW, size=scaled, mode="bicubic", antialias=True)
    top, left = (pixels_1CHW.shape[-2] - size) // 2, (pixels_1CHW.shape[-1] - size) // 2
    cut = pixels_1CHW[..., top : top + size, left : left + size]
    return (cut * 255).clamp(0, 255).round() / 255


# How a picture of another shape becomes a square: "official" keeps all of it, out of proportion; "crop" its middle.
FITS: Mapping[str, Callable[[Tensor, int], Tensor]] = {"official": _squash, "crop": _crop}


class _Tower(nn.Module):
    """The tower up to the last block but one: pixels [B, 3, S, S] in CLIP's colours to rows [B, P, E]."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        model = build(config, config.num_layers - 1)
        tower = getattr(model, "vision_model", model)  # some versions of transformers have it inside, some outright
        self.embeddings, self.pre_layrnorm, self.encoder = tower.embeddings, tower.pre_layrnorm, tower.encoder
        # No checkpoint carries it, so that it must be real where the parameters are not.
        self.embeddings.position_ids = torch.arange(config.num_positions, device="cpu")[None]

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.encoder(inputs_embeds=self.pre_layrnorm(self.embeddings(pixels_BCHW))).last_hidden_state


def build(config: ImageEncoderConfig, num_layers: int | None = None) -> nn.Module:
    """Return transformers' `CLIPVisionModel` of this size, or of fewer blocks, with random weights, in float32."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.dim_ffn,
            num_hidden_layers=config.num_layers if num_layers is None else num_layers,
            num_attention_heads=config.num_heads,
            patch_size=config.patch_size,
            image_size=config.image_size,
            hidden_act="gelu",
            layer_norm_eps=EPS,
            attention_dropout=0.0,
        )
    ).eval()


def design(config: ImageEncoderConfig) -> Design:
    """Return how an encoder of this size is built; its parameters are called as transformers calls them."""
    return Design(name="image encoder", build=lambda: _Tower(config), blocks=BLOCKS)


def load(
    config: ImageEncoderConfig,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    ignored: Collection[str] = (),
) -> Part:
    """Return the encoder of a checkpoint in `dtype`, without its last block. No weight is read.

    `names` maps the names of either spelling to the file's. Raises ValueError for missing, unexpected or misshapen
    weights.
    """
    places, shares = _places(names)
    last = f"{BLOCKS}.{config.num_layers - 1}."
    used = {name: file for name, file in places.items() if not name.startswith(last)}
    ignored = {*ignored, *names.values()} - set(used.values())
    return design(config).open(checkpoint, used, dtype=dtype, ignored=ignored, shares=shares)


def _places(names: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Share]]:
    """Return where the tower's parameters are in a file, and which of them are a part of a tensor."""
    whole = keymap.Renamer(IMAGE_ENCODER)
    apart = [keymap.Renamer({IMAGE_ENCODER_FUSED: path}) for path in IMAGE_ENCODER_APART]
    found, shares = {}, dict(SHARES)
    for name, file in names.items():
        layers = [ours for rename in apart if (ours := rename(name)) is not None]
        for i, ours in enumerate(layers):
            found[ours], shares[ours] = file, Share(index=i, count=len(layers))
        if not layers:
            found[whole(name) or name] = file
    return found, shares


def check(checkpoint: Checkpoint, identity: Identity) -> None:
    """Raise ValueError for another CLIP than Wan's."""
    config, wanted = identity.config, ImageEncoderConfig()
    if identity.variant not in RUNNABLE:
        raise ValueError(
            f"{checkpoint.path.name} is another CLIP than Wan's: {identity.variant}, {config.num_layers} blocks that "
            f"give {config.num_positions} rows of {config.dim} for a picture. Wan 2.1 takes CLIP ViT-H/14, "
            f"{wanted.num_layers} blocks and {wanted.num_positions} rows of {wanted.dim}: clip_vision_h.safetensors or "
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth."
        )


def needed(config: ImageEncoderConfig, dtype: torch.dtype) -> Footprint:
    """Return what an encoder of this size takes on a device."""
    return _shallow(config).footprint(dtype, config.num_layers - 1, working_bytes(config, dtype))


@lru_cache(maxsize=64)
def working_bytes(config: ImageEncoderConfig, dtype: torch.dtype) -> int:
    """Return the work space beside the weights for one picture, counted on the meta device."""
    pixels = torch.empty(1, 3, config.image_size, config.image_size, device=META)
    return _shallow(config).working_bytes(dtype, pixels)


def _shallow(config: ImageEncoderConfig) -> Design:
    return design(replace(config, num_layers=min(config.num_layers, SHALLOW)))


def _finite(rows_1PE: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.isfinite(rows_1PE).all():
        raise ValueError(
            f"The image encoder gave NaN or infinite values in {str(dtype).removeprefix('torch.')}: choose precision "
            "fp32, or download the file again."
        )
    return rows_1PE
