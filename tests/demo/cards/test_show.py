"""The miniature Qwen-Image through the whole pipeline: is what was asked for there, and is it the text that decides?"""

from pathlib import Path

import pytest
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.demo.cards import score, show
from wanqwen.families import identify
from wanqwen.loading import DEMO_FOLDER

pytest.importorskip("transformers")

SEED = 20_000  # of prompts and noise; no word and no combination of colours and place among them was ever trained on
COUNT = 100
ENOUGH = {"glyphs": 0.90, "ink": 0.95, "card": 0.95, "place": 0.95}
EDITS_DONE = 0.90  # of all, with the word still right; and of all, with nothing else changed
AROUND = 2.0  # mean difference from the source outside the card, in 255ths


@pytest.fixture(scope="module")
def pictures() -> list[show.Picture]:
    return show.generate(show.unseen_prompts(COUNT, SEED), SEED)


@pytest.fixture(scope="module")
def edits() -> list[show.Picture]:
    return show.generate(show.unseen_edits(COUNT, SEED), SEED)


def rates(pictures: list[show.Picture]) -> dict[str, float]:
    return score.rates([score.judge(p.pixels) for p in pictures], [p.wish.scene for p in pictures])


def test_pictures_of_unseen_prompts_show_what_was_asked_for(pictures: list[show.Picture]) -> None:
    reached = rates(pictures)
    assert {name: reached[name] for name, least in ENOUGH.items() if reached[name] < least} == {}


def test_unseen_edits_are_carried_out_and_the_rest_stays(edits: list[show.Picture]) -> None:
    reached = show.edit_rates(edits)
    assert reached.done["all"] >= EDITS_DONE and reached.kept >= EDITS_DONE
    assert reached.outside < AROUND


def test_without_its_text_the_score_falls_to_chance(pictures: list[show.Picture]) -> None:
    blind = rates(show.generate(show.unseen_prompts(20, SEED), SEED, blind=True))
    luck = score.chance([score.judge(p.pixels) for p in pictures], [p.wish.scene for p in pictures])
    for name in ENOUGH:
        assert blind[name] < luck[name] + 0.25, f"{name}: {blind[name]:.0%} without any text"


def test_the_miniature_is_small_and_complete() -> None:
    files = sorted(DEMO_FOLDER.glob("qwen_*.safetensors"))
    assert [file.stem for file in files] == ["qwen_dit", "qwen_edit_dit", "qwen_text_encoder", "qwen_vae"]
    assert sum(file.stat().st_size for file in files) < 20_000_000
    found = {file.stem: identify(open_checkpoint(file)) for file in files}
    assert {(identity.missing, identity.unexpected) for identity in found.values()} == {((), ())}
    assert (found["qwen_dit"].variant, found["qwen_edit_dit"].variant) == ("t2i", "edit")
    assert found["qwen_vae"].spelling == "diffusers"


def test_contact_sheets_and_reports(pictures: list[show.Picture], edits: list[show.Picture], tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    for name, made in (("pictures", pictures), ("edits", edits)):
        show.write_sheet(tmp_path / f"{name}.png", made[:6])
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert "chance" in show.report(pictures) and "carried out" in show.edit_report(edits)
