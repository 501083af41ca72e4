"""The node Wan VACE, and samplers after it."""

from dataclasses import replace

import pytest
import torch
from wanqwen.core import runtime
from wanqwen.wan.controls import Source, encode

SIZE = {"width": 48, "height": 32, "frames": 5, "batch_size": 1, "strength": 1.0}
SETTINGS = {"seed": 1, "steps": 2, "guidance": 2.0, "shift": 3.0, "solver": "euler", "denoise": 1.0}


def value(output):
    only, *_ = output.values  # the sampler has a report too
    return only


@pytest.fixture
def model(nodes):
    return value(nodes.LoadWanModel.execute("vace.safetensors", "auto"))


@pytest.fixture
def vae(nodes):
    return value(nodes.LoadWanVAE.execute("tiny.safetensors", "auto"))


@pytest.fixture
def prompts(nodes):
    text_encoder = value(nodes.LoadWanTextEncoder.execute("tiny.safetensors", "cpu", 0.0, "auto"))
    return nodes.WanTextEncode.execute(text_encoder, "a red star moving right", "").values


def guided(nodes, prompts, vae, **options):
    return nodes.WanVACE.execute(*prompts, vae, **(SIZE | options))


def sampled(nodes, model, positive, negative, latent, **options):
    return value(nodes.Sampler.execute(model, positive, latent, **(SETTINGS | {"negative": negative} | options)))


def test_from_video_mask_and_references_to_frames(nodes, model, vae, prompts):
    video, mask = torch.rand(5, 32, 48, 3), torch.rand(1, 32, 48)
    output = guided(nodes, prompts, vae, control_video=video, mask=mask, reference_images=torch.rand(2, 40, 40, 3))
    positive, negative, latent, trim = output.values
    assert latent["samples"].shape == (1, 16, 4, 4, 6) and trim == 2 and not latent["samples"].any()
    assert output.ui == {"text": ["48 x 32, 5 frames, 2 reference image(s)"]}
    made = sampled(nodes, model, positive, negative, latent)
    assert made["samples"].shape == (1, 16, 2, 4, 6), "the reference frames are left out of what is finished"
    assert value(nodes.VAEDecode.execute(made, vae, "auto", 256, 64)).shape == (5, 32, 48, 3)
    half = sampled(nodes, model, positive, negative, latent, end_step=1)
    assert half["samples"].shape == (1, 16, 4, 4, 6)
    whole = sampled(nodes, model, positive, negative, half, start_step=1, add_noise=False)
    assert torch.allclose(whole["samples"], made["samples"], atol=1e-4)


def test_it_writes_what_comfyui_s_own_node_does(nodes, vae, prompts):
    positive, negative, *_ = guided(nodes, prompts, vae, control_video=torch.rand(5, 32, 48, 3), strength=0.7).values
    for before, after in ((prompts[0], positive), (prompts[1], negative)):
        [[rows, options]], [[given, others]] = after, before
        assert rows is given and "vace_frames" not in others
        assert options["vace_frames"][0].shape == (1, 32, 2, 4, 6) and options["vace_mask"][0].shape == (1, 64, 2, 4, 6)
        assert options["vace_strength"] == [0.7] and options["wanqwen_vace_lead"] == [0]


def test_every_input_counts(nodes, model, vae, prompts):
    given = {
        "control_video": torch.rand(5, 32, 48, 3),
        "mask": (torch.rand(1, 32, 48) > 0.5).float(),
        "reference_images": torch.rand(1, 32, 48, 3),
        "strength": 1.0,
    }
    others = {name: 1 - value for name, value in given.items()} | {"strength": 0.3}

    def made(**inputs):
        return sampled(nodes, model, *guided(nodes, prompts, vae, **inputs).values[:3])["samples"]

    wanted = made(**given)
    assert torch.equal(made(**given), wanted)
    for name, other in others.items():
        assert not torch.equal(made(**(given | {name: other})), wanted), name


def test_nodes_in_a_row_guide_together(nodes, model, vae, prompts):
    first = guided(nodes, prompts, vae, control_video=torch.rand(5, 32, 48, 3))
    both = guided(nodes, first.values[:2], vae, reference_images=torch.rand(1, 32, 48, 3), strength=0.5)
    assert [len(options["vace_frames"]) for [[_, options]] in both.values[:2]] == [2, 2]
    made = sampled(nodes, model, *both.values[:3])["samples"]
    assert made.shape == (1, 16, 2, 4, 6)
    # A latent of the clip alone, from any node of its size, does as well.
    assert torch.equal(sampled(nodes, model, *both.values[:2], first.values[2])["samples"], made)


@pytest.mark.parametrize("references", [(2, 1), (1, 2), (2, 0)])
def test_the_last_of_nodes_in_a_row_gives_the_latent_of_all(nodes, model, vae, prompts, references):
    values = prompts
    for count in references:
        images = {"reference_images": torch.rand(count, 32, 48, 3)} if count else {}
        *values, latent, trim = guided(nodes, values, vae, **images).values
    assert trim == 2 and latent["samples"].shape == (1, 16, 4, 4, 6)
    assert sampled(nodes, model, *values, latent)["samples"].shape == (1, 16, 2, 4, 6)


def test_what_was_made_to_fit_is_said(nodes, vae, prompts, caplog):
    output = guided(nodes, prompts, vae, width=50, frames=6, control_video=torch.rand(3, 64, 64, 4))
    assert output.values[2]["samples"].shape == (1, 16, 2, 4, 6)
    assert output.ui["text"] == [
        "48 x 32, 5 frames, 0 reference image(s)",
        "width 50 changed to 48: Wan needs a multiple of 16.",
        "frames 6 changed to 5: Wan makes 4n + 1 frames.",
        "The image's alpha channel was dropped.",
        "control_video of 64 x 64 was made to cover 48 x 32.",
        "control_video has 3 frames: the other 2 are made anew, and so are its own, without a mask: a black one keeps "
        "them.",
    ]


def test_pictures_with_alpha_are_told_of_once(nodes, vae, prompts):
    pictures = torch.rand(5, 32, 48, 4)
    output = guided(nodes, prompts, vae, control_video=pictures, reference_images=pictures[:1])
    assert output.ui["text"][1:] == ["The image's alpha channel was dropped."]


def test_a_mask_that_keeps_everything_is_told_of(nodes, vae, prompts):
    video = torch.rand(5, 32, 48, 3)
    said = {
        frames: guided(nodes, prompts, vae, control_video=video, mask=torch.zeros(1, 32, 48), frames=frames).ui["text"]
        for frames in (5, 9)
    }
    assert said[5][1:] == ["The mask is black everywhere: all of control_video is kept, and nothing made anew."]
    assert said[9][1:] == ["control_video has 5 frames: the other 4 are made anew."]


def test_a_clip_that_goes_on_longer_than_the_control_is_refused(nodes, model, vae, prompts):
    """Its first frames would be left out for reference frames."""
    output = guided(nodes, prompts, vae, reference_images=torch.rand(1, 32, 48, 3))
    first = sampled(nodes, model, *output.values[:3])
    longer = nodes.ContinueClip.execute(output.values[0], first, 9, 1, output.values[1]).values
    with pytest.raises(ValueError, match=r"a clip of .* 9 frames, and .* 5 frames after 1 reference frame"):
        sampled(nodes, model, *longer)
    same = nodes.ContinueClip.execute(output.values[0], first, 5, 1, output.values[1]).values
    assert sampled(nodes, model, *same)["samples"].shape == (1, 16, 2, 4, 6)


def test_nodes_in_a_row_for_clips_of_other_lengths_are_refused(nodes, model, vae, prompts):
    """With its reference frame the first is as long as the second."""
    first = guided(nodes, prompts, vae, reference_images=torch.rand(1, 32, 48, 3))
    both = guided(nodes, first.values[:2], vae, frames=9)
    with pytest.raises(ValueError, match=r"clips of 48 x 32 pixels, 5 frames and 48 x 32 pixels, 9 frames: give all"):
        sampled(nodes, model, *both.values[:3])


def test_another_model_is_refused_by_name(nodes, vae, prompts):
    plain = value(nodes.LoadWanModel.execute("tiny.safetensors", "auto"))
    with pytest.raises(ValueError, match=r"^tiny\.safetensors: .* takes no control, .* load a VACE model"):
        sampled(nodes, plain, *guided(nodes, prompts, vae).values[:3])


def test_a_vace_model_asks_for_the_node(nodes, model, prompts):
    latent = value(nodes.EmptyWanLatent.execute(48, 32, 5, 1))
    with pytest.raises(ValueError, match=r"^vace\.safetensors: .* takes at least one control, .* the node Wan VACE"):
        sampled(nodes, model, *prompts, latent)


def test_a_clip_of_another_size_than_the_control_is_an_error(nodes, model, vae, prompts):
    latent = value(nodes.EmptyWanLatent.execute(64, 32, 5, 1))
    with pytest.raises(ValueError, match=r"a clip of 64 x 32 pixels, 5 f.* for 48 x 32 pixels, 5 frames: connect"):
        sampled(nodes, model, *guided(nodes, prompts, vae).values[:2], latent)


def test_a_vae_of_pictures_with_alpha_is_refused(nodes, prompts):
    class Layers:
        latent_dim, latent_channels, output_channels = 3, 16, 4

    with pytest.raises(ValueError, match="pictures of 4 channels"):
        guided(nodes, prompts, Layers())


def test_a_vae_of_wan_2_2_is_refused(nodes, prompts):
    class Larger:
        latent_dim, latent_channels, output_channels = 3, 48, 3

    with pytest.raises(ValueError, match=r"VAE is for other models: .* wan_2\.1_vae\.safetensors"):
        guided(nodes, prompts, Larger(), reference_images=torch.rand(1, 32, 48, 3))


def test_the_vae_of_comfyui_serves_as_well(nodes, vae, prompts):
    class Stock:
        latent_dim, latent_channels, output_channels = 3, 16, 3

        def encode(self, pixels):
            return vae.encode(pixels).half()

    video = torch.rand(5, 32, 48, 3)
    ours, theirs = (encode(Source(video=video), each, 48, 32, 5).frames for each in (vae, Stock()))
    assert theirs.dtype == torch.float32 and torch.allclose(ours, theirs, atol=1e-2)


def test_frames_before_the_clip_stay_until_the_end(nodes, model, vae, prompts, monkeypatch):
    """The sampler draws noise for all of them, and the model sees all of them."""
    seen, original = [], runtime.draw_noise
    monkeypatch.setattr(runtime, "draw_noise", lambda shape, *a: seen.append(shape) or original(shape, *a))
    output = guided(nodes, prompts, vae, reference_images=torch.rand(3, 32, 48, 3), batch_size=2)
    assert output.values[2]["samples"].shape == (2, 16, 5, 4, 6)
    made = sampled(nodes, replace(model), *output.values[:3])
    assert set(seen) == {(2, 16, 5, 4, 6)} and made["samples"].shape == (2, 16, 2, 4, 6)
