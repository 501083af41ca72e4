"""Pictures on the model's grid, masks on the latent's, and what is put back."""

import pytest
import torch
from wanqwen.core.picture import Finish, latent_mask, lay_out_inpainting, pad_to_grid, softened


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width", "padded"), [(16, 32, (16, 32)), (17, 31, (32, 32)), (1, 1, (16, 16))])
def test_padding_moves_no_pixel(height, width, padded):
    given = picture(height, width)
    made = pad_to_grid(given, 16)
    assert made.shape[:2] == padded
    assert torch.equal(made[:height, :width], given)
    assert torch.equal(made[-1, -1], given[-1, -1])


def test_finish_cuts_the_padding_off():
    decoded = torch.rand(2, 32, 48, 3)
    finished = Finish(decoded=(48, 32), kept=(40, 30)).apply(decoded)
    assert torch.equal(finished, decoded[:, :30, :40])


def test_what_the_mask_does_not_cover_is_the_source_to_the_last_bit():
    source, decoded = picture(32, 32), torch.rand(1, 32, 32, 3)
    mask = torch.zeros(32, 32)
    mask[8:16, 8:16] = 1
    mask[16, 8:16] = 0.5
    [finished] = Finish(decoded=(32, 32), kept=(32, 32), source=source, mask=mask).apply(decoded)
    assert torch.equal(finished[mask == 0], source[mask == 0])
    assert torch.equal(finished[mask == 1], decoded[0][mask == 1])
    torch.testing.assert_close(finished[mask == 0.5], ((source + decoded[0]) / 2)[mask == 0.5])


def test_a_latent_that_was_resized_on_the_way_is_refused():
    with pytest.raises(ValueError, match="decodes to 64 x 32 pixels, and its picture was laid out for 48 x 32"):
        Finish(decoded=(48, 32), kept=(40, 30)).apply(torch.rand(1, 32, 64, 3))


def test_a_latent_position_is_made_anew_if_any_of_its_pixels_is():
    mask = torch.zeros(1, 32, 48)
    mask[0, 9, 17] = 0.25
    found = latent_mask(mask, (2, 16, 1, 4, 6))
    assert found.shape == (1, 1, 1, 4, 6)
    assert found[0, 0, 0, 1, 2] == 0.25 and found.sum() == 0.25


def test_frames_may_have_masks_of_their_own():
    frames = torch.zeros(9, 16, 16)
    frames[0, 3, 3], frames[6, 12, 12] = 1, 0.5
    found = latent_mask(frames, (1, 16, 3, 2, 2), temporal_factor=4)
    assert found.shape == (1, 1, 3, 2, 2)
    assert found[0, 0].flatten(1).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.5]]
    latent_frames = torch.rand(1, 1, 3, 2, 2)
    assert torch.equal(latent_mask(latent_frames, (4, 16, 3, 2, 2), temporal_factor=4), latent_frames)


@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.zeros(3, 8, 8), "3 masks for 2 latent"), (torch.full((8, 8), 2.0), "goes from 2 to 2: 0 .kept. to 1")],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        latent_mask(mask, (2, 16, 1, 4, 6))


def test_soft_edges_change_nothing_outside_and_end_inside():
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 10:30, 10:30] = 1
    soft = softened(mask, 6)
    assert not soft[mask == 0].any()
    assert soft[0, 0, 20, 20] == 1 and 0 < soft[0, 0, 12, 20] < 1
    rising = soft[0, 0, 20, 9:17]
    assert (rising.diff() >= 0).all() and rising[0] == 0 and rising[-1] == 1
    assert torch.equal(softened(mask, 0), mask)


def test_a_thin_stroke_keeps_its_middle_beside_a_thick_one():
    mask = torch.zeros(1, 1, 40, 60)
    mask[..., 10:30, 5:30] = 1
    mask[..., 10:30, 40:43] = 0.8
    mask[..., 10:30, 50:51] = 1
    soft = softened(mask, 8)
    assert soft[0, 0, 20, 17] == 1
    torch.testing.assert_close(soft[0, 0, 20, 40:43], torch.tensor([0.4, 0.8, 0.4]))
    assert soft[0, 0, 20, 50] == 1
    assert soft.max() == 1 and not soft[mask == 0].any()


def test_a_mask_up_to_the_border_stays_whole_there():
    assert torch.equal(softened(torch.ones(1, 1, 20, 20), 8), torch.ones(1, 1, 20, 20))


def test_inpainting_lies_on_the_picture_s_own_pixels():
    image, mask = picture(30, 44), torch.zeros(30, 44)
    mask[5:20, 5:25] = 1
    layout = lay_out_inpainting(image[None], mask, 4)
    assert layout.padded.shape == (32, 48, 3) and layout.noise_mask.shape == (1, 1, 32, 48)
    finished = layout.finish.apply(torch.rand(1, 32, 48, 3))
    assert finished.shape == (1, 30, 44, 3) and not layout.notices
    assert torch.equal(finished[0][mask == 0], image[mask == 0])


def test_a_mask_of_another_size_is_stretched_aloud():
    layout = lay_out_inpainting(picture(32, 32)[None], torch.ones(1, 16, 16), 0)
    assert layout.notices == ("The mask of 16 x 16 was stretched to 32 x 32.",)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (torch.rand(1, 16, 16, 3), torch.zeros(1, 64, 64), "mask is empty"),
        (torch.rand(2, 16, 16, 3), torch.ones(1, 16, 16), "got 2 and 1"),
    ],
)
def test_inpainting_says_what_is_wrong(image, mask, message):
    with pytest.raises(ValueError, match=message):
        lay_out_inpainting(image, mask, 0)
