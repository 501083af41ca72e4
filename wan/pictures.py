"""Pictures as Wan takes them: brought to its sizes, and encoded as the frames of a clip that are given."""
# C channels, F pixel frames, T latent frames (F = 4T - 3), H W pixels, h w latent positions (H/8, W/8)

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import SIZE_STEP
from .vae import LATENT_FORMAT

AREAS = {"480p": 480 * 832, "720p": 720 * 1280}  # pixels that the published models were made for
GREY = 0.5  # in [0, 1], the official 0 in [-1, 1]: what stands where no frame is given
COVER, OFFICIAL = "cover", "official"
# ComfyUI's options of a conditioning for the frames that are given: raw latents, and 1 where frames are to be made.
LATENTS, MASK = "concat_latent_image", "concat_mask"
NEGLIGIBLE = 0.03  # share of a picture: what rounding to multiples of 16 costs


def size_for(picture_height: int, picture_width: int, area: int) -> tuple[int, int]:
    """Return the width and height, multiples of 16, of about `area` pixels in a picture's shape.

    Source: image2video.py of the official repository; a side that it would make 0 is 16.
    """
    shape = picture_height / picture_width
    height, width = (math.sqrt(side) // 8 // 2 * 2 * 8 for side in (area * shape, area / shape))
    return max(SIZE_STEP, round(width)), max(SIZE_STEP, round(height))


def cover(pictures_FHWC: Tensor, width: int, height: int) -> Tensor:
    """Return pictures of another size: resized until they cover it, the middle kept.

    Resized as Pillow's bicubic does, smoothed first where it shrinks them. Its sharper Lanczos, which PyTorch lacks,
    hardly differs; without smoothing, fine patterns turn into false ones, which then flicker in the video.
    """
    given_height, given_width = pictures_FHWC.shape[1:3]
    if (given_height, given_width) == (height, width):
        return pictures_FHWC
    scale = max(width / given_width, height / given_height)
    resized = max(height, round(given_height * scale)), max(width, round(given_width * scale))
    pixels = _resized(pictures_FHWC, *resized, antialias=True).clamp(0, 1)
    top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def squash(pictures_FHWC: Tensor, width: int, height: int) -> Tensor:
    """Return pictures of another size as the official code makes them: stretched, not smoothed, not clamped."""
    return _resized(pictures_FHWC, height, width, antialias=False)


# How a picture is brought to another size: pictures [F, H, W, C] in [0, 1], width, height -> the same of that size.
FITS: dict[str, Callable[[Tensor, int, int], Tensor]] = {COVER: cover, OFFICIAL: squash}


def _resized(pictures_FHWC: Tensor, height: int, width: int, *, antialias: bool) -> Tensor:
    planes = pictures_FHWC.movedim(-1, 1).float()
    return F.interpolate(planes, (height, width), mode="bicubic", antialias=antialias).movedim(1, -1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Known:
    """What is given of a clip: raw `latents` [1, 16, T, h, w], grey where nothing is, and `mask` [1, 4, T, h, w].

    Channel k of the mask is 1 where the k-th of the four pixel frames of a latent frame is given; the first latent
    frame holds one pixel frame, four times.
    """

    latents: Tensor
    mask: Tensor

    @property
    def channels(self) -> Tensor:
        """The mask and the normalised latents [1, 20, T, h, w], as the model takes them beside the noisy ones."""
        return torch.cat((self.mask, LATENT_FORMAT.normalise(self.latents)), dim=1)

    def options(self) -> dict[str, Any]:
        """Return what ComfyUI's own Wan nodes write into a CONDITIONING; its mask is 1 where frames are to be made."""
        return {LATENTS: self.latents, MASK: 1 - self.mask}


def known_frames(vae: Any, given: Mapping[int, Tensor], frames: int, height: int, width: int) -> Known:
    """Encode a clip of which frames [H, W, 3] in [0, 1] are given by their indices; the others are grey.

    `vae` is ours or ComfyUI's. Raises ValueError for frames of another size than the clip's or that lie outside of it,
    and for clips that are not 4n + 1 frames long. Source: image2video.py, first_last_frame2video.py of the official
    repository, which know the first frame, and the first with the last.
    """
    if (frames - 1) % LATENT_FORMAT.temporal_factor:
        raise ValueError(f"A Wan clip has 4n + 1 frames (1, 5, 9...), and {frames} were asked for.")
    pixels_FHWC = torch.full((frames, height, width, 3), GREY)
    given_F = torch.zeros(frames)
    for i, frame in given.items():
        if not 0 <= i < frames:
            raise ValueError(f"Frame {i} is given, and the clip has the frames 0 to {frames - 1}.")
        if frame.shape[:2] != (height, width):
            raise ValueError(f"Frame {i} is {frame.shape[1]} x {frame.shape[0]}, the clip {width} x {height} pixels.")
        pixels_FHWC[i] = frame[..., :3]
        given_F[i] = 1
    latents = vae.encode(pixels_FHWC).cpu().float()
    factor = LATENT_FORMAT.temporal_factor
    mask_TK = torch.cat((given_F[:1].expand(factor - 1), given_F)).view(-1, factor)
    mask = mask_TK.T[None, :, :, None, None].expand(1, factor, *latents.shape[2:]).clone()
    return Known(latents=latents, mask=mask)


def known_ends(
    vae: Any, first: Tensor | None, last: Tensor | None, size: tuple[int, int, int], fit: str
) -> tuple[Known, list[str]]:
    """Encode a clip of (width, height, frames) that begins with pictures [F, H, W, C], ends with others, or both.

    Returns it with what was done to the pictures, in words. `fit` is a name of `FITS`. Raises ValueError if there are
    no pictures, or more than the clip has frames.
    """
    width, height, frames = size
    ends = [pictures for pictures in (first, last) if pictures is not None]
    count = sum(map(len, ends))
    if not 0 < count <= frames:
        raise ValueError(
            f"{count} pictures are given for a clip of {frames} frames: give at least one, and no more of them than "
            "frames; make the clip longer, or give fewer."
        )
    if fit == OFFICIAL and first is not None and last is not None and first.shape[1:3] != last.shape[1:3]:
        # The official code means to do this and crops without resizing, with both sides confused.
        last = cover(last, first.shape[2], first.shape[1])
    given: dict[int, Tensor] = {}
    for pictures, start in ((first, 0), (last, frames - (0 if last is None else len(last)))):
        if pictures is not None:
            given |= dict(enumerate(FITS[fit](pictures[..., :3], width, height), start))
    notices = [_fitted(pictures, width, height, fit) for pictures in ends]
    return known_frames(vae, given, frames, height, width), list(dict.fromkeys(filter(None, notices)))


def seen_ends(see: Callable[[Tensor], Tensor], first: Tensor | None, last: Tensor | None) -> Tensor:
    """Return the image encoder's rows [1, N, E] of the first picture of a clip, then the last one, of their own size.

    `see` gives the rows of pictures [1, H, W, C].
    """
    ends = ((first, slice(None, 1)), (last, slice(-1, None)))
    return torch.cat([see(pictures[which]) for pictures, which in ends if pictures is not None], dim=1)


def video_size(given: tuple[int, int, int], asked: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the width, height and frames in which a video of given ones is encoded.

    Of what is asked 0 means: as the video has it, one side alone as its shape has it with the other. Sides are rounded
    down to multiples of 16, or to the nearest where they follow from another; frames down to 4n + 1.
    """
    width, height = asked[:2]
    if bool(width) != bool(height):
        scale = (width or height) / (given[0] if width else given[1])
        nearest = [max(1, round(side * scale / SIZE_STEP)) * SIZE_STEP for side in given[:2]]
        width, height = width or nearest[0], height or nearest[1]
    width, height = (
        max(SIZE_STEP, (wanted or side) // SIZE_STEP * SIZE_STEP)
        for wanted, side in zip((width, height), given[:2], strict=True)
    )
    frames, step = min(asked[2] or given[2], given[2]), LATENT_FORMAT.temporal_factor
    return width, height, (frames - 1) // step * step + 1


def fitted_video(images_FHWC: Tensor, asked: tuple[int, int, int], fit: str) -> tuple[Tensor, list[str]]:
    """Return the frames of a video as they are encoded, of `video_size`, and what was done to them, in words."""
    given = (images_FHWC.shape[2], images_FHWC.shape[1], len(images_FHWC))
    width, height, frames = video_size(given, asked)
    notices = [_fitted(images_FHWC, width, height, fit)]
    if asked[2] > given[2]:
        notices.append(f"{asked[2]} frames were asked for, and the video has {given[2]}.")
    if frames < (min(asked[2], given[2]) or given[2]):
        notices.append(f"The last {given[2] - frames} frames are left out: Wan makes 4n + 1.")
    return FITS[fit](images_FHWC[:frames, ..., :3], width, height), [notice for notice in notices if notice]


def _fitted(pictures_FHWC: Tensor, width: int, height: int, fit: str) -> str:
    """Say what becomes of pictures of another shape; nothing where hardly anything does."""
    given_height, given_width = pictures_FHWC.shape[1:3]
    shapes = sorted((given_width / given_height, width / height))
    if (lost := 1 - shapes[0] / shapes[1]) < NEGLIGIBLE:
        return ""
    what = f"{lost:.0%} of it is cut off" if fit == COVER else f"it is stretched by {1 / (1 - lost) - 1:.0%}"
    return f"{given_width} x {given_height} became {width} x {height}: {what}."
