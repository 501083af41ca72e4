"""Hyperparameters of the published Qwen-Image models, and the numbers their checkpoints do not carry."""

from dataclasses import dataclass

LATENT_CHANNELS = 16
PATCH = 2  # a token is 2 x 2 latent positions
TOKEN_PIXELS = 16  # its width: sides of pictures are multiples of it
HEAD_WIDTH = 128  # of every published Qwen-Image
AXES = (16, 56, 56)  # how a head of 128 is divided among frame, row and column by the rotation


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenImageConfig:
    """Shape of one Qwen-Image transformer; the defaults are the published one. Source: its config.json.

    `axes` are the widths of a head that turn with frame, row and column. `zero_cond_t` modulates reference images as
    clean ones (Edit-2511). `layered` has the extra time embedding and the frame numbers of Qwen-Image-Layered.
    """

    num_layers: int = 60
    num_heads: int = 24
    dim: int = 3072
    ffn_dim: int = 12288
    text_dim: int = 3584
    freq_dim: int = 256
    latent_channels: int = LATENT_CHANNELS
    axes: tuple[int, int, int] = AXES
    eps: float = 1e-6
    zero_cond_t: bool = False
    layered: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or sum(self.axes) != self.dim // self.num_heads or any(a % 2 for a in self.axes):
            raise ValueError(
                f"Qwen-Image width {self.dim} in {self.num_heads} heads does not match the rotation widths {self.axes}:"
                " they must be even and add up to the width of a head"
            )

    @property
    def token_dim(self) -> int:
        """Numbers in a token of the latent: channels times a patch."""
        return self.latent_channels * PATCH * PATCH


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What a published model does, beyond its shapes.

    `max_references` images may steer it; `template` is one of `tokenizer.TEMPLATES`: how they are
    shown to the text encoder.
    """

    name: str
    title: str
    template: str
    max_references: int = 0
    zero_cond_t: bool = False
    layered: bool = False


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(name="t2i", title="Qwen-Image", template="t2i"),
        Variant(name="edit", title="Qwen-Image-Edit", template="edit", max_references=1),
        Variant(name="edit-2509", title="Qwen-Image-Edit-2509", template="edit-plus", max_references=3),
        Variant(
            name="edit-2511", title="Qwen-Image-Edit-2511", template="edit-plus", max_references=3, zero_cond_t=True
        ),
        Variant(name="layered", title="Qwen-Image-Layered", template="t2i", max_references=1, layered=True),
    )
}

# Width and height that the models were trained at, by aspect ratio. Source: README of the official repository.
BUCKETS = {
    "1:1": (1328, 1328),
    "16:9": (1664, 928),
    "9:16": (928, 1664),
    "4:3": (1472, 1104),
    "3:4": (1104, 1472),
    "3:2": (1584, 1056),
    "2:3": (1056, 1584),
}
NEGATIVE_PROMPT = " "  # of the published pipelines; one space is not nothing, it is a token of its own
