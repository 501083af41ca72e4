"""What is held out stays out, and an edit changes what it names and nothing else."""

import random

import torch
from wanqwen.demo.cards import corpus
from wanqwen.demo.cards.corpus import CARD_HEIGHT, CARD_WIDTH, LONGEST, PLACES, SIZE, Edit


def test_training_and_prompts_share_no_word_and_no_look() -> None:
    rng = random.Random(0)
    training = [corpus.draw_scene(rng, held_out=False) for _ in range(3000)]
    prompts = [corpus.draw_scene(rng, held_out=True) for _ in range(300)]
    assert not {s.word for s in training} & {s.word for s in prompts}
    assert not {(s.ink, s.card, s.place) for s in training} & {(s.ink, s.card, s.place) for s in prompts}
    edited = [corpus.draw_edit(rng, scene, held_out=False).apply(scene) for scene in training]
    assert not {(s.ink, s.card, s.place) for s in edited} & {(s.ink, s.card, s.place) for s in prompts}


def test_every_word_fits_on_its_card_and_every_card_on_its_picture() -> None:
    rng = random.Random(0)
    for _ in range(300):
        setting = corpus.draw_setting(rng)
        top, left = corpus.card_corner(setting)
        assert top >= 2 and top + CARD_HEIGHT <= SIZE - 2 and left >= 2 and left + CARD_WIDTH <= SIZE - 2
        for place in PLACES:
            for count in range(1, LONGEST + 1):
                box = corpus.word_box(corpus.Scene("7" * count, "red", "white", place), setting)
                assert top < box[0] and left < box[1] and box[2] < top + CARD_HEIGHT and box[3] < left + CARD_WIDTH


def test_an_edit_changes_the_card_and_nothing_around_it() -> None:
    scene, setting = corpus.Scene("风7", "red", "white", "top left"), corpus.draw_setting(random.Random(0))
    top, left = corpus.card_corner(setting)
    around = torch.ones(SIZE, SIZE, dtype=torch.bool)
    around[top : top + CARD_HEIGHT, left : left + CARD_WIDTH] = False
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
