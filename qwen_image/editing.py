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
    _check(len(pictures), variant, size)
    rgb, references, notices = [], [], []
    for number, picture in enumerate(pictures, start=1):
        try:
            converted, notice = to_rgb(picture)
            to = dims(AREA, picture.shape[1] / picture.shape[0])
        except ValueError as error:
            raise ValueError(f"Picture {number}: {error}") from error
        is_aligned = size == ALIGNED and number == 1
        rgb.append(converted)
        references.append(pad_to_grid(converted, TOKEN_PIXELS) if is_aligned else lanczos(converted, *to))
        notices += [f"Picture {number}: {notice}"] if notice else []
    (height, width), finish = references[0 if size == ALIGNED else -1].shape[:2], None
    if size == ALIGNED:
        kept = (rgb[0].shape[1], rgb[0].shape[0])
        finish = Finish(decoded=(width, height), kept=kept)
        if width * height > LARGE * 1e6:
            notices.append(
                f"The picture is {kept[0]} x {kept[1]}: the model was trained on about 1 million pixels, and more than "
                f"{LARGE:g} million are slow and often repeat things. Scale it down first."
            )
    elif size == CUSTOM:
        width, height, changes = on_grid(*custom)
        notices += changes
    return Edit(
        template=variant.template,
        seen=tuple(rgb),
        references=tuple(references),
        width=width,
        height=height,
        finish=finish,
        notices=tuple(notices),
    )


def on_grid(width: int, height: int) -> tuple[int, int, list[str]]:
    """Return the nearest smaller width and height that a picture can have, and what was changed, in words."""
    made = tuple(max(TOKEN_PIXELS, side // TOKEN_PIXELS * TOKEN_PIXELS) for side in (width, height))
    changed = f"{width} x {height} changed to {made[0]} x {made[1]}: multiples of {TOKEN_PIXELS} are needed."
    return *made, [changed] if made != (width, height) else []


def _check(num_pictures: int, variant: Variant, size: str) -> None:
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: choose one of {', '.join(SIZES)}.")
    if variant.layered:
        raise ValueError(
            f"{variant.title} takes a picture apart into layers, for which there are no nodes yet: choose an Edit "
            "model."
        )
    if not variant.max_references:
        raise ValueError(f"This model is {variant.title}, {TEXT_ALONE}")
    if not 1 <= num_pictures <= variant.max_references:
        takes, more = "1 picture", " Edit-2509 and Edit-2511 take up to 3."
        if variant.max_references > 1:
            takes, more = f"1 to {variant.max_references} pictures", ""
        raise ValueError(
            f"{variant.title} takes {takes}, got {num_pictures} (a batch of images counts as so many): give it as "
            f"many.{more}"
        )
