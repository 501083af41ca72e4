"""What a picture to edit becomes: what the text encoder sees, what the transformer is given, the size of the result."""
# H W pixels

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.picture import Finish, pad_to_grid
from ..core.types import Conditioning
from .conditioning import TEXT_ALONE, with_references
from .config import TOKEN_PIXELS, Variant
from .images import dims, lanczos, to_rgb

if TYPE_CHECKING:
    from .text_encoder import TextEncoder

log = logging.getLogger(__name__)

AREA = 1024 * 1024  # pixels that references and results are made of by the published rule
PUBLISHED, ALIGNED, CUSTOM = "published", "pixel_aligned", "custom"
SIZES = (PUBLISHED, ALIGNED, CUSTOM)
LARGE = 2.5  # million pixels above which the model is far from what it was trained on


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """An edit laid out.

    `seen` [H, W, 3] are for the text encoder, which puts them into `template` and scales them itself; `references`
    [H, W, 3], sides multiples of 16, for the VAE. The result is `width` x `height` and then `finish`ed. `notices` are
    for the user.
    """

    template: str
    seen: tuple[Tensor, ...]
    references: tuple[Tensor, ...]
    width: int
    height: int
    finish: Finish | None
    notices: tuple[str, ...]

    def encode(self, texts: Sequence[str], text_encoder: "TextEncoder", vae: Any) -> list[Conditioning]:
        """Return what each of the texts asks for, with the pictures that it is about.

        `vae` is ours or one of ComfyUI's. Raises ValueError if the text encoder has no room.
        """
        latents = [vae.encode(picture[None]) for picture in self.references]
        prompts = text_encoder.encode_edit(texts, self.seen, self.template)
        return [with_references(prompt, latents) for prompt in prompts]


def lay_out(pictures: Sequence[Tensor], variant: Variant, size: str, custom: tuple[int, int] = (0, 0)) -> Edit:
    """Return how pictures [H, W, 3 or 4] in [0, 1] go into an edit.

    `size` is "published": every reference is scaled to about a million pixels, and the result has the shape of the last
    one; "custom": likewise, with a result of `custom` (width, height); "pixel_aligned": the first picture is neither
    scaled nor moved and the result lies on its very pixels. Raises ValueError for more pictures than the variant takes
    and for pictures that it can't take. Source: the published edit pipelines.
    """
    _check(pictures, variant, size)
    converted = [to_rgb(picture) for picture in pictures]
    rgb = [picture for picture, _ in converted]
    notices = [notice for _, notice in converted if notice]
    sizes = [dims(AREA, picture.shape[1] / picture.shape[0]) for picture in rgb]
    references = [lanczos(picture, *to) for picture, to in zip(rgb, sizes, strict=True)]
    (width, height), finish = sizes[-1], None
    if size == ALIGNED:
        references[0] = pad_to_grid(rgb[0], TOKEN_PIXELS)
        height, width = references[0].shape[:2]
        kept = (rgb[0].shape[1], rgb[0].shape[0])
        finish = Finish(decoded=(width, height), kept=kept)
        if width * height > LARGE * 1e6:
            notices.append(
                f"The picture is {kept[0]} x {kept[1]}: the model was trained on about 1 million pixels, and more than "
                f"{LARGE:g} million are slow and often repeat things. Scale it down first."
            )
    elif size == CUSTOM:
        width, height = (max(TOKEN_PIXELS, side // TOKEN_PIXELS * TOKEN_PIXELS) for side in custom)
        if (width, height) != custom:
            changed = f"{custom[0]} x {custom[1]} changed to {width} x {height}"
            notices.append(f"{changed}: multiples of {TOKEN_PIXELS} are needed.")
    return Edit(
        template=variant.template,
        seen=tuple(rgb),
        references=tuple(references),
        width=width,
        height=height,
        finish=finish,
        notices=tuple(notices),
    )


def _check(pictures: Sequence[Tensor], variant: Variant, size: str) -> None:
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: choose one of {', '.join(SIZES)}.")
    if variant.layered:
        raise ValueError(
            f"{variant.title} takes a picture apart into layers, for which there are no nodes yet: choose an Edit "
            "model."
        )
    if not variant.max_references:
        raise ValueError(f"This model is {variant.title}, {TEXT_ALONE}")
    if not 1 <= len(pictures) <= variant.max_references:
        more = "" if variant.max_references > 1 else " Qwen-Image-Edit-2509 and 2511 take up to 3."
        raise ValueError(
            f"{variant.title} takes 1 to {variant.max_references} picture(s), got {len(pictures)} (a batch of images "
            f"counts as so many): connect fewer.{more}"
        )
