"""Clips that are longer than one run, through the nodes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from wanqwen.core.types import ModelHandle
from wanqwen.loading import load_model
from wanqwen.wan.conditioning import with_options

from . import tiny
from .test_nodes import SETTINGS, value


@pytest.fixture
def i2v(tmp_path: Path) -> ModelHandle:
    return load_model(tiny.write_model(tmp_path / "i2v.safetensors", replace(tiny.MODEL, in_dim=36, image_dim=24)))


def test_a_clip_goes_on_from_its_latents(nodes, model: ModelHandle, vae, prompts):
    positive, negative = prompts
    first = value(nodes.Sampler.execute(model, positive, {"samples": torch.zeros(1, 16, 3, 4, 4)}, **SETTINGS))
    output = nodes.ContinueClip.execute(positive, first, 9, 1, negative)
    assert output.ui == {"text": ["8 frames after 9: 17 when joined"]}
    positive, negative, latent = output.values
    second = value(nodes.Sampler.execute(model, positive, latent, **SETTINGS | {"negative": negative, "seed": 2}))
    torch.testing.assert_close(second["samples"][:, :, :1], first["samples"][:, :, -1:])
    output = nodes.JoinClips.execute(first, second)
    whole = value(output)
    assert output.ui == {"text": ["17 frames"]} and set(whole) == {"samples"}
    assert torch.equal(whole["samples"][:, :, :3], first["samples"])
    other = {"samples": first["samples"] + 0.2}
    [_, said] = nodes.JoinClips.execute(other, second).ui["text"]
    assert said.startswith("after does not begin as before ends, so the video will jump: is before the clip that")
    assert value(nodes.VAEDecode.execute(whole, vae, "auto", 256, 64)).shape == (17, 32, 32, 3)


def test_each_of_several_clips_from_pictures_goes_on_from_its_own_latents(nodes, i2v: ModelHandle, prompts):
    pictures = {
        "concat_latent_image": torch.randn(1, 16, 3, 4, 4),
        "concat_mask": torch.ones(1, 1, 3, 4, 4).index_fill(2, torch.tensor([0]), 0),
        "clip_vision_output": SimpleNamespace(penultimate_hidden_states=torch.randn(1, 257, 24)),
    }
    positive, negative = (with_options(prompt, pictures) for prompt in prompts)
    before = torch.randn(2, 16, 3, 4, 4)

    def made(clips: torch.Tensor) -> torch.Tensor:
        *ends, latent = nodes.ContinueClip.execute(positive, {"samples": clips}, 9, 1, negative).values
        return value(nodes.Sampler.execute(i2v, ends[0], latent, **SETTINGS | {"negative": ends[1]}))["samples"]

    both = made(before)
    torch.testing.assert_close(both[:, :, :1], before[:, :, -1:])
    torch.testing.assert_close(both[:1], made(before[:1]), atol=1e-4, rtol=0)
    assert not torch.allclose(both[:1], made(before[1:]), atol=1e-2)


def test_without_a_negative_prompt_there_is_none(nodes, prompts):
    output = nodes.ContinueClip.execute(prompts[0], {"samples": torch.zeros(1, 16, 3, 4, 4)}, 9, 2)
    assert output.values[1] is None


def test_a_clip_that_another_one_goes_on_from_is_told_of(nodes):
    before = {"samples": torch.randn(1, 16, 3, 4, 4)}
    after = {"samples": torch.cat((before["samples"][:, :, -2:], torch.randn(1, 16, 2, 4, 4)), 2), "wanqwen_overlap": 2}
    assert nodes.JoinClips.execute(before, after).ui == {"text": ["17 frames"]}
    [_, said] = nodes.JoinClips.execute(after, after).ui["text"]
    assert said.startswith("after does not begin as before ends, so the video will jump")


@pytest.mark.parametrize("size", [4, 8])
def test_only_a_continuation_is_joined(nodes, size):
    before, after = ({"samples": torch.randn(1, 16, 3, 4, width)} for width in (4, size))
    with pytest.raises(ValueError, match="after does not continue another clip: connect"):
        nodes.JoinClips.execute(before, after)


def test_a_continuation_that_was_saved_and_loaded_is_joined(nodes):
    """Save Latent keeps nothing but the numbers."""
    before = torch.randn(1, 16, 5, 4, 4)
    after = torch.cat((before[:, :, 3:] + 0.01, torch.randn(1, 16, 2, 4, 4)), dim=2)
    whole = value(nodes.JoinClips.execute({"samples": before}, {"samples": after}))["samples"]
    assert torch.equal(whole, torch.cat((before, after[:, :, 2:]), dim=2))
