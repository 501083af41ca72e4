"""Prompts to and from ComfyUI's CONDITIONING."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from wanqwen.core.blocks import Run
from wanqwen.core.types import Conditioning
from wanqwen.wan.conditioning import from_comfy, to_comfy, with_options
from wanqwen.wan.config import WanConfig
from wanqwen.wan.pictures import Known
from wanqwen.wan.transformer import WanTransformer
from wanqwen.wan.vae import LATENT_FORMAT

WIDTH = 12
CONFIG = WanConfig(dim=16, ffn_dim=16, num_heads=1, num_layers=1, text_dim=WIDTH)
PICTURE = replace(CONFIG, in_dim=36, image_dim=24)
TWO_PICTURES = replace(PICTURE, image_positions=514)


def rows(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, num, WIDTH, generator=torch.Generator().manual_seed(seed))


def fill(text: torch.Tensor, num: int = 512) -> torch.Tensor:
    return torch.cat((text, torch.zeros(1, num - text.shape[1], WIDTH)), dim=1)


def test_rows_of_the_stock_nodes_come_back_without_their_zeros():
    text = rows(7)
    [prompt] = from_comfy([[fill(text), {"pooled_output": None}]], CONFIG)
    assert torch.equal(prompt.text, text) and prompt.text.dtype == torch.float32


def test_there_and_back_is_the_same():
    prompts = [Conditioning(text=rows(5)), Conditioning(text=rows(512, 1))]
    given = to_comfy(prompts)
    assert [list(entry[0].shape) for entry in given] == [[1, 512, WIDTH]] * 2
    assert all(torch.equal(a.text, b.text) for a, b in zip(from_comfy(given, CONFIG), prompts, strict=True))
    given[1][0].zero_()
    assert prompts[1].text.abs().sum() > 0  # a copy: what nodes do to it in place never reaches our cache


def test_stock_conditioning_drives_the_transformer_like_ours():
    torch.manual_seed(0)
    config = WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=WIDTH, in_dim=4, out_dim=4)
    model = WanTransformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, run = torch.randn(1, 4, 1, 4, 4), torch.tensor([500.0]), Run()

    @torch.no_grad()
    def velocity(text: torch.Tensor) -> torch.Tensor:
        return model(x, t, model.prompt(text, run), run)

    text = rows(9)
    assert torch.equal(velocity(from_comfy([[fill(text), {}]], CONFIG)[0].text), velocity(text))
    scattered = torch.cat((fill(text[:, :4], 100), fill(text[:, 4:], 412)), dim=1)
    found = velocity(from_comfy([[scattered, {}]], CONFIG)[0].text)
    assert (found - velocity(scattered)).abs().max() < 1e-5 < (found - velocity(text[:, :8])).abs().max()
    zeroed = from_comfy([[torch.zeros(1, 512, WIDTH), {}]], CONFIG)[0]
    assert zeroed.text.shape == (1, 1, WIDTH)
    assert torch.equal(velocity(zeroed.text), velocity(torch.zeros(1, 512, WIDTH)))


def test_batches_masks_and_long_prompts(caplog):
    batch = torch.cat((fill(rows(3)), fill(rows(6, 1))))
    assert [prompt.text.shape[1] for prompt in from_comfy([[batch, {}], [rows(4), {}]], CONFIG)] == [3, 6, 4]
    mask = torch.tensor([[1, 1, 0, 0]])
    assert torch.equal(from_comfy([[rows(4), {"attention_mask": mask}]], CONFIG)[0].text, rows(4)[:, :2])
    with pytest.raises(ValueError, match=r"attention_mask of the conditioning is \[1, 4\], its rows \[1, 5\]"):
        from_comfy([[rows(5), {"attention_mask": mask}]], CONFIG)
    with caplog.at_level(logging.WARNING):
        [prompt] = from_comfy([[rows(700), {}]], CONFIG)
    assert torch.equal(prompt.text, rows(700)[:, :512])
    assert "700 text rows, Wan reads 512: the last 188" in caplog.text


def test_half_precision_becomes_float32():
    [prompt] = from_comfy([[rows(4).half(), {}]], CONFIG)
    assert torch.equal(prompt.text, rows(4).half().float())


@pytest.mark.parametrize(
    ("conditioning", "message"),
    [
        ([[torch.randn(1, 77, 768), {}]], "of width 768, expected 12: encode the prompt with the text encoder"),
        ([["text", {}]], "a str, expected 12"),
        ([], "at least one prompt"),
        (None, "at least one prompt"),
    ],
)
def test_other_encoders_and_wrong_sockets_are_refused(conditioning, message):
    with pytest.raises(ValueError, match=message):
        from_comfy(conditioning, CONFIG)


@pytest.mark.parametrize(
    "option", [{"mask": torch.ones(1, 8, 8)}, {"strength": 0.5}, {"start_percent": 0.2}, {"area": (1, 1, 0, 0)}]
)
def test_options_that_would_change_the_picture_are_refused(option):
    with pytest.raises(ValueError, match=f"option '{next(iter(option))}', which this sampler does not carry out"):
        from_comfy([[rows(3), option]], CONFIG)


def test_neutral_options_pass_and_unknown_ones_are_reported(caplog):
    neutral = {
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "pooled_output": torch.ones(1, 4),
        "hooks": None,
    }
    with caplog.at_level(logging.WARNING):
        from_comfy([[rows(3), neutral]], CONFIG)
        assert not caplog.records
        from_comfy([[rows(3), {"mystery": 1}]], CONFIG)
    assert "'mystery'" in caplog.text


# Pictures


def seen(*shape: int) -> SimpleNamespace:
    """What CLIP Vision Encode gives."""
    return SimpleNamespace(penultimate_hidden_states=torch.randn(*shape))


def known(num: int = 1) -> Known:
    mask = torch.zeros(num, 4, 3, 4, 6)
    mask[:, :, 0] = 1
    return Known(latents=torch.randn(num, 16, 3, 4, 6), mask=mask)


def test_what_was_encoded_comes_through_the_options_unchanged():
    given = known()
    prompts = with_options([[rows(3), {"pooled_output": None}]], given.options())
    [prompt] = from_comfy(prompts, PICTURE)
    assert torch.equal(prompt.extra, given.channels) and prompt.image is None and not prompt.references
    assert torch.equal(prompt.extra[:, 4:], LATENT_FORMAT.normalise(given.latents))


def test_options_are_added_to_a_copy():
    prompts = [[rows(3), {"pooled_output": None}], [rows(4), {"strength": 1.0}]]
    found = with_options(prompts, {"mystery": 1})
    assert [options for _, options in found] == [
        {"pooled_output": None, "mystery": 1},
        {"strength": 1.0, "mystery": 1},
    ]
    assert [options for _, options in prompts] == [{"pooled_output": None}, {"strength": 1.0}]


def test_the_mask_of_whole_latent_frames_covers_each_of_its_pixel_frames():
    mask = torch.ones(1, 1, 3, 4, 6)
    mask[:, :, 0] = 0  # as ComfyUI's WanImageToVideo says that the first is given
    [prompt] = from_comfy([[rows(3), known().options() | {"concat_mask": mask}]], PICTURE)
    assert torch.equal(prompt.extra[:, :4], known().mask)


@pytest.mark.parametrize(
    ("mask", "given"), [(None, 0), (torch.zeros(1, 1, 2, 4, 6), 2), (torch.zeros(1, 4, 5, 4, 6), 3)]
)
def test_a_mask_that_lacks_or_is_short_gives_nothing_where_it_is_not(mask, given):
    [prompt] = from_comfy([[rows(3), known().options() | {"concat_mask": mask}]], PICTURE)
    assert prompt.extra[:, :4, :given].eq(1).all() and not prompt.extra[:, :4, given:].any()


@pytest.mark.parametrize(
    ("config", "shape", "taken"),
    [
        (PICTURE, (1, 257, 24), (1, 257, 24)),
        (PICTURE, (1, 514, 24), (1, 514, 24)),  # of ComfyUI's WanFirstLastFrameToVideo
        (PICTURE, (5, 257, 24), (1, 257, 24)),
        (TWO_PICTURES, (2, 257, 24), (1, 514, 24)),
        (TWO_PICTURES, (3, 257, 24), (1, 514, 24)),
    ],
)
def test_image_rows_of_so_many_pictures(config, shape, taken):
    output = seen(*shape)
    [prompt] = from_comfy([[rows(3), {"clip_vision_output": output}]], config)
    assert prompt.image.shape == taken
    assert torch.equal(prompt.image, output.penultimate_hidden_states.flatten(0, 1)[None, : taken[1]])


def test_each_prompt_of_a_batch_has_its_own_pictures_or_all_the_same():
    batch, given, output = torch.cat((rows(3), rows(3, 1))), known(2), seen(2, 257, 24)
    options = given.options() | {"clip_vision_output": output}
    prompts = from_comfy([[batch, options]], PICTURE)
    for i, prompt in enumerate(prompts):
        assert torch.equal(prompt.extra, given.channels[i : i + 1])
        assert torch.equal(prompt.image, output.penultimate_hidden_states[i : i + 1])
    one = known()
    assert all(torch.equal(p.extra, one.channels) for p in from_comfy([[batch, one.options()]], PICTURE))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"concat_latent_image": torch.zeros(1, 32, 3, 4, 6)}, r"concat_latent_image is \[1, 32, 3, 4, 6\], expected"),
        (
            {"concat_mask": torch.ones(1, 1, 3, 4, 8)},
            r"concat_mask is \[1, 1, 3, 4, 8\], its concat_latent_image \[1, 16",
        ),
        (known(3).options(), r"concat_latent_image is a batch of 3 for 1 prompt.* Latent From Batch takes the one"),
        ({"clip_vision_output": seen(257, 24)}, r"CLIP vision output holds no rows .* but \(257, 24\)"),
        ({"concat_mask_index": 16}, "option 'concat_mask_index', which this sampler does not carry out"),
    ],
)
def test_pictures_of_a_shape_that_no_wan_node_gives_are_refused(option, said):
    with pytest.raises(ValueError, match=said):
        from_comfy([[rows(3), known().options() | option]], PICTURE)
