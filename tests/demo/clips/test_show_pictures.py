"""The miniatures of pictures through the whole pipeline: do clips keep what is given, and does the prompt move it?"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from wanqwen.demo.clips import corpus, joined, score, show, show_pictures
from wanqwen.demo.clips.corpus import DIRECTIONS
from wanqwen.demo.clips.show import Clip
from wanqwen.demo.clips.show_pictures import LAST, Wanted

pytest.importorskip("sentencepiece")
pytest.importorskip("transformers")

SEED = 20_000  # of the pictures, the prompts and the noise; none of the 120 held-out scenes was ever trained on
COUNT = 40
MOST_LOST = 0.5  # dB PSNR that a given frame may be worse than the VAE alone has it: more would be seen as a flash


@pytest.fixture(scope="module")
def wanted() -> list[Wanted]:
    return show_pictures.unseen(COUNT, SEED)


@pytest.fixture(scope="module")
def clips(wanted: list[Wanted]) -> dict[str, list[Clip]]:
    return {kind: show_pictures.generate_clips(kind, wanted, SEED) for kind in show_pictures.KINDS}


def rates(clips: list[Clip]) -> dict[str, float]:
    return score.rates([score.judge(clip.frames) for clip in clips], [clip.scene for clip in clips])


@pytest.mark.parametrize("kind", show_pictures.KINDS)
def test_clips_keep_what_a_picture_shows_and_move_as_told(kind: str, clips: dict[str, list[Clip]]) -> None:
    assert rates(clips[kind])["all"] >= 0.9


@pytest.mark.parametrize(("kind", "frame"), [("i2v", 0), ("flf2v", 0), ("flf2v", LAST)])
def test_given_frames_are_as_the_vae_gives_them_back(
    kind: str, frame: int, clips: dict[str, list[Clip]], wanted: list[Wanted]
) -> None:
    lost = show_pictures.losses(clips[kind], wanted, frame)
    assert sum(lost) / len(lost) <= MOST_LOST


def test_objects_end_where_the_last_picture_has_them(clips: dict[str, list[Clip]], wanted: list[Wanted]) -> None:
    away = show_pictures.misses(clips["flf2v"], wanted)
    assert sum(away) / len(away) < 1.0
    elsewhere = show_pictures.misses(clips["flf2v"], wanted[1:] + wanted[:1])
    assert sum(elsewhere) / len(elsewhere) > 8.0


def test_one_picture_moves_each_way_it_is_told() -> None:
    """Pictures of objects in the middle, which say nothing of where to, each told all four ways."""
    wanted = show_pictures.unseen(5, SEED, start=(-2, 0), aside=(-2, 2))
    told = [
        replace(one, scene=(scene := replace(one.scene, direction=direction)), caption=f"moving {scene.direction}")
        for one in wanted
        for direction in DIRECTIONS
    ]
    made = rates(show_pictures.generate_clips("i2v", told, SEED))
    assert made["direction"] >= 0.9 and made["colour"] >= 0.9


def test_without_its_text_a_picture_does_not_know_where_to(wanted: list[Wanted]) -> None:
    blind = rates(show_pictures.generate_clips("i2v", wanted[:20], SEED, blind=True))
    assert blind["colour"] >= 0.9 and blind["background"] >= 0.9, "the picture still shows these"
    assert blind["direction"] < 0.7


def test_a_join_in_latent_space_is_not_seen() -> None:
    """The change at the join lies within those around it, the colour stays, and the shape as well as through pixels."""
    found = joined.joins(10, SEED)
    inside, outside = (joined.averages(found[name]) for name in ("in latent space", "through pixels"))
    assert min(inside.around) <= inside.change <= max(inside.around)
    assert inside.drift < 0.5, "of 255: no eye sees it"
    assert inside.kept >= outside.kept


def test_clips_from_pictures_are_written_with_their_pictures(
    clips: dict[str, list[Clip]], wanted: list[Wanted], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    show.write_sheet(tmp_path / "flf2v.png", clips["flf2v"][:3])
    show.write_sheet(tmp_path / "i2v.png", clips["i2v"][:3])
    with image.open(tmp_path / "flf2v.png") as both, image.open(tmp_path / "i2v.png") as one:
        assert both.width > one.width
    text = show_pictures.report("flf2v", clips["flf2v"], wanted)
    assert "chance" in text and "frame 1:" in text and "frame 9:" in text and "pixels from its place" in text


def test_a_flash_and_a_drift_are_measured() -> None:
    """What the measure of joins must see, made by hand: a clip of even changes, brightened after its join."""
    scene = corpus.scenes()[0][0]
    generator, frames = torch.Generator().manual_seed(0), 2 * corpus.FRAMES - 1
    even = corpus.render_from([scene], generator, frames, joined.ROOM)[0].movedim(0, -1) / 2 + 0.5
    found = joined.measure(even, scene)
    assert found.change == pytest.approx(sum(found.around) / len(found.around), rel=0.2)
    assert found.drift < 0.1 and found.kept
    brighter = even.clone()
    brighter[corpus.FRAMES :] += 0.05
    flashed = joined.measure(brighter, scene)
    assert flashed.change > 1.5 * max(flashed.around)
    assert flashed.drift == pytest.approx(0.05 * 255 * 3**0.5, rel=0.05)
    other = next(one for one in corpus.scenes()[0] if one.shape != scene.shape)
    assert not joined.measure(even, other).kept
