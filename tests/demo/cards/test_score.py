"""The reader must be right about pictures whose content is known, and must read nothing where nothing is written."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from wanqwen.demo.cards import corpus, score
from wanqwen.demo.cards.glyphs import CELL, GLYPHS, bitmaps

SCENE = corpus.Scene("风7A", "red", "white", "top left")


def pictures(scenes: list[corpus.Scene], seed: int = 0) -> list[Tensor]:
    rng = random.Random(seed)
    rendered = corpus.render(scenes, [corpus.draw_setting(rng) for _ in scenes])
    return list(rendered.movedim(1, -1) / 2 + 0.5)


def scenes(count: int, held_out: bool) -> list[corpus.Scene]:
    rng = random.Random(1)
    return [corpus.draw_scene(rng, held_out=held_out) for _ in range(count)]


def test_every_picture_is_read_right() -> None:
    asked = scenes(60, held_out=True) + scenes(60, held_out=False)
    verdicts = [score.judge(picture) for picture in pictures(asked)]
    assert [verdict.word for verdict in verdicts] == [scene.word for scene in asked]
    assert score.rates(verdicts, asked)["all"] == 1.0
    luck = score.chance(verdicts, asked)
    for name, options in (("ink", 6), ("card", 5), ("place", 5)):
        assert luck[name] == pytest.approx(1 / options, abs=0.06)
    assert luck["word"] < 0.02


def test_every_glyph_is_told_from_every_other_in_noise() -> None:
    asked = [replace(SCENE, word=glyph) for glyph in GLYPHS]
    noise = 0.05 * torch.randn(len(asked), corpus.SIZE, corpus.SIZE, 3, generator=torch.Generator().manual_seed(0))
    noisy = [(picture + n).clamp(0, 1) for picture, n in zip(pictures(asked), noise, strict=True)]
    assert "".join(score.judge(picture).word for picture in noisy) == GLYPHS


@pytest.mark.parametrize("name", score.ATTRIBUTES)
def test_a_wrong_attribute_is_seen(name: str) -> None:
    options = {"word": ("风7", "风71"), "ink": ("blue",), "card": ("gray",), "place": ("centre",)}[name]
    for option in options:
        [picture] = pictures([replace(SCENE, **{name: option})])
        expected = {other: other != name for other in score.ATTRIBUTES}
        assert score.matches(score.judge(picture), SCENE) == expected


def test_nothing_is_read_where_nothing_is_written() -> None:
    [picture] = pictures([SCENE])
    empty = picture.clone()
    empty[(picture[..., 1] < 0.7) & (picture[..., 0] > 0.75)] = torch.tensor(corpus.CARDS["white"]) / 255
    noise = torch.rand(corpus.SIZE, corpus.SIZE, 3, generator=torch.Generator().manual_seed(0))
    assert (score.judge(noise).word, score.judge(noise).card) == ("", "")
    verdict = score.judge(torch.full((corpus.SIZE, corpus.SIZE, 3), 245 / 255))
    assert (verdict.word, verdict.ink, verdict.place) == ("", "", "")


def test_a_ghost_is_no_glyph() -> None:
    """Half of one glyph over half of another, the commonest failure of a model that has not learned enough."""
    setting = corpus.draw_setting(random.Random(3))
    twins = corpus.render([replace(SCENE, word=word) for word in ("T", "日")], [setting, setting])
    top, left, bottom, _ = corpus.word_box(replace(SCENE, word="T"))
    ghost = twins[0].clone()
    ghost[:, (top + bottom) // 2 : bottom, left:] = twins[1][:, top : (top + bottom) // 2, left:]
    assert score.judge(ghost.movedim(0, -1) / 2 + 0.5).word == "?"


def test_edits_are_judged_by_what_was_asked_and_by_what_stayed() -> None:
    edited = replace(SCENE, ink="green")
    right, stale, spoilt = (
        score.judge(picture) for picture in pictures([edited, SCENE, replace(edited, place="centre")])
    )
    assert score.carried_out(right, edited, "ink") == {"done": True, "kept": True}
    assert score.carried_out(stale, edited, "ink") == {"done": False, "kept": True}
    assert score.carried_out(spoilt, edited, "ink") == {"done": True, "kept": False}


def test_the_difference_around_the_card_leaves_the_card_out() -> None:
    setting = corpus.draw_setting(random.Random(0))
    before, after = (
        p.movedim(0, -1) / 2 + 0.5 for p in corpus.render([SCENE, replace(SCENE, card="pink")], [setting] * 2)
    )
    assert score.outside_card(after, before) == 0.0
    assert score.outside_card((after + 3 / 255), before) == pytest.approx(3, abs=1e-3)


def test_bitmaps_fill_their_cells() -> None:
    cover = bitmaps()
    assert cover.shape == (len(GLYPHS), CELL, CELL) and len(set(GLYPHS)) == len(GLYPHS)
    assert cover.amax(dim=(1, 2)).min() > 0.95 and cover.mean(dim=(1, 2)).min() > 0.1
    assert cover[:, [0, -1]].max() == 0 and cover[:, :, [0, -1]].max() == 0
