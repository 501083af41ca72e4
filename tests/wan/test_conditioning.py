"""Prompts to and from ComfyUI's CONDITIONING."""

import logging

import pytest
import torch
from wanqwen.core.blocks import Run
from wanqwen.core.types import Conditioning
from wanqwen.wan.conditioning import from_comfy, to_comfy
from wanqwen.wan.config import WanConfig
from wanqwen.wan.transformer import WanTransformer

WIDTH = 12
CONFIG = WanConfig(dim=16, ffn_dim=16, num_heads=1, num_layers=1, text_dim=WIDTH)


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
