"""Sizes, resampling against Pillow, patches against transformers' image processor, and pictures nobody should give."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from wanqwen.qwen_image.images import (
    MEAN,
    STD,
    bicubic,
    cut,
    dims,
    lanczos,
    shown_size,
    to_rgb,
    vision_patches,
    vision_size,
)
from wanqwen.qwen_image.vl_config import VisionConfig, VLConfig

ONE_LEVEL = 1 / 255 + 1e-6
CONFIG = VLConfig()
# Sizes (width, height) from and to: shrinking, growing, one axis only, to almost nothing, primes.
RESIZES = [
    *(((97, 61), (40, 30)), ((31, 17), (128, 96)), ((64, 64), (64, 20)), ((301, 5), (7, 64))),
    *(((13, 200), (13, 40)), ((1021, 33), (32, 1024)), ((128, 96), (140, 84))),
]


def picture(width: int, height: int, seed: int = 0) -> Tensor:
    """Return a picture of 8-bit colours: noise, edges and a slope."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (height, width, 3), generator=generator)
    levels[:, width // 3 : width // 2] = 255
    levels[height // 2 :, : width // 3] = torch.arange(width // 3)[None, :, None] * 255 // max(width // 3, 1)
    return levels / 255


def pillow(image: Tensor, width: int, height: int, name: str) -> Tensor:
    from PIL import Image

    found, kernel = Image.fromarray((image * 255).round().byte().numpy()), getattr(Image.Resampling, name)
    # Across first, always: Pillow 13 goes down first where it shrinks the height and grows the width.
    found = found.resize((width, image.shape[0]), kernel).resize((width, height), kernel)
    return torch.from_numpy(np.array(found)) / 255


@pytest.mark.parametrize(
    ("ratio", "area", "expected"),
    [
        (1, 1024**2, (1024, 1024)),
        (16 / 9, 1024**2, (1376, 768)),
        (4 / 3, 1024**2, (1184, 896)),
        (3 / 2, 1024**2, (1248, 832)),
        (2 / 3, 1024**2, (832, 1248)),
        (1, 384**2, (384, 384)),
        (16 / 9, 384**2, (512, 288)),
        (200, 1024**2, (14496, 64)),
        (1, (32 * 2.5) ** 2, (64, 64)),  # 2.5 rounds to 2, not 3
        (1, (32 * 3.5) ** 2, (128, 128)),
    ],
)
def test_dims(ratio, area, expected):
    assert dims(area, ratio) == expected


def test_extreme_ratios_are_refused_in_words():
    with pytest.raises(ValueError, match=r"sides of 1:256 \(width to height\); Qwen-Image reads up to 200:1. Crop it"):
        dims(1024**2, 16 / 4096)
    with pytest.raises(ValueError, match="sides of 256:1"):
        vision_patches(torch.zeros(16, 4096, 3), 1024**2, CONFIG)
    first, second = shown_size(16 * 200, 16, 384**2, CONFIG)
    assert first == (5440, 32) and second == (5432, 28)


@pytest.mark.parametrize(("source", "target"), RESIZES)
@pytest.mark.parametrize(("ours", "name"), [(lanczos, "LANCZOS"), (bicubic, "BICUBIC")])
def test_resampling_equals_pillow(source, target, ours, name):
    image = picture(*source)
    found, expected = ours(image, *target), pillow(image, *target, name)
    assert found.shape == (target[1], target[0], 3)
    assert (found - expected).abs().max() <= ONE_LEVEL
    assert (found != expected).float().mean() < 0.01  # a level off only where a sum is halfway between two


def test_resampling_rounds_to_8_bits_and_keeps_what_has_the_size():
    image = torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    found = lanczos(image, 50, 40)
    assert torch.equal((found * 255).round() / 255, found) and found.min() >= 0 and found.max() <= 1
    same = lanczos(image, 30, 20)
    assert (same - image.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1036, 1036)),
        ((384, 384), (392, 392)),
        ((1376, 768), (1372, 756)),
        ((10, 10), (56, 56)),  # grown to the least area
        ((8000, 6000), (4116, 3080)),  # shrunk to the largest
    ],
)
def test_vision_size(size, expected):
    assert vision_size(*size, CONFIG) == expected
    assert 3136 <= expected[0] * expected[1] <= 12845056


def test_published_token_counts():
    for area, tokens in ((1024**2, 1369), (384**2, 196)):
        _, (width, height) = shown_size(700, 700, area, CONFIG)
        assert width * height // 28**2 == tokens


def test_a_miniatures_limit_is_the_area_it_sees():
    small = replace(CONFIG, max_pixels=64 * 64)
    first, second = shown_size(64, 64, 1024**2, small)
    assert first == (64, 64) and second == (56, 56)


def processor(max_pixels: int = 12845056):
    """Return transformers' image processor, the one on top of Pillow, which the pipelines were published with."""
    import transformers

    name = "Qwen2VLImageProcessorPil" if hasattr(transformers, "Qwen2VLImageProcessorPil") else "Qwen2VLImageProcessor"
    return getattr(transformers, name)(min_pixels=3136, max_pixels=max_pixels)


@pytest.mark.parametrize("size", [(96, 128), (50, 300), (30, 30), (420, 200)])
def test_patches_equal_transformers_image_processor(size):
    from PIL import Image

    pytest.importorskip("transformers")
    config = replace(CONFIG, max_pixels=56 * 56 * 9)
    image = picture(*size)
    out = processor(config.max_pixels)(
        images=Image.fromarray((image * 255).round().byte().numpy()), return_tensors="pt"
    )
    width, height = vision_size(*size, config)
    assert out["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    found = cut((bicubic(image, width, height) - torch.tensor(MEAN)) / torch.tensor(STD), config.vision)
    assert found.shape == out["pixel_values"].shape == (height * width // 196, 1176)
    error = (found - out["pixel_values"]).abs()
    assert error.max() <= ONE_LEVEL / min(STD) and (error > 1e-4).float().mean() < 0.01


def test_both_resamplings_are_done():
    image = picture(210, 90)
    first, second = shown_size(210, 90, 128 * 128, CONFIG)
    assert first == (192, 96) and second == (196, 84)
    seen = pillow(pillow(image, *first, "LANCZOS"), *second, "BICUBIC")
    expected = cut((seen - torch.tensor(MEAN)) / torch.tensor(STD), CONFIG.vision)
    found = vision_patches(image, 128 * 128, CONFIG)
    assert found.shape == expected.shape and (found - expected).abs().max() <= 2 * ONE_LEVEL / min(STD)


def test_patches_of_a_cell_follow_one_another():
    image = torch.arange(56.0)[:, None, None] * 1000 + torch.arange(84.0)[None, :, None] + torch.zeros(3)
    patches = cut(image, VisionConfig())
    corners = patches[:, 0].tolist()  # of red, first frame, top left pixel
    assert corners[:6] == [0, 14, 14000, 14014, 28, 42]
    assert corners[12] == 28000 and torch.equal(patches[:, :196], patches[:, 196:392])


def test_alpha_is_dropped_and_said():
    image = torch.rand(4, 5, 4)
    rgb, notice = to_rgb(image)
    assert torch.equal(rgb, image[..., :3]) and "alpha channel" in notice
    rgb, notice = to_rgb(image[..., :3].double())
    assert notice is None and rgb.dtype == torch.float32


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (torch.rand(1, 4, 5, 3), r"must be \[height, width, 3\] in RGB, this one is \[1, 4, 5, 3\]"),
        (torch.rand(4, 5, 1), "in RGB"),
        (torch.rand(0, 5, 3), "in RGB"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), "holds torch.uint8: divide it by 255"),
        (torch.full((4, 5, 3), float("nan")), "not numbers"),
    ],
)
def test_what_is_no_picture_is_refused(image, complaint):
    with pytest.raises(ValueError, match=complaint):
        to_rgb(image)


def test_a_text_only_encoder_says_that_it_sees_nothing():
    with pytest.raises(ValueError, match="no vision tower"):
        vision_patches(torch.rand(32, 32, 3), 1024, replace(CONFIG, vision=None))
