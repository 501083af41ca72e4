"""Clips that go on in latent space."""

import pytest
import torch
from wanqwen.wan.clips import continued, is_seam, joined, starting_with

ROWS = torch.zeros(1, 3, 8)


def clip(frames: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 16, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def pictures(frames: int, given: int = 1) -> dict:
    mask = torch.ones(1, 1, frames, 4, 6)
    mask[:, :, :given] = 0
    return {"concat_latent_image": clip(frames, seed=1), "concat_mask": mask}


def test_the_new_clip_begins_with_the_very_latents_of_the_old_one():
    before = clip(5)
    latents, mask = continued(before, 4, 2)
    assert latents.shape == (1, 16, 4, 4, 6)
    assert torch.equal(latents[:, :, :2], before[:, :, 3:]) and not latents[:, :, 2:].any()
    assert mask[0, 0, :, 0, 0].tolist() == [0, 0, 1, 1]


def test_what_is_joined_holds_each_frame_once():
    before, after = clip(5), clip(4, seed=2)
    whole = joined(before, after, 2)
    assert whole.shape[2] == 7
    assert torch.equal(whole[:, :, :5], before) and torch.equal(whole[:, :, 5:], after[:, :, 2:])


@pytest.mark.parametrize(("frames", "overlap"), [(4, 0), (4, 6), (2, 2), (1, 1)])
def test_an_overlap_that_leaves_nothing_is_refused(frames: int, overlap: int):
    with pytest.raises(ValueError, match=f"overlap is {overlap} latent frames, of a clip that has 5"):
        continued(clip(5), frames, overlap)


def test_clips_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit together"):
        joined(clip(5), torch.zeros(1, 16, 4, 4, 8), 1)
    with pytest.raises(ValueError, match="do not fit together"):
        joined(clip(5), clip(2), 2)
    with pytest.raises(ValueError, match="do not fit together"):
        joined(clip(2), clip(5), 3)


def test_a_clip_that_was_not_sampled_is_refused():
    latents, _ = continued(clip(5), 4, 2)
    with pytest.raises(ValueError, match="after is empty: connect what the sampler made"):
        joined(clip(5), latents, 2)


def test_whether_clips_meet_does_not_depend_on_rounding():
    before = clip(5)
    after, _ = continued(before, 4, 2)
    assert is_seam(before, after.half(), 2)
    assert not is_seam(before, after, 1) and not is_seam(before, clip(4, seed=3), 2)


def test_pictures_begin_with_the_latents_and_keep_what_is_given_at_the_end():
    start, options = clip(1, batch=2, seed=3), pictures(4)
    options["concat_mask"] = options["concat_mask"].repeat(1, 4, 1, 1, 1)
    options["concat_mask"][:, 3, 3] = 0
    given = options["concat_latent_image"].clone()
    [[rows, new]] = starting_with([[ROWS, options]], start, 4)
    assert rows is ROWS
    latents, mask = new["concat_latent_image"], new["concat_mask"]
    assert torch.equal(latents[:, :, :1], start)
    assert torch.equal(latents[1:, :, 1:], given[:, :, 1:])
    assert mask[0, :, :, 0, 0].tolist() == [[0, 1, 1, 1]] * 3 + [[0, 1, 1, 0]]
    assert torch.equal(options["concat_latent_image"], given), "other branches of the graph see what they saw"


def test_prompts_without_pictures_stay():
    prompt = [[ROWS, {"pooled_output": None}]]
    assert starting_with(prompt, clip(1), 4) == prompt


def test_pictures_for_another_clip_are_refused():
    with pytest.raises(ValueError, match=r"encoded for 48 x 32 pixels, 17 frames, and .* in 48 x 32 pixels, 13 f"):
        starting_with([[ROWS, pictures(5)]], clip(1), 4)
    with pytest.raises(ValueError, match=r"more first frames of its own than the overlap has \(1 latent"):
        starting_with([[ROWS, pictures(4, given=2)]], clip(1), 4)
