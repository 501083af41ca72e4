"""Pictures on the grid of a model and back: padding, masks, and what is put back after decoding."""
# B pictures, H W pixels, h w latent positions

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """What is done to decoded pictures before anyone sees them. It travels with a latent.

    `decoded` is the (width, height) that the decoder gives; of it the upper left `kept` stay. With `source` [H, W, 3]
    and `mask` [H, W], both of the kept size, the picture is new only where the mask is above 0.
    """

    decoded: tuple[int, int]
    kept: tuple[int, int]
    source: Tensor | None = None
    mask: Tensor | None = None

    def apply(self, pixels_BHWC: Tensor) -> Tensor:
        """Return the pictures [B, H, W, C] cut to what is kept, pixels under a mask of 0 exactly as in the source.

        Raises ValueError for pictures of another size than this was made for.
        """
        found = (pixels_BHWC.shape[-2], pixels_BHWC.shape[-3])
        if found != self.decoded:
            raise ValueError(
                f"The latent decodes to {found[0]} x {found[1]} pixels, and its picture was laid out for "
                f"{self.decoded[0]} x {self.decoded[1]}: was it resized on the way? Resize the picture instead, before "
                "it is encoded or after it is decoded."
            )
        width, height = self.kept
        pixels = pixels_BHWC[..., :height, :width, :]
        if self.source is None or self.mask is None:
            return pixels
        mask = self.mask[..., None].to(pixels)
        source = self.source.to(pixels)
        # Not a plain lerp: where the mask is 0 or 1 the pixels must be those of one side to the last bit.
        mixed = torch.where(mask == 1, pixels, source + (pixels - source) * mask)
        return torch.where(mask == 0, source, mixed)


def pad_to_grid(picture_HWC: Tensor, step: int) -> Tensor:
    """Return the picture with its right and lower edge repeated until both sides are multiples of `step` pixels.

    Nothing moves: the pixel at (x, y) stays at (x, y).
    """
    height, width = picture_HWC.shape[:2]
    planes = picture_HWC.movedim(-1, 0)[None]
    padded = F.pad(planes, (0, -width % step, 0, -height % step), mode="replicate")
    return padded[0].movedim(0, -1)


def latent_mask(mask: Tensor, latent_shape: tuple[int, ...], temporal_factor: int = 1) -> Tensor:
    """Return a mask of pixels [..., H, W] for latents [B, C, T, h, w], as [B or 1, 1, T or 1, h, w] in 0..1.

    One mask is for all, B are one for each latent, as many as a clip has frames one for each frame; [B or 1, 1, T, H,
    W] are of latent frames already. A latent position takes the largest value among its pixels: what is masked at all
    is made anew. Raises ValueError for another number of masks, and for values outside 0..1.
    """
    batch, _, frames, height, width = latent_shape
    planes, pixel_frames = mask.float().reshape(-1, *mask.shape[-2:]), temporal_factor * (frames - 1) + 1
    if mask.dim() == 5 and mask.shape[0] in (1, batch) and mask.shape[1] == 1 and mask.shape[2] == frames:
        planes_BTHW = mask[:, 0].float()
    elif len(planes) in (1, batch):
        planes_BTHW = planes[:, None]
    elif len(planes) == pixel_frames:
        first = planes[:1].expand(temporal_factor - 1, -1, -1)  # the first latent frame holds one frame alone
        planes_BTHW = torch.cat((first, planes)).unflatten(0, (frames, temporal_factor)).amax(dim=1)[None]
    else:
        raise ValueError(
            f"The noise mask holds {len(planes)} masks for {batch} latent(s) of {pixel_frames} frame(s): give one for "
            "all, one for each latent, or one for each frame."
        )
    if not (planes.min() >= 0 and planes.max() <= 1):
        raise ValueError(
            f"The noise mask goes from {planes.min().item():g} to {planes.max().item():g}: 0 (kept) to 1 (made anew) "
            "is expected."
        )
    return F.adaptive_max_pool2d(planes_BTHW, (height, width))[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inpainting:
    """A picture [H, W, 3] padded to the grid, the mask [1, 1, H, W] of what is made anew, and how it is finished."""

    padded: Tensor
    noise_mask: Tensor
    finish: Finish
    notices: tuple[str, ...]


def lay_out_inpainting(image_BHWC: Tensor, mask: Tensor, soft_edge: int, step: int = 16) -> Inpainting:
    """Return how one picture is inpainted under a mask [H, W] or [1, H, W] in 0..1.

    A mask of another size is stretched over the picture. Raises ValueError for several pictures or masks and for a mask
    that covers nothing.
    """
    masks = mask.float().reshape(-1, 1, *mask.shape[-2:])
    if len(image_BHWC) != 1 or len(masks) != 1:
        raise ValueError(
            f"Inpainting takes one picture and one mask, got {len(image_BHWC)} and {len(masks)}: do them one by one."
        )
    picture = image_BHWC[0, ..., :3]
    height, width = picture.shape[:2]
    notices = []
    if masks.shape[-2:] != (height, width):
        notices.append(f"The mask of {masks.shape[-1]} x {masks.shape[-2]} was stretched to {width} x {height}.")
        masks = F.interpolate(masks, (height, width), mode="nearest")
    if not masks.max() > 0:
        raise ValueError("The mask is empty, so there is nothing to make anew: paint it with Open in MaskEditor.")
    padded = pad_to_grid(picture, step)
    grown = pad_to_grid(masks[0, 0, :, :, None], step)[None, None, :, :, 0]
    finish = Finish(
        decoded=(padded.shape[1], padded.shape[0]),
        kept=(width, height),
        source=picture,
        mask=softened(masks, soft_edge)[0, 0],
    )
    return Inpainting(padded=padded, noise_mask=grown, finish=finish, notices=tuple(notices))


def softened(masks_B1HW: Tensor, pixels: int) -> Tensor:
    """Return masks whose values rise from their edge to their own `pixels` further in; nothing outside changes.

    A part too thin for that rises over what it has: its middle keeps its value. The border of the picture is no edge.
    """
    inside = (masks_B1HW > 0).float()
    depth, shrunk = inside, inside
    for _ in range(max(1, pixels) - 1):
        shrunk = -_largest_around(-shrunk)
        depth = depth + shrunk
    deepest = depth
    for _ in range(max(1, pixels) - 1):  # of the same part: what spreads never leaves the mask
        deepest = _largest_around(deepest) * inside
    return masks_B1HW * (depth / deepest.clamp(min=1))


def _largest_around(planes: Tensor) -> Tensor:
    return F.max_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
