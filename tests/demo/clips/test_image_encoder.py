"""The miniature image encoder, asked through what the published one gives too: its rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wanqwen.demo.clips import corpus
from wanqwen.demo.clips.corpus import Scene
from wanqwen.demo.clips.train_image_encoder import QUESTIONS, places
from wanqwen.loading import DEMO_FOLDER, load_image_encoder

pytest.importorskip("transformers")

ENOUGH = {"colour": 0.95, "background": 0.95, "shape": 0.45}  # chance is 17, 20 and 25 %
MOST_OFF = 4.0  # pixels of 64


def pictures(scenes: list[Scene], seed: int) -> Tensor:
    clips = corpus.render_from(scenes, torch.Generator().manual_seed(seed), frames=1)
    return clips[:, :, 0].movedim(1, -1) / 2 + 0.5


def answers(scenes: list[Scene], name: str) -> Tensor:
    return torch.tensor([QUESTIONS[name].index(getattr(scene, name)) for scene in scenes])


def test_rows_tell_what_unseen_pictures_show_and_where() -> None:
    """A linear map fitted to pictures of training scenes has to be right about held-out ones."""
    training, held_out = corpus.scenes()
    encoder = load_image_encoder(DEMO_FOLDER / "wan_image_encoder.safetensors")
    seen = {name: pictures(scenes, seed) for seed, (name, scenes) in enumerate((("fit", training), ("ask", held_out)))}
    told = {}
    for name, batch in seen.items():
        rows = encoder.encode(batch)
        assert rows.shape == (len(batch), 257, 96)
        told[name] = torch.cat((rows[:, 0], rows[:, 1:].mean(dim=1), torch.ones(len(batch), 1)), dim=1)

    def asked(wanted: Tensor) -> Tensor:
        fitted = told["fit"].T @ told["fit"] + 0.1 * torch.eye(told["fit"].shape[1])
        return told["ask"] @ torch.linalg.solve(fitted, told["fit"].T @ wanted)

    for name, least in ENOUGH.items():
        guesses = asked(F.one_hot(answers(training, name)).float()).argmax(dim=1)
        right = (guesses == answers(held_out, name)).float().mean().item()
        assert right >= least, f"{name}: {right:.0%}"
    off = (asked(places(seen["fit"])) - places(seen["ask"])).norm(dim=1) * corpus.SIZE
    assert off.mean() < MOST_OFF
