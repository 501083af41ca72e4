"""The miniatures of pictures through the whole pipeline: do clips keep what is given, and does the prompt move it?"""

from dataclasses import replace

import pytest
import torch
from wanqwen.demo.clips import corpus, joined, score, show_pictures
from wanqwen.demo.clips.show import Clip
from wanqwen.demo.clips.show_pictures import LAST, Pipeline, Wanted
from wanqwen.demo.clips.train_image_encoder import places
from wanqwen.loading import DEMO_FOLDER, load_image_encoder

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
