"""Pictures to edit: how they are scaled, how large the result is, and that aligned edits move nothing."""

import pytest
import torch
from wanqwen.qwen_image.config import VARIANTS
from wanqwen.qwen_image.editing import lay_out

EDIT, PLUS, T2I = VARIANTS["edit"], VARIANTS["edit-2509"], VARIANTS["t2i"]


def picture(width: int, height: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(width * height))


@pytest.mark.parametrize(
    ("size", "made"),
    [((64, 64), (1024, 1024)), ((64, 36), (1376, 768)), ((64, 48), (1184, 896)), ((48, 32), (1248, 832))],
)
def test_published_sizes(size, made):
    edit = lay_out([picture(*size)], EDIT, "published")
    assert (edit.width, edit.height) == made and edit.finish is None
    assert [tuple(reference.shape) for reference in edit.references] == [(made[1], made[0], 3)]
    assert edit.seen[0].shape == (size[1], size[0], 3)


def test_the_last_of_several_pictures_gives_the_result_its_shape():
    edit = lay_out([picture(64, 64), picture(64, 36)], PLUS, "published")
    assert (edit.width, edit.height) == (1376, 768)
    assert [reference.shape[1] for reference in edit.references] == [1024, 1376]


def test_an_aligned_edit_keeps_every_pixel_where_it_was():
    given = picture(50, 35)
    edit = lay_out([given, picture(64, 64)], PLUS, "pixel_aligned")
    assert (edit.width, edit.height) == (64, 48)
    assert torch.equal(edit.references[0][:35, :50], given)
    assert edit.references[1].shape == (1024, 1024, 3)
    decoded = edit.references[0][None]
    assert torch.equal(edit.finish.apply(decoded)[0], given)


def test_a_size_of_one_s_own_is_brought_to_the_grid_aloud():
    edit = lay_out([picture(64, 64)], EDIT, "custom", (800, 601))
    assert (edit.width, edit.height) == (800, 592)
    assert edit.notices == ("800 x 601 changed to 800 x 592: multiples of 16 are needed.",)


def test_transparency_is_dropped_aloud():
    edit = lay_out([picture(64, 64, 4)], EDIT, "pixel_aligned")
    assert edit.references[0].shape == (64, 64, 3) and edit.notices[0].startswith("Picture 1: The image has an alpha")


def test_a_large_aligned_picture_is_warned_of():
    edit = lay_out([torch.zeros(1600, 1600, 3)], EDIT, "pixel_aligned")
    assert "1600 x 1600" in edit.notices[0] and (edit.width, edit.height) == (1600, 1600)


def test_a_long_strip_within_the_limit_is_edited():
    edit = lay_out([picture(40, 4000)], EDIT, "pixel_aligned")
    assert (edit.width, edit.height) == (48, 4000)


@pytest.mark.parametrize(
    ("pictures", "variant", "size", "message"),
    [
        ([(64, 64)], T2I, "published", "Qwen-Image, which makes pictures from text alone: load a Qwen-Image-Edit file"),
        ([(64, 64)], VARIANTS["layered"], "published", "Qwen-Image-Layered takes a picture apart.*no nodes yet"),
        ([(64, 64)] * 2, EDIT, "published", "takes 1 picture, got 2.*2509 and Edit-2511 take up to 3"),
        ([(64, 64)] * 4, PLUS, "published", "takes 1 to 3 pictures, got 4"),
        ([], PLUS, "published", "got 0"),
        ([(16, 4096)], EDIT, "published", "Picture 1: .*1:256.*up to 200"),
        ([(64, 64), (64, 64, 1)], PLUS, "published", r"Picture 2: .*\[64, 64, 1\]"),
        ([(64, 64)], EDIT, "huge", "size is 'huge': choose one of published"),
    ],
)
def test_what_can_t_be_edited_is_said(pictures, variant, size, message):
    with pytest.raises(ValueError, match=message):
        lay_out([picture(*one) for one in pictures], variant, size)
