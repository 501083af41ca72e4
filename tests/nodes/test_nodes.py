"""Every node run once without ComfyUI, and what it does with input that does not fit."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from wanqwen.core.types import Conditioning

SIZE = {"width": 32, "height": 32, "frames": 5, "batch_size": 1}
SETTINGS = {"seed": 1, "steps": 2, "guidance": 2.0, "shift": 3.0, "solver": "euler", "denoise": 1.0}


def value(output):
    only, *_ = output.values  # the sampler has a report too
    return only


def sampled(nodes, model, prompts, latent, **options):
    positive, negative = prompts
    settings = SETTINGS | {"negative": negative} | options
    return value(nodes.Sampler.execute(model, positive, latent, **settings))


def empty(nodes, **size) -> dict:
    return value(nodes.EmptyWanLatent.execute(**(SIZE | size)))


def test_from_prompt_to_frames(nodes, model, vae, prompts):
    latent = sampled(nodes, model, prompts, empty(nodes))
    assert latent["samples"].shape == (1, 16, 2, 4, 4)
    images = value(nodes.VAEDecode.execute(latent, vae, "auto", 256, 64))
    assert images.shape == (5, 32, 32, 3) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


def test_our_decode_is_the_stock_node_s_picture(nodes, vae):
    samples = torch.randn(2, 16, 2, 4, 6)
    stock = vae.decode(samples)
    stock = stock.reshape(-1, stock.shape[-3], stock.shape[-2], stock.shape[-1])  # as ComfyUI's VAEDecode does
    assert torch.equal(value(nodes.VAEDecode.execute({"samples": samples}, vae, "auto", 256, 64)), stock)


def test_tiled_decode_covers_the_picture(nodes, vae):
    samples = torch.randn(1, 16, 2, 16, 16)
    whole = value(nodes.VAEDecode.execute({"samples": samples}, vae, "auto", 256, 64))
    tiled = value(nodes.VAEDecode.execute({"samples": samples}, vae, "tiled", 64, 32))
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.05 * whole.std()


def test_a_video_vae_is_asked_for(nodes):
    class ImageVAE:
        latent_dim, latent_channels = 2, 16

    with pytest.raises(ValueError, match="for other models"):
        nodes.VAEDecode.execute({"samples": torch.zeros(1, 16, 1, 4, 4)}, ImageVAE(), "auto", 256, 64)
    with pytest.raises(ValueError, match="for other models"):
        nodes.VAEEncode.execute(torch.zeros(1, 32, 32, 3), ImageVAE())


def test_latents_of_another_model_are_refused(nodes, vae):
    with pytest.raises(ValueError, match="4 channels and this VAE takes 16"):
        nodes.VAEDecode.execute({"samples": torch.zeros(1, 4, 8, 8)}, vae, "auto", 256, 64)


def test_encode_takes_the_batch_as_one_clip(nodes, vae):
    output = nodes.VAEEncode.execute(torch.rand(5, 32, 48, 4), vae)
    assert value(output)["samples"].shape == (1, 16, 2, 4, 6)
    assert output.ui == {"text": ["5 frames of 48 x 32", "The image's alpha channel was dropped."]}


@pytest.mark.parametrize("batch", ["clip", "pictures"])
def test_a_vae_of_comfyui_never_sees_alpha(nodes, vae, batch):
    class StockVAE:
        latent_dim, output_channels, upscale_ratio = 3, vae.output_channels, vae.upscale_ratio

        def encode(self, pixels):
            assert pixels.shape[-1] == 3
            return vae.encode(pixels)

    output = nodes.VAEEncode.execute(torch.rand(1, 32, 48, 4), StockVAE(), batch)
    assert output.ui["text"][-1] == "The image's alpha channel was dropped."


def test_encode_takes_the_batch_as_pictures_of_their_own(nodes, vae):
    images = torch.rand(3, 32, 50, 3)
    output = nodes.VAEEncode.execute(images, vae, "pictures")
    latents = value(output)["samples"]
    assert latents.shape == (3, 16, 1, 4, 6)
    assert torch.equal(latents[1:2], value(nodes.VAEEncode.execute(images[1:2], vae))["samples"])
    assert output.ui == {"text": ["3 pictures of 48 x 32, cut from 3 pictures of 50 x 32 (sizes in steps of 8)"]}


def test_encode_says_what_it_cut(nodes, vae):
    output = nodes.VAEEncode.execute(torch.rand(7, 35, 48, 3), vae)
    assert value(output)["samples"].shape == (1, 16, 2, 4, 6)
    [shown] = output.ui["text"]
    assert shown == "5 frames of 48 x 32, cut from 7 frames of 48 x 35 (4n + 1 frames, sizes in steps of 8)"


def test_sampler_keeps_what_else_a_latent_holds_and_does_not_touch_its_input(nodes, model, prompts):
    latent = empty(nodes) | {"batch_index": [0]}
    output = sampled(nodes, model, prompts, latent)
    assert output["batch_index"] == [0] and not latent["samples"].any() and output["samples"].any()


def test_a_first_step_without_memory_is_said_and_leaves_no_file(nodes, model, prompts, monkeypatch):
    from wanqwen.nodes import sample
    from wanqwen.wan.transformer import WanTransformer

    def velocities(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sample, "_keep", None)
    monkeypatch.setattr(WanTransformer, "velocities", velocities)
    with pytest.raises(ValueError, match=r"step 1 of 2: cpu is out of memory with 1 x 2 x 4 x 4 .* smaller"):
        sampled(nodes, model, prompts, empty(nodes))
    monkeypatch.undo()
    assert sampled(nodes, model, prompts, empty(nodes))["samples"].any()


def test_what_was_sampled_before_a_breakdown_is_kept(nodes, model, prompts, monkeypatch):
    from wanqwen.wan.transformer import WanTransformer

    original, calls = WanTransformer.velocities, []
    monkeypatch.setattr(
        WanTransformer,
        "velocities",
        lambda *a: [v * (float("nan") if calls.append(1) or len(calls) > 4 else 1) for v in original(*a)],
    )
    with pytest.raises(ValueError, match=r"step 3 of 4.*The latent of step 2 is kept: .*\.latent") as caught:
        sampled(nodes, model, prompts, empty(nodes), steps=4)
    kept = load_file(str(caught.value).rpartition("kept: ")[2])["latent_tensor"]
    monkeypatch.undo()
    assert torch.equal(kept, sampled(nodes, model, prompts, empty(nodes), steps=4, end_step=2)["samples"])


def test_a_still_latent_is_one_frame(nodes, model, prompts):
    still = sampled(nodes, model, prompts, {"samples": torch.zeros(1, 16, 4, 4)})
    clip = sampled(nodes, model, prompts, {"samples": torch.zeros(1, 16, 1, 4, 4)})
    assert torch.equal(still["samples"], clip["samples"])


def test_two_samplers_in_a_row_equal_one(nodes, model, prompts):
    whole = sampled(nodes, model, prompts, empty(nodes), steps=4)
    first = sampled(nodes, model, prompts, empty(nodes), steps=4, end_step=2)
    both = sampled(nodes, model, prompts, first, steps=4, start_step=2, add_noise=False)
    assert torch.allclose(both["samples"], whole["samples"], atol=1e-5)
    assert not torch.allclose(first["samples"], whole["samples"], atol=1e-2)


def test_guidance_schedule_and_sigmas_reach_the_run(nodes, model, prompts):
    constant = sampled(nodes, model, prompts, empty(nodes))["samples"]
    scheduled = sampled(nodes, model, prompts, empty(nodes), guidance=9.0, guidance_schedule=" 2, 2.0")["samples"]
    assert torch.equal(constant, scheduled)
    sigmas = torch.tensor([1.0, 0.75, 0.0])  # what shift 3 makes of two steps
    assert torch.allclose(
        sampled(nodes, model, prompts, empty(nodes), steps=9, shift=1.0, sigmas=sigmas)["samples"], constant
    )


def test_without_a_negative_there_is_no_guidance(nodes, model, prompts):
    alone = sampled(nodes, model, prompts, empty(nodes), negative=None, guidance=7.0)["samples"]
    assert torch.equal(alone, sampled(nodes, model, prompts, empty(nodes), guidance=1.0)["samples"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_schedule": "6; 5"}, "guidance_schedule is '6; 5': expected numbers with commas"),
        ({"guidance_schedule": "6, 5, 4"}, "3 values for 2 steps"),
        ({"start_step": 3}, "start_step 3"),
        ({"solver": "heun"}, "choose one of unipc"),
    ],
)
def test_sampler_says_what_is_wrong(nodes, model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        sampled(nodes, model, prompts, empty(nodes), **options)


def test_a_mask_keeps_the_rest_of_a_clip(nodes, model, vae, prompts):
    source = value(nodes.VAEEncode.execute(torch.rand(5, 32, 32, 3), vae))
    mask = torch.zeros(1, 1, 32, 32)  # in pixels, as ComfyUI's Set Latent Noise Mask gives it
    mask[..., 12:20] = 1  # touches the latent columns 1 and 2
    made = sampled(nodes, model, prompts, source | {"noise_mask": mask})["samples"]
    assert torch.allclose(made[..., [0, 3]], source["samples"][..., [0, 3]], atol=1e-5)
    assert (made - source["samples"])[..., 1:3].abs().mean() > 0.1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 1, 32, 32), "2 masks for 1 latent"),
        (torch.full((1, 1, 32, 32), 255.0), "from 255 to 255: 0 .kept. to 1"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(nodes, model, prompts, mask, message):
    with pytest.raises(ValueError, match=message):
        sampled(nodes, model, prompts, empty(nodes) | {"noise_mask": mask})


def test_shift_0_is_the_published_schedule(nodes, model, prompts):
    published = sampled(nodes, model, prompts, empty(nodes), shift=0.0)["samples"]
    assert torch.equal(published, sampled(nodes, model, prompts, empty(nodes), shift=5.0)["samples"])
    assert not torch.equal(published, sampled(nodes, model, prompts, empty(nodes), shift=3.0)["samples"])


def test_the_preset_of_another_family_is_refused(nodes, model, prompts):
    with pytest.raises(
        ValueError, match=r"preset is lightning-4, which is not for wan21 models: choose lightx2v-4 or .* or none"
    ):
        sampled(nodes, model, prompts, empty(nodes), preset="lightning-4")


def test_sampler_refuses_several_prompts(nodes, model, prompts):
    positive, negative = prompts
    with pytest.raises(ValueError, match="positive holds 2 prompts"):
        sampled(nodes, model, (positive + positive, negative), empty(nodes))


def test_sampler_refuses_the_text_of_another_encoder(nodes, model):
    other = [[torch.ones(1, 77, 768), {"pooled_output": None}]]
    with pytest.raises(ValueError, match="768"):
        sampled(nodes, model, (other, other), empty(nodes))


def test_sampler_refuses_a_broken_latent(nodes, model, prompts):
    with pytest.raises(ValueError, match="NaN"):
        sampled(nodes, model, prompts, {"samples": torch.full((1, 16, 1, 4, 4), torch.nan)}, denoise=0.5)


@pytest.mark.parametrize(
    ("asked", "shape", "notice"),
    [
        ({"frames": 80}, (1, 16, 21, 4, 4), "frames 80 changed to 81"),
        ({"frames": 2}, (1, 16, 1, 4, 4), "frames 2 changed to 1"),
        ({"frames": 79}, (1, 16, 21, 4, 4), "frames 79 changed to 81"),
        ({"width": 100}, (1, 16, 2, 4, 12), "width 100 changed to 96"),
        ({"height": 104}, (1, 16, 2, 14, 4), "height 104 changed to 112"),
        ({"width": 3}, (1, 16, 2, 4, 2), "width 3 changed to 16"),
    ],
)
def test_a_size_that_wan_cannot_make_is_corrected_aloud(nodes, asked, shape, notice, caplog):
    size = SIZE | asked
    with caplog.at_level(logging.WARNING):
        output = nodes.EmptyWanLatent.execute(**size)
    assert value(output)["samples"].shape == shape
    _, shown = output.ui["text"]
    assert shown.startswith(notice) and shown in caplog.text


def test_a_size_that_fits_is_left_alone(nodes):
    output = nodes.EmptyWanLatent.execute(832, 480, 81, 2)
    assert value(output)["samples"].shape == (2, 16, 21, 60, 104)
    assert output.ui == {"text": ["832 x 480, 81 frames"]}


def test_a_prompt_that_is_too_long_is_cut_aloud(nodes, text_encoder):
    output = nodes.WanTextEncode.execute(text_encoder, "red star " * 5000, "")
    positive, negative = output.values
    assert positive[0][0].shape == negative[0][0].shape == (1, 512, 32)
    cut, whole = output.ui["text"]
    assert cut.startswith("positive: The prompt has ") and "cut off" in cut
    assert whole == "negative: 0 of 511 tokens"


def test_prompts_are_comfyui_conditioning(nodes, text_encoder, prompts):
    [[rows, options]], _ = prompts
    [own] = text_encoder.encode(["a red star moving right"])
    assert isinstance(own, Conditioning) and options == {"pooled_output": None}
    length = own.text.shape[1]
    assert torch.equal(rows[:, :length], own.text) and not rows[:, length:].any()
