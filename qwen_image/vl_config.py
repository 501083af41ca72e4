"""Shape of Qwen2.5-VL, the text encoder of Qwen-Image, and what its checkpoints do not carry."""

from dataclasses import dataclass

HEAD_WIDTH = 128  # of the published language model
VISION_HEAD_WIDTH = 80  # of the published vision tower


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """Shape of one vision tower; the defaults are that of Qwen2.5-VL-7B. Source: its config.json.

    A picture is cut into patches of `patch_size` pixels, `temporal_patch` copies deep; `merge` x `merge` of them become
    one row of `out_hidden` for the language model. Attention stays within windows of `window` pixels, except in the
    layers `full_attention`.
    """

    depth: int = 32
    hidden: int = 1280
    intermediate: int = 3420
    num_heads: int = 16
    out_hidden: int = 3584
    patch_size: int = 14
    temporal_patch: int = 2
    merge: int = 2
    window: int = 112
    full_attention: tuple[int, ...] = (7, 15, 23, 31)

    def __post_init__(self) -> None:
        head = self.hidden // self.num_heads
        if self.hidden % self.num_heads or head % 4:
            raise ValueError(
                f"vision tower of width {self.hidden} in {self.num_heads} heads: the heads must be equally wide and a "
                "multiple of 4, half of it turning with the row and half with the column"
            )
        cell = self.patch_size * self.merge
        if self.window < cell or self.window % cell:
            raise ValueError(f"vision tower window of {self.window} pixels is not a multiple of {cell} pixels")
        if any(not 0 <= layer < self.depth for layer in self.full_attention):
            raise ValueError(f"full attention in layers {self.full_attention} of a vision tower of {self.depth} layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class VLConfig:
    """Shape of one Qwen2.5-VL; the defaults are those of Qwen2.5-VL-7B-Instruct. Source: its config.json.

    `mrope_section` counts the pairs of a head that turn with time, height and width. `vision` is None where the file
    has the language model alone. Pictures have from `min_pixels` to `max_pixels` pixels after resizing.
    """

    hidden: int = 3584
    intermediate: int = 18944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    vocab_size: int = 152064
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    eps: float = 1e-6
    vision: VisionConfig | None = VisionConfig()
    min_pixels: int = 3136
    max_pixels: int = 12845056

    def __post_init__(self) -> None:
        if self.hidden % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"Qwen2.5-VL width {self.hidden} does not split into {self.num_heads} heads, or these into "
                f"{self.num_kv_heads} groups"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_width:
            raise ValueError(
                f"rotation sections {self.mrope_section} must add up to half of the head width {self.head_width}"
            )
        if self.vision is not None and self.vision.out_hidden != self.hidden:
            raise ValueError(
                f"vision tower gives rows of {self.vision.out_hidden}, the language model takes {self.hidden}"
            )
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"image limits of {self.min_pixels} to {self.max_pixels} pixels are empty")

    @property
    def head_width(self) -> int:
        """Width of one head of the language model."""
        return self.hidden // self.num_heads
