"""The nodes that start from pictures, alone and in front of the sampler."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from wanqwen.loading import DEMO_FOLDER, load_model, load_text_encoder, load_vae
from wanqwen.wan.conditioning import from_comfy, to_comfy
from wanqwen.wan.config import WanConfig
from wanqwen.wan.pictures import known_frames

from . import tiny

WIDTH, HEIGHT, FRAMES = 48, 32, 9
CLIP = {"width": WIDTH, "height": HEIGHT, "frames": FRAMES, "batch_size": 1, "fit": "cover"}
SETTINGS = {"seed": 1, "steps": 2, "guidance": 2.0, "shift": 0.0, "solver": "euler", "denoise": 1.0}
I2V = replace(tiny.MODEL, in_dim=36, image_dim=24)
FLF2V = replace(I2V, image_positions=514)
SHOWN = "a red {} moving {} on a white background"


class Eye:
    """An image encoder as ComfyUI hands it around; its rows are the picture's mean colour, and its size."""

    def encode_image(self, image: torch.Tensor, crop: bool) -> SimpleNamespace:
        assert not crop
        rows = torch.zeros(len(image), 257, 24)
        rows[:, :, :3] = image[..., :3].mean((1, 2))[:, None]
        rows[:, :, 3], rows[:, :, 4] = image.shape[1], image.shape[2]
        return SimpleNamespace(penultimate_hidden_states=rows)


@pytest.fixture
def vae(nodes):
    return nodes.LoadWanVAE.execute("tiny.safetensors", "auto").values[0]


@pytest.fixture
def prompts(nodes):
    encoder = nodes.LoadWanTextEncoder.execute("tiny.safetensors", "cpu", 0.0, "auto").values[0]
    positive, negative = nodes.WanTextEncode.execute(encoder, "a red star moving right", "blue").values
    return {"positive": positive, "negative": negative}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pictures")

    def load(config: WanConfig, name: str):
        path = folder / f"{name}.safetensors"
        return load_model(path if path.exists() else tiny.write_model(path, config))

    return load


def sampled(nodes, model, values, **options) -> torch.Tensor:
    positive, negative, latent = values
    settings = SETTINGS | {"negative": negative} | options
    return nodes.Sampler.execute(model, positive, latent, **settings).values[0]["samples"]


def picture(seed: int, *size: int) -> torch.Tensor:
    return torch.rand(*(size or (1, HEIGHT, WIDTH)), 3, generator=torch.Generator().manual_seed(seed))


def read(conditioning, config: WanConfig = I2V):
    [prompt] = from_comfy(conditioning, config)
    return prompt


# Wan Size from Image


@pytest.mark.parametrize(
    ("area", "megapixels", "size"), [("480p", 9.0, (832, 464)), ("720p", 9.0, (1280, 720)), ("custom", 0.02, (176, 96))]
)
def test_the_proposed_size_has_the_pixels_asked_for_in_the_picture_s_shape(nodes, area, megapixels, size):
    output = nodes.WanImageSize.execute(torch.zeros(1, 720, 1280, 3), area, megapixels)
    assert output.values == size
    assert output.ui == {"text": [f"{size[0]} x {size[1]}, of a picture of 1280 x 720"]}


# Wan Image to Video


def test_both_prompts_get_the_picture_and_the_latent_is_empty(nodes, vae, prompts):
    first = picture(0)
    output = nodes.WanImageToVideo.execute(
        vae=vae, image=first, clip_vision=Eye(), **prompts, **CLIP | {"batch_size": 2}
    )
    positive, negative, latent = output.values
    wanted = known_frames(vae, {0: first[0]}, FRAMES, HEIGHT, WIDTH).channels
    for conditioning, given in ((positive, prompts["positive"]), (negative, prompts["negative"])):
        assert torch.equal(read(conditioning).extra, wanted)
        assert torch.equal(read(conditioning).image, Eye().encode_image(first, crop=False).penultimate_hidden_states)
        assert torch.equal(read(conditioning).text, read(given).text) and "concat_mask" not in given[0][1]
    assert latent["samples"].shape == (2, 16, 3, 4, 6) and not latent["samples"].any()
    assert output.ui == {"text": ["48 x 32, 9 frames, the first one given"]}


def test_the_options_are_those_of_comfyui_s_own_nodes(nodes, vae, prompts):
    positive, _, _ = nodes.WanImageToVideo.execute(
        vae=vae, image=picture(0), clip_vision=Eye(), **prompts, **CLIP
    ).values
    options = positive[0][1]
    assert options["concat_latent_image"].shape == (1, 16, 3, 4, 6)
    assert torch.equal(options["concat_latent_image"][:, :, :1], vae.encode(picture(0)))
    assert options["concat_mask"][0, :, :, 0, 0].tolist() == [[0, 1, 1]] * 4
    assert options["clip_vision_output"].penultimate_hidden_states.shape == (1, 257, 24)


def test_the_image_encoder_sees_the_picture_at_its_own_size(nodes, vae, prompts):
    output = nodes.WanImageToVideo.execute(vae=vae, image=picture(0, 1, 90, 200), clip_vision=Eye(), **prompts, **CLIP)
    seen = read(output.values[0]).image
    assert seen[0, 0, 3:5].tolist() == [90, 200]
    [_, cut] = output.ui["text"]
    assert cut.startswith("200 x 90 became 48 x 32: 33% of it is cut off.")


def test_a_batch_is_the_first_frames_and_what_is_too_long_is_cut_aloud(nodes, vae, prompts):
    many = picture(0, 12, HEIGHT, WIDTH)
    output = nodes.WanImageToVideo.execute(vae=vae, image=many[:3], clip_vision=Eye(), **prompts, **CLIP)
    wanted = known_frames(vae, dict(enumerate(many[:3])), FRAMES, HEIGHT, WIDTH)
    assert torch.equal(read(output.values[0]).extra, wanted.channels)
    assert read(output.values[0]).image.shape == (1, 257, 24)
    assert output.ui["text"] == ["48 x 32, 9 frames, the first 3 given"]
    output = nodes.WanImageToVideo.execute(vae=vae, image=many, clip_vision=Eye(), **prompts, **CLIP)
    assert output.ui["text"][1] == "12 pictures, of which the first 9 are used."
    assert read(output.values[0]).extra[:, :4].eq(1).all()


def test_official_stretches_and_says_so(nodes, vae, prompts):
    wide = picture(0, 1, HEIGHT, 2 * WIDTH)
    one, other = (
        nodes.WanImageToVideo.execute(vae=vae, image=wide, **prompts, **CLIP | {"fit": fit})
        for fit in ("cover", "official")
    )
    assert other.ui["text"][1].startswith("96 x 32 became 48 x 32: it is stretched by 100%.")
    assert not torch.equal(read(one.values[0]).extra, read(other.values[0]).extra)


def test_without_an_encoder_or_a_negative_it_says_what_lacks(nodes, vae, prompts):
    output = nodes.WanImageToVideo.execute(positive=prompts["positive"], vae=vae, image=picture(0), **CLIP)
    positive, negative, _ = output.values
    assert negative is None and read(positive).image is None
    assert output.ui["text"][-1].startswith("No image encoder:")


def test_the_rows_of_comfyui_s_clip_vision_encode_do_as_well(nodes, vae, prompts):
    output = Eye().encode_image(torch.cat((picture(0), picture(1))), crop=False)
    given = {"vae": vae, "clip_vision_output": output, **prompts, **CLIP}
    one, *_ = nodes.WanImageToVideo.execute(image=picture(0), **given).values
    assert torch.equal(read(one).image, output.penultimate_hidden_states[:1])
    both, *_ = nodes.WanFirstLastFrameToVideo.execute(first_image=picture(0), last_image=picture(1), **given).values
    assert torch.equal(read(both).image, output.penultimate_hidden_states.flatten(0, 1)[None])
    ends = {"first_image": picture(0), "last_image": picture(1)}
    together = SimpleNamespace(penultimate_hidden_states=read(both).image)  # as ComfyUI's own node joins two of them
    again, *_ = nodes.WanFirstLastFrameToVideo.execute(**ends, **given | {"clip_vision_output": together}).values
    assert torch.equal(read(again).image, read(both).image)
    one_picture = Eye().encode_image(picture(0), crop=False)
    with pytest.raises(ValueError, match="has seen one picture, and a first and a last one are given"):
        nodes.WanFirstLastFrameToVideo.execute(**ends, **given | {"clip_vision_output": one_picture})
    with pytest.raises(ValueError, match="both connected: disconnect one"):
        nodes.WanImageToVideo.execute(image=picture(0), clip_vision=Eye(), **given)


def test_sizes_that_wan_cannot_make_are_corrected_aloud(nodes, vae, prompts):
    odd = CLIP | {"width": 50, "frames": 8}
    output = nodes.WanImageToVideo.execute(vae=vae, image=picture(0), clip_vision=Eye(), **prompts, **odd)
    assert output.values[2]["samples"].shape == (1, 16, 3, 4, 6)
    assert output.ui["text"][1:] == [
        "width 50 changed to 48: Wan needs a multiple of 16.",
        "frames 8 changed to 9: Wan makes 4n + 1 frames.",
    ]


def test_the_image_encoder_of_our_loader_serves(nodes, vae, prompts):
    encoder = nodes.LoadWanImageEncoder.execute("tiny.safetensors", "auto").values[0]
    first = picture(0, 1, 90, 200)
    positive, *_ = nodes.WanImageToVideo.execute(vae=vae, image=first, clip_vision=encoder, **prompts, **CLIP).values
    assert torch.equal(read(positive).image, encoder.encode(first, "official"))


# Wan First-Last Frame to Video


@pytest.mark.parametrize(
    ("ends", "given", "said"),
    [
        (
            {"first_image": 1, "last_image": 1},
            {0: ("first_image", 0), 8: ("last_image", 0)},
            "the first one and the last",
        ),
        ({"last_image": 1}, {8: ("last_image", 0)}, "the last one given"),
        ({"first_image": 1}, {0: ("first_image", 0)}, "the first one given"),
        (
            {"first_image": 2, "last_image": 2},
            {0: ("first_image", 0), 1: ("first_image", 1), 7: ("last_image", 0), 8: ("last_image", 1)},
            "the first 2 and the last 2 given",
        ),
    ],
)
def test_each_end_is_where_it_belongs(nodes, vae, prompts, ends, given, said):
    pictures = {name: picture(i, count, HEIGHT, WIDTH) for i, (name, count) in enumerate(ends.items())}
    output = nodes.WanFirstLastFrameToVideo.execute(vae=vae, clip_vision=Eye(), **pictures, **prompts, **CLIP)
    frames = {i: pictures[name][k] for i, (name, k) in given.items()}
    prompt = read(output.values[0], FLF2V)
    assert torch.equal(prompt.extra, known_frames(vae, frames, FRAMES, HEIGHT, WIDTH).channels)
    outer = [pictures[name][k] for name, k in (("first_image", 0), ("last_image", -1)) if name in pictures]
    colours = [p.mean((0, 1)) for p in outer]
    assert prompt.image.shape == (1, 257 * len(outer), 24)
    for rows, colour in zip(prompt.image[0].split(257), colours, strict=True):
        assert torch.allclose(rows[:, :3], colour)
    assert said in output.ui["text"][0]


def test_ends_of_other_sizes_both_cover_the_clip(nodes, vae, prompts):
    first, last = picture(0, 1, 90, 200), picture(1, 1, 64, 64)
    output = nodes.WanFirstLastFrameToVideo.execute(
        vae=vae, first_image=first, last_image=last, clip_vision=Eye(), **prompts, **CLIP
    )
    assert [line.split(":")[0] for line in output.ui["text"][1:]] == [
        "200 x 90 became 48 x 32",
        "64 x 64 became 48 x 32",
    ]
    alone, *_ = nodes.WanFirstLastFrameToVideo.execute(
        vae=vae, first_image=first, clip_vision=Eye(), **prompts, **CLIP
    ).values
    together = read(output.values[0]).extra
    assert torch.equal(together[:, :, 0], read(alone).extra[:, :, 0])


@pytest.mark.parametrize(
    ("pictures", "said"),
    [({}, "connect first_image, last_image, or both"), ({"first_image": 5, "last_image": 5}, "10 pictures are given")],
)
def test_no_pictures_and_more_than_fit_are_refused(nodes, vae, prompts, pictures, said):
    given = {name: picture(0, count, HEIGHT, WIDTH) for name, count in pictures.items()}
    with pytest.raises(ValueError, match=said):
        nodes.WanFirstLastFrameToVideo.execute(vae=vae, **given, **prompts, **CLIP)


# In front of the sampler


def test_a_picture_steers_an_i2v_model(nodes, vae, prompts, model_of):
    model = model_of(I2V, "i2v")

    def run(seed: int, eye: bool = True) -> torch.Tensor:
        given = {"clip_vision": Eye()} if eye else {}
        return sampled(
            nodes, model, nodes.WanImageToVideo.execute(vae=vae, image=picture(seed), **given, **prompts, **CLIP).values
        )

    assert run(0).shape == (1, 16, 3, 4, 6)
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    with pytest.raises(ValueError, match=r"i2v.safetensors: .* no rows of the image encoder.*Load Wan Image Encoder"):
        run(0, eye=False)


def test_two_pictures_steer_an_flf2v_model_and_their_order_counts(nodes, vae, prompts, model_of):
    def run(first: int, last: int) -> torch.Tensor:
        values = nodes.WanFirstLastFrameToVideo.execute(
            vae=vae, first_image=picture(first), last_image=picture(last), clip_vision=Eye(), **prompts, **CLIP
        ).values
        return sampled(nodes, model_of(FLF2V, "flf2v"), values)

    assert run(0, 1).shape == (1, 16, 3, 4, 6) and not torch.equal(run(0, 1), run(1, 0))


def test_without_guidance_no_negative_is_needed(nodes, vae, prompts, model_of):
    given = {"positive": prompts["positive"], "vae": vae, "image": picture(0), "clip_vision": Eye(), **CLIP}
    alone = sampled(nodes, model_of(I2V, "i2v"), nodes.WanImageToVideo.execute(**given).values, guidance=7.0)
    both = nodes.WanImageToVideo.execute(negative=prompts["negative"], **given).values
    assert torch.equal(alone, sampled(nodes, model_of(I2V, "i2v"), both, guidance=1.0))


def test_what_does_not_fit_is_said_before_weights_are_read(nodes, prompts, model_of, monkeypatch):
    from wanqwen.core import runtime

    monkeypatch.setattr(runtime, "opened", None)
    with pytest.raises(ValueError, match="no encoded picture"):
        sampled(nodes, model_of(I2V, "i2v"), (*prompts.values(), {"samples": torch.zeros(1, 16, 3, 4, 6)}))


def test_model_and_node_that_do_not_belong_together_say_what_would(nodes, vae, prompts, model_of):
    pictured = nodes.WanImageToVideo.execute(vae=vae, image=picture(0), clip_vision=Eye(), **prompts, **CLIP).values
    plain = (*prompts.values(), pictured[2])
    with pytest.raises(ValueError, match=r"t2v.safetensors: .*choose a file of image to video"):
        sampled(nodes, model_of(tiny.MODEL, "t2v"), pictured)
    with pytest.raises(ValueError, match=r"i2v.safetensors: .*put Wan Image to Video"):
        sampled(nodes, model_of(I2V, "i2v"), plain)
    longer = {"samples": torch.zeros(1, 16, 5, 4, 6)}
    with pytest.raises(ValueError, match="for 48 x 32 pixels, 9 frames, and the latent is 48 x 32 pixels, 17 frames"):
        sampled(nodes, model_of(I2V, "i2v"), (*pictured[:2], longer))


# Wan Video to Video


@pytest.mark.parametrize(
    ("asked", "shape", "said"),
    [
        ((0, 0, 0), (1, 16, 3, 4, 6), ["48 x 32, 9 frames."]),
        ((0, 0, 7), (1, 16, 2, 4, 6), ["48 x 32, 5 frames.", "The last 6 frames are left out"]),
        (
            (0, 0, 99),
            (1, 16, 3, 4, 6),
            ["48 x 32, 9 frames.", "99 frames were asked for, and the video has 11.", "The last 2 frames are left out"],
        ),
        ((96, 0, 0), (1, 16, 3, 8, 12), ["96 x 64, 9 frames.", "The last 2"]),
        ((0, 80, 0), (1, 16, 3, 10, 14), ["112 x 80, 9 frames."]),
        ((32, 32, 1), (1, 16, 1, 4, 4), ["32 x 32, 1 frames.", "58 x 40 became 32 x 32: 31% of it is cut off."]),
    ],
)
def test_a_video_is_encoded_in_the_size_asked_for(nodes, vae, asked, shape, said):
    output = nodes.WanVideoToVideo.execute(picture(0, 11, 40, 58), vae, *asked, "cover")
    assert output.values[0]["samples"].shape == shape
    for line in said:
        assert any(shown.startswith(line) for shown in output.ui["text"]), (line, output.ui)
    assert "Lower denoise" in output.ui["text"][0]


def test_a_video_that_fits_is_encoded_as_it_is(nodes, vae):
    video = picture(0, 9, HEIGHT, WIDTH)
    output = nodes.WanVideoToVideo.execute(video, vae, 0, 0, 0, "official")
    assert torch.allclose(output.values[0]["samples"], vae.encode(video), atol=1e-5)
    assert len(output.ui["text"]) == 1


@pytest.fixture(scope="module")
def demo():
    """Model, VAE and prompts of the miniature."""
    encoder = load_text_encoder(DEMO_FOLDER / "wan_text_encoder.safetensors", device="cpu")
    return (
        load_model(DEMO_FOLDER / "wan_dit.safetensors", torch.float32),
        load_vae(DEMO_FOLDER / "wan_vae.safetensors"),
        encoder.encode([SHOWN.format("circle", "right"), SHOWN.format("square", "left"), ""]),
    )


@pytest.mark.parametrize("frames", [1, 9])
def test_the_lower_denoise_the_more_of_a_clip_or_a_still_stays(nodes, demo, frames):
    """The clip is what the miniature makes of another prompt."""
    model, vae, texts = demo
    other, positive, negative = (to_comfy([text]) for text in texts)
    settings = {"steps": 8, "shift": 5.0, "guidance": 3.0}
    empty = nodes.EmptyWanLatent.execute(64, 64, frames, 1).values[0]
    made = sampled(nodes, model, (other, negative, empty), **settings)
    clip = nodes.VAEDecode.execute({"samples": made}, vae, "auto", 256, 64).values[0]
    assert clip.shape == (frames, 64, 64, 3) and clip.std() > 0.05
    start = nodes.WanVideoToVideo.execute(clip, vae, 0, 0, 0, "cover").values[0]
    given = nodes.VAEDecode.execute(start, vae, "auto", 256, 64).values[0]

    def changed(denoise: float) -> float:
        values = (positive, negative, start)
        found = sampled(nodes, model, values, **settings | {"denoise": denoise, "seed": 5})
        shown = nodes.VAEDecode.execute({"samples": found}, vae, "auto", 256, 64).values[0]
        return (shown - given).abs().mean().item()

    little, third, whole = (changed(denoise) for denoise in (0.02, 0.3, 1.0))
    assert little < 0.02 and 4 * little < third < whole, (little, third, whole)
