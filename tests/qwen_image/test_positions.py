"""Positions of Qwen-Image tokens against their definition, written out."""

import math

import pytest
import torch
from wanqwen.qwen_image.positions import centred, image_frames, joint_rope, text_start

CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "first", "last"), [(83, -42, 40), (64, -32, 31), (1, -1, -1), (2, -1, 0)])
def test_grids_are_centred_with_an_odd_row_on_the_negative_side(size: int, first: int, last: int) -> None:
    assert centred(size).tolist() == list(range(first, last + 1))


@pytest.mark.parametrize(
    ("grids", "start"),
    [
        ([(83, 83)], 41),
        ([(58, 104)], 52),
        ([(64, 64), (62, 66), (70, 58)], 35),
        ([(1, 256), (4, 4)], 128),
        ([(1, 1)], 0),
    ],
)
def test_text_starts_outside_the_largest_image_references_included(grids: list[tuple[int, int]], start: int) -> None:
    assert text_start(grids, layered=False) == start


def test_text_of_a_layered_picture_starts_behind_its_layers() -> None:
    assert text_start([(2, 4)] * 6, layered=True) == 5
    assert text_start([(2, 4)] * 6, layered=False) == 2
    assert text_start([(20, 4)] * 6, layered=True) == 10


def test_frames_count_the_images_and_the_picture_taken_apart_is_minus_one() -> None:
    assert image_frames(1, 2, layered=False) == [0, 1, 2]
    assert image_frames(5, 1, layered=True) == [0, 1, 2, 3, 4, -1]
    assert image_frames(3, 0, layered=True) == [0, 1, 2]


def test_every_token_turns_by_its_frame_row_and_column() -> None:
    grids, frames, text, axes = [(3, 2), (2, 5)], [0, -1], range(7, 11), (2, 4, 6)
    text_rope, image_rope = joint_rope(grids, frames, text, axes, CPU)
    places = [
        (frame, row - math.ceil(rows / 2), column - math.ceil(columns / 2))
        for (rows, columns), frame in zip(grids, frames, strict=True)
        for row in range(rows)
        for column in range(columns)
    ]
    for (cos, sin), expected in ((text_rope, [(p, p, p) for p in text]), (image_rope, places)):
        angles = torch.tensor(
            [
                [
                    at * 10000 ** (-2 * j / width)
                    for at, width in zip(place, axes, strict=True)
                    for j in range(width // 2)
                ]
                for place in expected
            ],
            dtype=torch.float64,
        )
        assert cos.shape == angles.shape
        assert torch.allclose(cos.double(), angles.cos(), atol=1e-7)
        assert torch.allclose(sin.double(), angles.sin(), atol=1e-7)


def test_no_float64_reaches_the_device() -> None:
    """Angles are formed on the CPU: what comes for any device is float32."""
    for cos, sin in joint_rope([(2, 3), (4, 1)], [0, 1], range(2, 9), (2, 4, 6), torch.device("meta")):
        assert cos.device.type == sin.device.type == "meta"
        assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
