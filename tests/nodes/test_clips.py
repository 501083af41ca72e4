"""Clips that are longer than one run, through the nodes."""

import pytest
import torch
from wanqwen.core.types import ModelHandle

from .test_nodes import SETTINGS, value


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
    assert value(nodes.VAEDecode.execute(whole, vae, "auto", 256, 64)).shape == (17, 32, 32, 3)


def test_without_a_negative_prompt_there_is_none(nodes, prompts):
    output = nodes.ContinueClip.execute(prompts[0], {"samples": torch.zeros(1, 16, 3, 4, 4)}, 9, 2)
    assert output.values[1] is None


def test_a_clip_that_another_one_goes_on_from_is_told_of(nodes):
    before = {"samples": torch.randn(1, 16, 3, 4, 4)}
    after = {"samples": torch.cat((before["samples"][:, :, -2:], torch.randn(1, 16, 2, 4, 4)), 2), "wanqwen_overlap": 2}
    assert nodes.JoinClips.execute(before, after).ui == {"text": ["17 frames"]}
    [_, said] = nodes.JoinClips.execute(after, after).ui["text"]
    assert said.startswith("after does not begin with the end of before, so the video will jump")


def test_only_a_continuation_is_joined(nodes):
    latent = {"samples": torch.zeros(1, 16, 3, 4, 4)}
    with pytest.raises(ValueError, match="after does not continue another clip: connect"):
        nodes.JoinClips.execute(latent, latent)
