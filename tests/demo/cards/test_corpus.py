"""What is held out stays out, and an edit changes what it names and nothing else."""

import random

import torch
from wanqwen.demo.cards import corpus
from wanqwen.demo.cards.corpus import EDGE, LONGEST, PLACES, SIZE, Edit
from wanqwen.demo.cards.glyphs import CELL


def test_training_and_prompts_share_no_word_and_no_look() -> None:
    rng = random.Random(0)
    training = [corpus.draw_scene(rng, held_out=False) for _ in range(3000)]
    prompts = [corpus.draw_scene(rng, held_out=True) for _ in range(300)]
    assert not {s.word for s in training} & {s.word for s in prompts}
    assert not {(s.ink, s.card, s.place) for s in training} & {(s.ink, s.card, s.place) for s in prompts}
    edited = [corpus.draw_edit(rng, scene, held_out=False).apply(scene) for scene in training]
    assert not {(s.ink, s.card, s.place) for s in edited} & {(s.ink, s.card, s.place) for s in prompts}


def test_every_word_stands_on_its_card_and_on_the_grid_of_the_tokens() -> None:
    boxes = set()
    for place in PLACES:
        for count in range(1, LONGEST + 1):
            box = corpus.word_box(corpus.Scene("7" * count, "red", "white", place))
            assert min(box) > EDGE and max(box) < SIZE - EDGE and all(side % CELL == 0 for side in box)
            boxes.add(box)
    assert len(boxes) == len(PLACES) * LONGEST


def test_an_edit_changes_the_card_and_nothing_around_it() -> None:
    scene, setting = corpus.Scene("风7", "red", "white", "top left"), corpus.draw_setting(random.Random(0))
    around = torch.ones(SIZE, SIZE, dtype=torch.bool)
    around[EDGE:-EDGE, EDGE:-EDGE] = False
    [before] = corpus.render([scene], [setting])
    for edit in (Edit("ink", "blue"), Edit("card", "black"), Edit("place", "centre")):
        [after] = corpus.render([edit.apply(scene)], [setting])
        assert torch.equal(after[:, around], before[:, around])
        assert (after != before).any()


def test_captions_and_instructions_say_everything_in_both_languages() -> None:
    scene, edit = corpus.Scene("风7", "red", "white", "top left"), Edit("place", "bottom right")
    for seed in range(20):
        english, chinese = (scene.caption(random.Random(seed), chinese) for chinese in (False, True))
        assert all(part in english for part in ("风7", "red", "white", "top left"))
        assert all(part in chinese for part in ("风7", "红色", "白色", "左上角")) and not chinese.isascii()
        assert "bottom right" in edit.instruction(random.Random(seed), chinese=False)
        assert "右下角" in edit.instruction(random.Random(seed), chinese=True)
