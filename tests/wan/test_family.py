"""What core asks of the family: velocities of several conditionings."""

import pytest
import torch
from wanqwen.core.blocks import Run
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.types import Conditioning
from wanqwen.wan.config import WanConfig
from wanqwen.wan.family import denoiser, keep_float32
from wanqwen.wan.transformer import WanTransformer

CPU = torch.device("cpu")
META = torch.device("meta")
CONFIG = WanConfig(dim=48, ffn_dim=112, num_heads=3, num_layers=2, freq_dim=32, text_dim=40)


def made(dtype: torch.dtype = torch.float32) -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(CONFIG).requires_grad_(False)
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
