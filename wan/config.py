"""Hyperparameters of the published Wan 2.1 models, and the numbers their checkpoints do not carry."""

from dataclasses import dataclass, replace
from math import isqrt

HEAD_WIDTH = 128  # of every published Wan 2.1; a checkpoint does not record its number of heads
TEXT_LEN = 512  # umT5 rows the transformer was trained with, zero-padded and attended without a mask
LATENT_CHANNELS = 16
SHOWN = 100  # blocks in an error
SIZE_STEP = 16  # a latent position is 8 pixels wide and the transformer takes patches of 2 x 2 positions
IMAGE_ROWS = 257  # of the image encoder for each picture: a class token and 16 x 16 patches

# The official negative prompt of T2V and VACE; source: wan/configs/shared_config.py of the official repository.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
    "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)
# What comes before it, for no shaking camera and no cuts; source: wan/configs of the same repository.
I2V_NEGATIVE_PREFIX = "镜头晃动，"
FLF2V_NEGATIVE_PREFIX = "镜头切换，" + I2V_NEGATIVE_PREFIX


@dataclass(frozen=True, kw_only=True, slots=True)
class WanConfig:
    """Shape of one Wan diffusion transformer. Source: wan/configs of the official repository.

    `image_dim` is the width of the image encoder's rows, 0 where the model takes none; `image_positions` counts those
    rows that have a position (FLF2V), 0 where none do. A VACE model has one VACE block for each of the main blocks
    `vace_layers`, and takes controls of `vace_dim` channels.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = LATENT_CHANNELS
    out_dim: int = LATENT_CHANNELS
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = TEXT_LEN
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int = 0
    image_positions: int = 0
    vace_layers: tuple[int, ...] = ()
    vace_dim: int = 0

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"Wan width {self.dim} does not split into {self.num_heads} heads of even width")
        if self.freq_dim % 2:
            raise ValueError(f"Wan has as many sines as cosines of the time, time_embedding.0.weight {self.freq_dim}")
        if self.image_positions and not self.image_dim:
            raise ValueError(f"Wan has {self.image_positions} positions for image rows that it does not take")
        layers = self.vace_layers
        if bool(layers) != bool(self.vace_dim) or list(layers) != sorted(set(layers) & set(range(self.num_layers))):
            raise ValueError(
                f"Wan VACE takes controls of {self.vace_dim} channels into the blocks {layers[:SHOWN]}, where "
                f"channels and some of the {self.num_layers} blocks, in order, are expected"
            )

    @property
    def image_rows(self) -> int:
        """Rows of the image encoder that the model takes: of one picture, of two where they have positions, or none."""
        return self.image_positions or (IMAGE_ROWS if self.image_dim else 0)

    @property
    def extra_dim(self) -> int:
        """Channels that the model takes beside the noisy latent's."""
        return self.in_dim - self.out_dim

    @property
    def negative_prompt(self) -> str:
        """The official negative prompt of the model's kind."""
        if self.image_positions:
            return FLF2V_NEGATIVE_PREFIX + NEGATIVE_PROMPT
        return (I2V_NEGATIVE_PREFIX if self.extra_dim else "") + NEGATIVE_PROMPT


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """Shape of one Wan VAE. `temporal_downsample[i]` says whether level i halves time as well as space.

    `channels` of a pixel: 3 are RGB; 4 are RGB and alpha (the VAE of Qwen-Image-Layered).
    """

    dim: int = 96
    z_dim: int = LATENT_CHANNELS
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    channels: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """Shape of one UMT5 encoder; the defaults are umt5-xxl. Every layer has a position table of its own."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEncoderConfig:
    """Shape of one CLIP visual tower; the defaults are ViT-H/14. `num_positions` counts the class token."""

    dim: int = 1280
    dim_ffn: int = 5120
    num_layers: int = 32
    num_heads: int = 16
    patch_size: int = 14
    num_positions: int = IMAGE_ROWS

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"an image encoder of width {self.dim} does not split into {self.num_heads} heads")
        if self.num_layers < 2:
            raise ValueError(f"an image encoder of {self.num_layers} blocks has none before the last one")
        if isqrt(self.num_positions - 1) ** 2 != self.num_positions - 1:
            raise ValueError(
                f"an image encoder has a position for its class and one for each patch of a square, not "
                f"{self.num_positions}"
            )

    @property
    def image_size(self) -> int:
        """Height and width in pixels of what it looks at."""
        return self.patch_size * isqrt(self.num_positions - 1)


# The published sizes: (task, in_dim, dim, ffn_dim, num_layers) -> variant. The 480P and 720P files of I2V are alike in
# structure, and Wan 2.2's T2V experts like T2V-14B.
VARIANTS = {
    ("t2v", 16, 1536, 8960, 30): "t2v-1.3B",
    ("t2v", 16, 5120, 13824, 40): "t2v-14B",
    ("i2v", 36, 5120, 13824, 40): "i2v-14B",
    ("flf2v", 36, 5120, 13824, 40): "flf2v-14B",
    ("vace", 16, 1536, 8960, 30): "vace-1.3B",
    ("vace", 16, 5120, 13824, 40): "vace-14B",
}
VACE_DIM = 96  # channels of a control: latents of what stays and what goes, and the mask
_SMALL = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_LARGE = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_PICTURED = replace(_LARGE, in_dim=36, image_dim=ImageEncoderConfig().dim)
PUBLISHED = {
    "t2v-1.3B": _SMALL,
    "t2v-14B": _LARGE,
    "i2v-14B": _PICTURED,
    "flf2v-14B": replace(_PICTURED, image_positions=2 * IMAGE_ROWS),
    "vace-1.3B": replace(_SMALL, vace_layers=tuple(range(0, 30, 2)), vace_dim=VACE_DIM),
    "vace-14B": replace(_LARGE, vace_layers=tuple(range(0, 40, 5)), vace_dim=VACE_DIM),
}
# The CLIP towers that people have, by their width: variant, number of heads. Wan was trained with the first.
IMAGE_ENCODER_VARIANTS = {
    1280: ("clip-vit-h", 16),
    768: ("clip-vit-b", 12),
    1024: ("clip-vit-l", 16),
    1408: ("clip-vit-g", 16),
    1664: ("clip-vit-bigg", 16),
}
VAE_VARIANTS = {3: "vae", 4: "vae-rgba"}  # by channels of a pixel
