"""The judge must be right about clips whose content is known, and must say nothing about clips without content."""

from dataclasses import replace

import pytest
import torch
from wanqwen.demo.clips import corpus, score


def test_no_scene_is_both_trained_on_and_held_out() -> None:
    training, held_out = corpus.scenes()
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == 6 * 4 * 5 * 4 and len(held_out) == corpus.NUM_HELD_OUT
    assert corpus.scenes() == (training, held_out), "the split must not change from call to call"


def test_every_held_out_scene_is_judged_right() -> None:
    _, held_out = corpus.scenes()
    clips = corpus.render(held_out, torch.Generator().manual_seed(0)).movedim(1, -1) / 2 + 0.5
    verdicts = [score.judge(clip) for clip in clips]
    assert score.rates(verdicts, held_out)["all"] == 1.0
    luck = score.chance(verdicts, held_out)
    for name, options in (("colour", 6), ("background", 5), ("shape", 4), ("direction", 4)):
        assert luck[name] == pytest.approx(1 / options, abs=0.05)


@pytest.mark.parametrize("attribute", score.ATTRIBUTES)
def test_a_wrong_attribute_is_seen(attribute: str) -> None:
    training, _ = corpus.scenes()
    asked = training[0]
    names = {"colour": corpus.COLOURS, "background": corpus.BACKGROUNDS, "shape": corpus.SHAPES,
             "direction": corpus.DIRECTIONS}[attribute]  # fmt: skip
    shown = replace(asked, **{attribute: next(name for name in names if name != getattr(asked, attribute))})
    clip = corpus.render([shown], torch.Generator().manual_seed(1))[0].movedim(0, -1) / 2 + 0.5
    expected = {name: name != attribute for name in score.ATTRIBUTES}
    assert score.matches(score.judge(clip), asked) == expected


def test_noise_and_emptiness_have_no_shape_and_no_direction() -> None:
    for clip in (torch.rand(9, 64, 64, 3), torch.full((9, 64, 64, 3), 0.5)):
        verdict = score.judge(clip)
        assert (verdict.shape, verdict.direction) == ("", "")


def test_a_ghost_has_no_shape() -> None:
    """Two objects in one clip, the commonest failure of a model that has not learned enough."""
    training, _ = corpus.scenes()
    clip = corpus.render([training[0]], torch.Generator().manual_seed(1))[0].movedim(0, -1) / 2 + 0.5
    both = torch.where((clip - clip[:, :1, :1]).abs().sum(-1, keepdim=True) > 0.2, clip, clip.flip(0))
    assert score.judge(both).shape == ""
