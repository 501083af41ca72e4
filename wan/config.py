"""Hyperparameters of the published Wan 2.1 models, and the numbers their checkpoints do not carry."""

from dataclasses import dataclass

HEAD_WIDTH = 128  # of every published Wan 2.1; a checkpoint does not record its number of heads
TEXT_LEN = 512  # umT5 rows the transformer was trained with, zero-padded and attended without a mask
LATENT_CHANNELS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class WanConfig:
    """Shape of one Wan diffusion transformer. Source: wan/configs of the official repository."""

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

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"Wan width {self.dim} does not split into {self.num_heads} heads of even width")


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """Shape of one Wan VAE. `temporal_downsample[i]` says whether level i halves time as well as space."""

    dim: int = 96
    z_dim: int = LATENT_CHANNELS
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
