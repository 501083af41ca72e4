"""The nodes of Qwen-Image, each run once without ComfyUI, and what they do with input that does not fit."""

import pytest
import torch
from wanqwen.core import runtime

SETTINGS = {"seed": 1, "steps": 2, "guidance": 2.0, "shift": 0.0, "solver": "euler", "denoise": 1.0}
PLAIN = ("auto", 256, 64)  # tiling of VAE Decode


def value(output):
    only, *_ = output.values  # the sampler has a report too
    return only


def picture(width: int, height: int, channels: int = 3, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width * height + channels)
    return torch.rand(count, height, width, channels, generator=generator)


@pytest.fixture
def load(nodes):
    return lambda variant: value(nodes.LoadQwenImageModel.execute(f"qwen_{variant}.safetensors", "auto", "auto"))


@pytest.fixture
def model(load):
    return load("t2i")


@pytest.fixture
def vae(nodes):
    return value(nodes.LoadWanVAE.execute("qwen.safetensors", "auto"))


@pytest.fixture
def text_encoder(nodes):
    return value(nodes.LoadQwenImageTextEncoder.execute("qwen.safetensors", "cpu", 0.0, "auto"))


@pytest.fixture
def prompts(nodes, text_encoder):
    return nodes.QwenImageTextEncode.execute(text_encoder, "the word 风7 in red", " ").values


@pytest.fixture
def small(monkeypatch):
    """References and results of 64 x 64 pixels rather than a million; see tests/qwen_image/test_editing.py for that."""
    from wanqwen.qwen_image import editing

    monkeypatch.setattr(editing, "AREA", 64 * 64)


def sampled(nodes, model, prompts, latent, **options):
    positive, negative = prompts
    return nodes.Sampler.execute(model, positive, latent, **(SETTINGS | {"negative": negative} | options))


def latent_of(nodes, *args, **options) -> torch.Tensor:
    return value(sampled(nodes, *args, **options))["samples"]


def empty(nodes, batch_size: int = 1, width: int = 48, height: int = 32) -> dict:
    return value(nodes.EmptyQwenImageLatent.execute("custom", width, height, batch_size))


@pytest.fixture
def edit(nodes, text_encoder, vae):
    """Run Edit Encode."""

    def encode(model, *pictures, text="make it green", size="published", custom=(0, 0)):
        more = dict(zip(("image_2", "image_3"), pictures[1:], strict=False))
        return nodes.QwenImageEditEncode.execute(
            model, text_encoder, vae, pictures[0], text, " ", size, *custom, **more
        )

    return encode


def test_from_prompt_to_picture(nodes, model, vae, prompts):
    latent = value(sampled(nodes, model, prompts, empty(nodes)))
    assert latent["samples"].shape == (1, 16, 1, 4, 6)
    images = value(nodes.VAEDecode.execute(latent, vae, *PLAIN))
    assert images.shape == (1, 32, 48, 3) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


def test_a_batch_is_so_many_pictures(nodes, model, vae, prompts):
    latent = value(sampled(nodes, model, prompts, empty(nodes, batch_size=2)))
    images = value(nodes.VAEDecode.execute(latent, vae, *PLAIN))
    assert images.shape == (2, 32, 48, 3) and not torch.equal(images[0], images[1])
    alone = latent_of(nodes, model, prompts, empty(nodes))
    assert torch.allclose(latent["samples"][:1], alone, atol=1e-5)


def test_the_loader_says_which_model_it_found(nodes):
    found = nodes.LoadQwenImageModel.execute("qwen_edit-2509.safetensors", "auto", "bf16")
    [handle] = found.values
    assert handle.identity.variant == "edit-2509" and handle.dtype == torch.bfloat16
    [line] = found.ui["text"]
    assert line.startswith("Qwen-Image-Edit-2509, by ") and "metadata" in line
    chosen = nodes.LoadQwenImageModel.execute("qwen_edit-2509.safetensors", "edit-2511", "auto")
    assert value(chosen).identity.config.zero_cond_t
    assert chosen.ui == {"text": ["Qwen-Image-Edit-2511, as chosen"]}


def test_the_model_s_own_sizes_are_in_the_list(nodes):
    output = nodes.EmptyQwenImageLatent.execute("16:9 (1664x928)", 48, 48, 2)
    assert value(output)["samples"].shape == (2, 16, 1, 116, 208) and output.ui == {"text": ["1664 x 928"]}


def test_a_size_off_the_grid_is_corrected_aloud(nodes):
    output = nodes.EmptyQwenImageLatent.execute("custom", 100, 7, 1)
    assert value(output)["samples"].shape == (1, 16, 1, 2, 12)
    assert output.ui == {"text": ["96 x 16", "100 x 7 changed to 96 x 16: multiples of 16 are needed."]}


def test_prompts_are_comfyui_conditioning(nodes, text_encoder, prompts):
    [[rows, options]], _ = prompts
    [own] = text_encoder.encode(["the word 风7 in red"])
    assert torch.equal(rows, own.text) and options == {"pooled_output": None}


def test_an_empty_prompt_keeps_the_rows_of_the_template(nodes, model, text_encoder):
    output = nodes.QwenImageTextEncode.execute(text_encoder, "", "")
    positive, negative = output.values
    assert positive[0][0].shape == negative[0][0].shape and positive[0][0].shape[1] > 0
    assert torch.isfinite(latent_of(nodes, model, output.values, empty(nodes))).all()


def test_a_prompt_that_is_too_long_is_cut_aloud(nodes, text_encoder):
    output = nodes.QwenImageTextEncode.execute(text_encoder, "red 风 " * 2000, " ")
    cut, whole = output.ui["text"]
    assert cut.startswith("positive: The prompt has ") and "cut off" in cut
    assert whole == "negative: 1 of 1024 tokens"


def test_lightning_is_the_settings_it_names(nodes, model, prompts):
    output = sampled(nodes, model, prompts, empty(nodes), preset="lightning-4", guidance=9.0, solver="unipc")
    typed = latent_of(nodes, model, prompts, empty(nodes), steps=4, guidance=1.0, shift=3.0)
    assert torch.equal(value(output)["samples"], typed)
    said, model_line, settings, *_ = output.ui["text"]
    assert "4 steps of euler, shift 3, guidance 1; seed 1" in settings
    assert model_line.startswith(
        "qwen_t2i.safetensors: qwen-image t2i, 2 blocks of width 48; weights fp32, computed in float32"
    )
    assert said.startswith("lightning-4: 4 steps of euler, shift 3, guidance 1;")


def test_a_picture_to_start_from_is_kept_the_more_the_less_denoise(nodes, model, vae, prompts):
    source = value(nodes.VAEEncode.execute(picture(48, 32), vae, "pictures"))
    runs = [latent_of(nodes, model, prompts, source, steps=4, denoise=share) for share in (0.1, 0.5, 1.0)]
    near, half, far = ((run - source["samples"]).abs().mean() for run in runs)
    assert near < half < far


# Inpainting


def test_what_the_mask_does_not_cover_is_the_source_bit_by_bit(nodes, model, vae, prompts):
    source = picture(50, 35)  # on no grid
    mask = torch.zeros(1, 35, 50)
    mask[:, 10:20, 12:30] = 1
    made = nodes.InpaintLatent.execute(source, mask, vae, 4)
    assert made.ui == {"text": ["50 x 35, 10% of it made anew"]}
    latent = value(sampled(nodes, model, prompts, value(made)))
    images = value(nodes.VAEDecode.execute(latent, vae, *PLAIN))
    assert images.shape == source.shape
    changed = (images != source).any(dim=-1)
    assert not changed[mask == 0].any()
    assert changed[0, 12:18, 16:26].all()


def test_a_batch_of_inpainted_pictures(nodes, model, vae, prompts):
    """As ComfyUI's Repeat Latent Batch makes it: everything twice."""
    mask = torch.zeros(1, 32, 48)
    mask[:, 8:24, 8:24] = 1
    latent = value(nodes.InpaintLatent.execute(picture(48, 32), mask, vae, 0))
    twice = {"samples": latent["samples"].repeat(2, 1, 1, 1, 1), "noise_mask": latent["noise_mask"].repeat(2, 1, 1, 1)}
    made = value(sampled(nodes, model, prompts, latent | twice))
    images = value(nodes.VAEDecode.execute(made, vae, *PLAIN))
    assert torch.equal(images[0, 24:], images[1, 24:]) and not torch.equal(images[0], images[1])


def test_inpainted_latents_that_were_joined_are_refused(nodes, model, prompts, vae):
    """As ComfyUI's Latent Batch joins them: all but the samples are those of the first."""
    latent = value(nodes.InpaintLatent.execute(picture(32, 32), torch.ones(1, 32, 32), vae, 0))
    joined = latent | {"samples": latent["samples"].repeat(2, 1, 1, 1, 1), "batch_index": [0, 0]}
    with pytest.raises(ValueError, match=r"joins several, .* decode each of them on its own"):
        nodes.VAEDecode.execute(joined, vae, *PLAIN)


def test_a_vae_of_layers_is_refused_where_rgb_is_meant(nodes, load, text_encoder):
    class LayersVAE:
        latent_dim, latent_channels, output_channels = 3, 16, 4

    with pytest.raises(ValueError, match="pictures of 4 channels"):
        nodes.InpaintLatent.execute(picture(32, 32), torch.ones(1, 32, 32), LayersVAE(), 8)
    with pytest.raises(ValueError, match="pictures of 4 channels"):
        nodes.QwenImageEditEncode.execute(
            load("edit"), text_encoder, LayersVAE(), picture(32, 32), "", " ", "published", 0, 0
        )


def test_a_stock_noise_mask_keeps_the_rest_of_the_latent(nodes, model, vae, prompts):
    source = value(nodes.VAEEncode.execute(picture(48, 32), vae, "pictures"))
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 16:32] = 1
    made = latent_of(nodes, model, prompts, source | {"noise_mask": mask})
    kept = [0, 1, 4, 5]
    assert torch.allclose(made[..., kept], source["samples"][..., kept], atol=1e-5)
    assert (made - source["samples"])[..., 2:4].abs().mean() > 0.1


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (picture(32, 32), torch.zeros(1, 64, 64), "The mask is empty"),
        (picture(32, 32, count=2), torch.ones(1, 32, 32), "one picture and one mask, got 2 and 1"),
    ],
)
def test_inpainting_says_what_is_wrong(nodes, vae, image, mask, message):
    with pytest.raises(ValueError, match=message):
        nodes.InpaintLatent.execute(image, mask, vae, 8)


def test_transparency_of_a_picture_to_inpaint_is_dropped_aloud(nodes, vae):
    output = nodes.InpaintLatent.execute(picture(32, 32, channels=4), torch.ones(1, 32, 32), vae, 0)
    assert output.ui == {"text": ["32 x 32, 100% of it made anew", "The image's alpha channel was dropped."]}


def test_a_noisy_latent_with_a_mask_is_refused_before_weights_are_read(nodes, model, prompts, monkeypatch):
    monkeypatch.setattr(runtime, "opened", None)
    half = torch.arange(48).ge(24).float().expand(1, 1, 32, 48)
    latent = empty(nodes) | {"noise_mask": half}
    with pytest.raises(ValueError, match="has a mask and add_noise is off"):
        sampled(nodes, model, prompts, latent, add_noise=False)


# Edits


def test_an_edit_of_the_published_size(nodes, load, vae, edit, small):
    model = load("edit")
    positive, negative, latent = edit(model, picture(40, 40)).values
    assert latent["samples"].shape == (1, 16, 1, 8, 8)
    [reference] = positive[0][1]["reference_latents"]
    assert reference.shape == (1, 16, 1, 8, 8) and torch.equal(reference, negative[0][1]["reference_latents"][0])
    made = value(sampled(nodes, model, (positive, negative), latent))
    assert value(nodes.VAEDecode.execute(made, vae, *PLAIN)).shape == (1, 64, 64, 3)


def test_an_aligned_edit_has_the_size_of_its_source(nodes, load, vae, edit, small):
    model, source = load("edit"), picture(50, 35)
    *prompts, latent = edit(model, source, size="pixel_aligned").values
    assert latent["samples"].shape == (1, 16, 1, 6, 8)
    made = value(sampled(nodes, model, prompts, latent))
    assert value(nodes.VAEDecode.execute(made, vae, *PLAIN)).shape == source.shape


def test_an_edit_of_one_s_own_size(load, edit, small):
    output = edit(load("edit"), picture(40, 40), size="custom", custom=(80, 50))
    assert output.values[2]["samples"].shape == (1, 16, 1, 6, 10)
    assert output.ui["text"] == [
        "1 picture(s), result 80 x 48",
        "80 x 50 changed to 80 x 48: multiples of 16 are needed.",
    ]


def test_the_reference_steers_the_result(nodes, load, edit, small):
    model = load("edit")
    runs = []
    for source in (picture(64, 64), 1 - picture(64, 64)):
        *prompts, latent = edit(model, source).values
        runs.append(latent_of(nodes, model, prompts, latent))
    assert not torch.allclose(*runs, atol=1e-3)


def test_2511_treats_its_references_as_clean_pictures(nodes, load, edit, small):
    """The same weights as 2509: only the modulation of the references differs."""
    runs = {}
    for variant in ("edit-2509", "edit-2511"):
        model = load(variant)
        *prompts, latent = edit(model, picture(64, 64), size="pixel_aligned").values
        runs[variant] = latent_of(nodes, model, prompts, latent)
    assert not torch.allclose(*runs.values(), atol=1e-4)


@pytest.mark.parametrize("pictures", [2, 3])
def test_edits_of_several_pictures(nodes, load, edit, small, pictures):
    model = load("edit-2509")
    output = edit(model, *(picture(32 * (k + 2), 64) for k in range(pictures)))
    *prompts, latent = output.values
    assert len(prompts[0][0][1]["reference_latents"]) == pictures
    assert output.ui["text"][0].startswith(f"{pictures} picture(s)")
    assert latent_of(nodes, model, prompts, latent).shape == latent["samples"].shape


def test_a_batch_of_images_is_so_many_pictures(load, edit, small):
    together = edit(load("edit-2509"), picture(64, 64, count=2)).values[0]
    apart = edit(load("edit-2509"), *picture(64, 64, count=2).split(1)).values[0]
    assert len(together[0][1]["reference_latents"]) == 2 and torch.equal(together[0][0], apart[0][0])


def test_stock_reference_latents_do_what_edit_encode_does(nodes, load, vae, edit, small):
    """ComfyUI's ReferenceLatent hangs the latents on prompts that its own text nodes made."""
    model, source = load("edit"), picture(64, 64)
    ours = edit(model, source, size="pixel_aligned")
    *prompts, latent = ours.values
    stock = value(nodes.VAEEncode.execute(source, vae))["samples"]
    for reference in (stock, stock[:, :, 0]):
        given = [[[rows, {"pooled_output": None, "reference_latents": [reference]}]] for [[rows, _]] in prompts]
        assert torch.equal(latent_of(nodes, model, given, latent), latent_of(nodes, model, prompts, latent))


# Input that does not fit: a clear error before anything runs, or a correction that the node states


def test_without_a_negative_the_node_says_that_guidance_is_off(nodes, model, prompts):
    output = sampled(nodes, model, prompts, empty(nodes), negative=None, guidance=4.0)
    said, *_ = output.ui["text"]
    assert said.startswith("guidance 4 has no effect without a negative prompt: connect one")
    assert torch.equal(value(output)["samples"], latent_of(nodes, model, prompts, empty(nodes), guidance=1.0))


def test_a_negative_without_the_picture_gets_it_aloud(nodes, load, text_encoder, edit, small):
    model = load("edit")
    positive, negative, latent = edit(model, picture(64, 64)).values
    bare = [[negative[0][0], {"pooled_output": None}]]
    output = sampled(nodes, model, (positive, bare), latent)
    assert "other reference pictures than the positive one" in output.ui["text"][0]
    assert torch.equal(value(output)["samples"], latent_of(nodes, model, (positive, negative), latent))


def test_an_edit_model_without_a_picture_says_so(nodes, load, prompts):
    output = sampled(nodes, load("edit"), prompts, empty(nodes))
    said, *_ = output.ui["text"]
    assert said == "Qwen-Image-Edit is made to edit, and the conditioning has no picture: it runs from text alone."


def test_an_image_with_alpha_is_edited_without_it_aloud(load, edit, small):
    output = edit(load("edit"), picture(64, 64, channels=4))
    assert any("alpha" in line for line in output.ui["text"])
    plain = edit(load("edit"), picture(64, 64, channels=4)[..., :3])
    assert torch.equal(output.values[0][0][0], plain.values[0][0][0])


def test_an_empty_instruction_is_legal(load, edit, small):
    assert edit(load("edit"), picture(64, 64), text="").values[0][0][0].shape[1] > 0


@pytest.mark.parametrize("size", ["published", "pixel_aligned", "custom"])
def test_a_picture_of_an_extreme_shape_is_refused(load, edit, size):
    with pytest.raises(ValueError, match=r"sides of 1:256 \(width to height\).* reads up to 200:1. Crop it"):
        edit(load("edit"), picture(16, 4096), size=size, custom=(64, 64))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (17, 33), (160, 9)])
def test_odd_pictures_are_edited(nodes, load, vae, edit, small, width, height):
    model = load("edit")
    *prompts, latent = edit(model, picture(width, height), size="pixel_aligned").values
    made = value(sampled(nodes, model, prompts, latent))
    assert value(nodes.VAEDecode.execute(made, vae, *PLAIN)).shape == (1, height, width, 3)


@pytest.mark.parametrize(
    ("variant", "pictures", "message"),
    [
        ("edit", 2, r"Qwen-Image-Edit takes 1 picture, got 2 .*Edit-2509 and Edit-2511 take up to 3"),
        ("edit-2509", 4, r"Qwen-Image-Edit-2509 takes 1 to 3 pictures, got 4"),
        ("t2i", 1, "This model is Qwen-Image, which makes pictures from text alone: load a Qwen-Image-Edit file"),
    ],
)
def test_more_pictures_than_the_model_takes_are_refused(load, edit, variant, pictures, message):
    with pytest.raises(ValueError, match=message):
        edit(load(variant), picture(64, 64, count=pictures))


def test_references_in_a_text_to_image_model_are_refused(nodes, load, model, edit, small):
    *prompts, latent = edit(load("edit"), picture(64, 64)).values
    with pytest.raises(
        ValueError, match=r"The positive conditioning has 1 reference .* this model is Qwen-Image, which"
    ):
        sampled(nodes, model, prompts, latent)


def test_more_references_than_the_sampler_s_model_takes_are_refused(nodes, load, edit, small):
    *prompts, latent = edit(load("edit-2509"), picture(64, 64, count=2)).values
    with pytest.raises(ValueError, match="has 2 reference pictures, and Qwen-Image-Edit takes 1"):
        sampled(nodes, load("edit"), prompts, latent)


def test_a_wan_model_can_t_edit(nodes, edit):
    wan = value(nodes.LoadWanModel.execute("tiny.safetensors", "auto"))
    with pytest.raises(
        ValueError, match="The model is wan21 custom, which can't edit pictures: connect Load Qwen-Image"
    ):
        edit(wan, picture(64, 64))


def test_prompts_of_the_other_family_are_refused(nodes, model, prompts):
    wan = value(nodes.LoadWanModel.execute("tiny.safetensors", "auto"))
    encoder = value(nodes.LoadWanTextEncoder.execute("tiny.safetensors", "cpu", 0.0, "auto"))
    theirs = nodes.WanTextEncode.execute(encoder, "a red star", "").values
    with pytest.raises(ValueError, match=r"of width 32, expected 48: .*Qwen2.5-VL-7B"):
        sampled(nodes, model, theirs, empty(nodes))
    clip = value(nodes.EmptyWanLatent.execute(32, 32, 5, 1))
    with pytest.raises(ValueError, match=r"of width 48, expected 32: .*umT5"):
        sampled(nodes, wan, prompts, clip)


def test_an_edit_in_a_wan_model_is_refused(nodes, load, edit, small):
    wan = value(nodes.LoadWanModel.execute("tiny.safetensors", "auto"))
    *prompts, latent = edit(load("edit"), picture(64, 64)).values
    with pytest.raises(ValueError, match="of width 48, expected 32"):
        sampled(nodes, wan, prompts, latent)


def test_a_clip_is_refused(nodes, model, prompts):
    clip = value(nodes.EmptyWanLatent.execute(32, 32, 9, 1))
    with pytest.raises(ValueError, match="The latent has 3 frames, and Qwen-Image makes one picture"):
        sampled(nodes, model, prompts, clip)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 1, 7, 8)])
def test_latents_of_another_model_are_refused(nodes, model, prompts, shape):
    with pytest.raises(ValueError, match="The sampler got a latent of shape"):
        sampled(nodes, model, prompts, {"samples": torch.zeros(shape)})


def test_a_vae_of_another_model_is_refused(nodes, load, text_encoder):
    class ImageVAE:
        latent_dim, latent_channels = 2, 4

    with pytest.raises(ValueError, match="This VAE is for other models"):
        nodes.InpaintLatent.execute(picture(32, 32), torch.ones(1, 32, 32), ImageVAE(), 8)
    with pytest.raises(ValueError, match="This VAE is for other models"):
        nodes.QwenImageEditEncode.execute(
            load("edit"), text_encoder, ImageVAE(), picture(32, 32), "", " ", "published", 0, 0
        )


def test_a_reference_latent_of_another_model_is_refused(nodes, load, prompts):
    given = [[[rows, {"reference_latents": [torch.zeros(1, 4, 8, 8)]}]] for [[rows, _]] in prompts]
    with pytest.raises(ValueError, match="reference latent of the conditioning has 4 channels"):
        sampled(nodes, load("edit"), given, empty(nodes))


def test_an_edited_latent_that_was_resized_is_refused(nodes, load, vae, edit, small):
    model = load("edit")
    *_, latent = edit(model, picture(50, 35), size="pixel_aligned").values
    resized = latent | {"samples": torch.randn(1, 16, 1, 12, 16)}
    with pytest.raises(ValueError, match=r"decodes to 128 x 96 pixels.*laid out for 64 x 48: was it resized"):
        nodes.VAEDecode.execute(resized, vae, *PLAIN)
