"""What core asks of the family: velocities of several conditionings."""

from dataclasses import replace

import pytest
import torch
from wanqwen.core.blocks import Run
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.types import Conditioning, Identity
from wanqwen.wan.config import WanConfig
from wanqwen.wan.family import check, denoiser, keep_float32, planned, schedule
from wanqwen.wan.transformer import WanTransformer

CPU = torch.device("cpu")
META = torch.device("meta")
CONFIG = WanConfig(dim=48, ffn_dim=112, num_heads=3, num_layers=2, freq_dim=32, text_dim=40)


PICTURE = replace(CONFIG, in_dim=36, image_dim=24)
TWO_PICTURES = replace(PICTURE, image_positions=514)


def made(dtype: torch.dtype = torch.float32, config: WanConfig = CONFIG) -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = 0.3 * torch.randn_like(parameter).to(torch.float32 if keep_float32(name) else dtype)
    return model


def conditionings(*rows: int, width: int = 40) -> list[Conditioning]:
    """Return texts of so many rows; equal numbers give equal texts."""
    return [Conditioning(text=torch.randn(1, n, width, generator=torch.Generator().manual_seed(n))) for n in rows]


class Order:
    """Notes which block is used by which call."""

    def __init__(self) -> None:
        self.visits: list[int] = []

    def before(self, i: int) -> None:
        self.visits.append(i)

    def after(self, i: int) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_taken_together_have_the_bits_of_each_alone(dtype: torch.dtype) -> None:
    model, x, t = made(dtype), torch.randn(2, 16, 3, 4, 6), torch.tensor([400.0, 90.0])
    with torch.inference_mode():
        denoise = denoiser(model, Run(dtype=dtype), conditionings(7, 4, 7), CPU)
        alone = [denoise(x, t, (k,))[0] for k in (0, 1, 2)]
        for which in ((0, 1), (2, 0, 1), (1, 2)):
            together = denoise(x, t, which)
            assert all(torch.equal(v, alone[k]) for k, v in zip(which, together, strict=True))
    assert torch.equal(alone[0], alone[2]) and not torch.equal(alone[0], alone[1])


def test_passes_taken_together_visit_each_block_once() -> None:
    order, x, t = Order(), torch.randn(1, 16, 1, 4, 6), torch.tensor([400.0])
    denoise = denoiser(made(), Run(hooks={"blocks": (order,)}), conditionings(7, 4), CPU)
    denoise(x, t, (0, 1))
    assert order.visits == [0, 1]


def test_equal_texts_share_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made(), []
    original = model.prompt
    monkeypatch.setattr(model, "prompt", lambda *a: calls.append(1) or original(*a))
    denoiser(model, Run(), conditionings(7, 4, 7), CPU)
    assert len(calls) == 2


def test_the_memory_of_both_ways_is_traced_without_a_device() -> None:
    """Taken together, a second pass adds its stream of two units, a unit being the tokens in bfloat16."""
    with META:
        model = WanTransformer(WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=2)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep_float32(name) else torch.bfloat16)
    x, t, unit = torch.empty(1, 16, 21, 60, 104, device=META), torch.tensor([500.0]), 32760 * 5120 * 2

    def step(*walks: tuple[int, ...]) -> int:
        def call() -> None:
            denoise = denoiser(model, Run(dtype=torch.bfloat16), conditionings(9, 5, width=4096), META)
            for which in walks:
                assert [v.shape for v in denoise(x, t, which)] == [x.shape] * len(which)

        return peak_bytes(call, META)

    one, both, together = step((0,)), step((0,), (1,)), step((0, 1))
    assert one <= 6 * unit and one <= both < one + unit / 10
    assert both + 1.9 * unit < together < both + 2.1 * unit


# Pictures


def pictured(*rows: int) -> list[Conditioning]:
    """Return texts of so many rows, all with one picture."""
    image, extra = torch.randn(1, 257, 24), torch.randn(1, 20, 3, 4, 6)
    return [replace(text, image=image, extra=extra) for text in conditionings(*rows)]


@pytest.mark.parametrize("part", ["text", "image", "extra"])
def test_every_part_of_a_prompt_with_a_picture_counts_and_is_shared_where_equal(part: str) -> None:
    model, x, t = made(config=PICTURE), torch.randn(2, 16, 3, 4, 6), torch.tensor([400.0, 90.0])
    first, twin, other = pictured(7, 7, 7)
    other = replace(other, **{part: torch.randn_like(getattr(other, part))})
    with torch.inference_mode():
        denoise = denoiser(model, Run(), [first, twin, other], CPU)
        of_first, of_twin, of_other = denoise(x, t, (0, 1, 2))
    assert torch.equal(of_first, of_twin)
    # By mistake shared, it would have the same bits; rounding alone differs by less than this.
    assert (of_first - of_other).abs().max() > 1e-5 * of_first.abs().max()


def test_passes_with_a_picture_taken_together_have_the_bits_of_each_alone() -> None:
    model, x, t = made(torch.bfloat16, PICTURE), torch.randn(1, 16, 3, 4, 6), torch.tensor([400.0])
    with torch.inference_mode():
        denoise = denoiser(model, Run(dtype=torch.bfloat16), pictured(7, 4), CPU)
        for v, k in zip(denoise(x, t, (1, 0)), (1, 0), strict=True):
            assert torch.equal(v, denoise(x, t, (k,))[0])


@pytest.mark.parametrize("config", [CONFIG, PICTURE, TWO_PICTURES, replace(CONFIG, in_dim=36)])
def test_a_planned_prompt_has_what_the_model_takes(config: WanConfig) -> None:
    prompt = planned(config, (1, 16, 3, 4, 6), *conditionings(7))
    denoise = denoiser(made(config=config), Run(), [prompt], CPU)
    assert denoise(torch.randn(1, 16, 3, 4, 6), torch.tensor([400.0]), (0,))[0].shape == (1, 16, 3, 4, 6)


@pytest.mark.parametrize(
    ("config", "size", "shift"),
    [
        (CONFIG, (60, 104), 5.0),
        (CONFIG, (90, 160), 5.0),
        (PICTURE, (60, 104), 3.0),
        (PICTURE, (104, 60), 3.0),
        (PICTURE, (58, 104), 5.0),
        (PICTURE, (90, 160), 5.0),
        (replace(CONFIG, in_dim=36), (60, 104), 3.0),  # of Wan 2.2, which has no image encoder
        (TWO_PICTURES, (90, 160), 16.0),
        (TWO_PICTURES, (60, 104), 16.0),
    ],
)
def test_the_schedule_is_the_published_one_of_each_kind_and_size(config, size, shift) -> None:
    assert schedule(config, (1, 16, 21, *size)).shift == shift


@pytest.mark.parametrize(
    ("config", "begins"),
    [(CONFIG, "色调艳丽"), (PICTURE, "镜头晃动，色调艳丽"), (TWO_PICTURES, "镜头切换，镜头晃动，色调艳丽")],
)
def test_the_negative_prompt_is_the_official_one_of_each_kind(config, begins) -> None:
    assert config.negative_prompt.startswith(begins) and config.negative_prompt.endswith("倒着走")


def test_rows_of_one_picture_take_the_first_positions_of_two() -> None:
    model, run = made(config=TWO_PICTURES), Run()
    rows, text = torch.randn(1, 257, 24), torch.randn(1, 3, 40)
    extra = torch.randn(1, 20, 1, 4, 4)
    one = model.prompt(text, run, None, rows, extra).image_BSE
    both = model.prompt(text, run, None, torch.cat((rows, rows), dim=1), extra).image_BSE
    assert torch.equal(one, both[:, :257]) and not torch.equal(one, both[:, 257:])


def identity(variant: str, config: WanConfig) -> Identity:
    return Identity(
        family="wan21", role="diffusion_model", variant=variant, weight_format="fp32", spelling="official",
        config=config, names={},
    )  # fmt: skip


def test_vace_is_not_even_planned() -> None:
    with pytest.raises(ValueError, match=r"vace-14B.*Choose such a file"):
        check(identity("vace-14B", CONFIG), to_plan=True)
