"""Pictures as Qwen-Image and its text encoder want them: sizes, resampling, patches. Pure functions, no weights.

The published code does all of this with 8-bit pictures, so every resampling here rounds to 8 bits too, between its two
passes as well: otherwise thin lines and hard edges come out visibly different.
"""
# H W pixels, C colours in [0, 1], P patches, F filter length

from collections.abc import Callable
from math import ceil, floor, sqrt

import torch
from einops import rearrange, repeat
from torch import Tensor

from .vl_config import VisionConfig, VLConfig

EDIT_STEP = 32  # pixels; references and outputs of edits are multiples of it
MAX_RATIO = 200  # of the longer to the shorter side; limit of the published image processor
LEVELS = 255

Kernel = Callable[[Tensor], Tensor]  # distance in units of the filter -> weight

# The statistics of CLIP's training pictures, per colour; source: preprocessor_config.json of Qwen2.5-VL.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

OUTPUTS_AT_ONCE = 16  # of a resampling pass; together they read one stretch of the input


def to_rgb(image_HWC: Tensor) -> tuple[Tensor, str | None]:
    """Return a picture [H, W, 3] in float32, and what to tell the user if it had an alpha channel: that is dropped.

    Raises ValueError for what is no picture of 3 or 4 channels, is empty, or is not finite.
    """
    if image_HWC.dim() != 3 or image_HWC.shape[2] not in (3, 4) or 0 in image_HWC.shape:
        raise ValueError(f"An image must be [height, width, 3] in RGB, this one is {list(image_HWC.shape)}.")
    if not image_HWC.is_floating_point():
        raise ValueError(f"An image must hold numbers from 0 to 1, this one holds {image_HWC.dtype}: divide it by 255.")
    notice = None
    if image_HWC.shape[2] == 4:
        notice = "The image has an alpha channel, which Qwen-Image does not read: transparency was dropped."
    rgb = image_HWC[..., :3].float()
    if not rgb.isfinite().all():
        raise ValueError("The image holds values that are not numbers (NaN or infinity): check the node it comes from.")
    return rgb, notice


def dims(area: int, ratio: float) -> tuple[int, int]:
    """Return (width, height) of about `area` pixels and this ratio of width to height, as multiples of 32.

    Source: the published edit pipelines. Halves round to even, as Python does. Raises ValueError for ratios beyond
    1:200, which the published image processor refuses too.
    """
    if not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
        shape = f"{ratio:.4g}:1" if ratio > 1 else f"1:{1 / ratio:.4g}"
        raise ValueError(
            f"The image has sides of {shape} (width to height); Qwen-Image reads up to {MAX_RATIO}:1. Crop it, or pad"
            " its short side."
        )
    width = sqrt(area * ratio)
    height = width / ratio
    return max(round(width / EDIT_STEP), 1) * EDIT_STEP, max(round(height / EDIT_STEP), 1) * EDIT_STEP


def lanczos(image_HWC: Tensor, width: int, height: int) -> Tensor:
    """Return a picture resampled with the Lanczos filter of 3 lobes, antialiased, in steps of 1/255.

    Source: Duchon 1979, "Lanczos Filtering in One and Two Dimensions"; stretched when shrinking, as Pillow does.
    """
    return _resample(image_HWC, width, height, _lanczos3, 3)


def bicubic(image_HWC: Tensor, width: int, height: int) -> Tensor:
    """Return a picture resampled with the cubic filter of a = -0.5, antialiased, in steps of 1/255.

    Source: Keys 1981, "Cubic convolution interpolation"; stretched when shrinking, as Pillow does.
    """
    return _resample(image_HWC, width, height, _cubic, 2)


def vision_size(width: int, height: int, config: VLConfig) -> tuple[int, int]:
    """Return the (width, height) at which the vision tower sees a picture: multiples of 28 within its limits.

    Source: the "smart resize" of Qwen2-VL's image processor. Halves round to even.
    """
    cell = _vision(config).patch_size * _vision(config).merge
    sides = [max(round(side / cell), 1) * cell for side in (width, height)]
    if sides[0] * sides[1] > config.max_pixels:
        shrink = sqrt(width * height / config.max_pixels)
        sides = [max(floor(side / shrink / cell), 1) * cell for side in (width, height)]
    elif sides[0] * sides[1] < config.min_pixels:
        grow = sqrt(config.min_pixels / (width * height))
        sides = [ceil(side * grow / cell) * cell for side in (width, height)]
    return sides[0], sides[1]


def shown_size(width: int, height: int, area: int, config: VLConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the two (width, height) through which a picture goes on its way to the vision tower.

    First it is brought to about `area` pixels (less if the tower takes less, as a miniature's does), then to whole
    patches. Raises ValueError for extreme ratios.
    """
    first = dims(min(area, config.max_pixels), width / height)
    return first, vision_size(*first, config)


def vision_patches(image_HWC: Tensor, area: int, config: VLConfig) -> Tensor:
    """Return the rows [P, 1176] of a picture for the vision tower, which sees it at about `area` pixels.

    The picture is resampled twice, as the published pipelines do: Lanczos to `area`, cubic to whole patches.
    """
    height, width = image_HWC.shape[:2]
    first, second = shown_size(width, height, area, config)
    seen = bicubic(lanczos(image_HWC, *first), *second)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return cut((seen.cpu() - mean) / std, _vision(config))


def cut(image_HWC: Tensor, config: VisionConfig) -> Tensor:
    """Cut a picture into patches [P, C * copies * 14 * 14], those of one merged cell after one another.

    Cells are in raster order, and so are the patches in a cell. A still picture is shown as 2 equal frames.
    """
    patches = rearrange(
        image_HWC,
        "(H mh ph) (W mw pw) c -> (H W mh mw) c ph pw",
        mh=config.merge, mw=config.merge, ph=config.patch_size, pw=config.patch_size,
    )  # fmt: skip
    return repeat(patches, "p c ph pw -> p (c t ph pw)", t=config.temporal_patch)


def _vision(config: VLConfig) -> VisionConfig:
    if config.vision is None:
        raise ValueError(
            "This text encoder has no vision tower (the file lacks `visual.*`), so it can't see the images of an edit:"
            " use a whole Qwen2.5-VL-7B."
        )
    return config.vision


def _resample(image_HWC: Tensor, width: int, height: int, kernel: Kernel, lobes: int) -> Tensor:
    levels = (image_HWC.float().clamp(0, 1) * LEVELS + 0.5).floor()
    # Across first: so did every Pillow up to 12, which the models were trained and published with.
    for axis, size in ((1, width), (0, height)):
        if levels.shape[axis] != size:
            levels = (_pass(levels, axis, size, kernel, lobes) + 0.5).floor().clamp(0, LEVELS)
    return levels / LEVELS


def _pass(levels: Tensor, axis: int, size: int, kernel: Kernel, lobes: int) -> Tensor:
    """Resample along one axis, a stretch at a time: all filters together would be a matrix that is nearly all zeros."""
    lines = levels.movedim(axis, 0).contiguous()
    scale = len(lines) / size
    width = max(scale, 1.0)
    out = lines.new_empty(size, *lines.shape[1:])
    for first in range(0, size, OUTPUTS_AT_ONCE):
        centres = (torch.arange(first, min(first + OUTPUTS_AT_ONCE, size), dtype=torch.float64) + 0.5) * scale
        start = max(floor(centres[0].item() - lobes * width), 0)
        stop = min(ceil(centres[-1].item() + lobes * width), len(lines))
        inputs = torch.arange(start, stop, dtype=torch.float64) + 0.5
        weights = kernel((inputs - centres[:, None]) / width)
        weights = (weights / weights.sum(dim=1, keepdim=True)).to(lines)
        out[first : first + len(centres)] = torch.tensordot(weights, lines[start:stop], dims=1)
    return out.movedim(0, axis)


def _lanczos3(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
