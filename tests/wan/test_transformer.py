"""The Wan transformer's promises beside the goldens (tests/goldens)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wanqwen.bench.measure import peak_bytes
from wanqwen.core.blocks import Run
from wanqwen.core.types import Conditioning
from wanqwen.wan.config import WanConfig
from wanqwen.wan.family import keep_float32, working_bytes
from wanqwen.wan.transformer import WanTransformer

CONFIG = WanConfig(dim=48, ffn_dim=112, num_heads=3, num_layers=2, freq_dim=32, text_dim=40)


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0)
    return model


def error(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).abs().max() / expected.abs().max()).item()


def inputs(rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 3, 6, 8, generator=generator)
    return x, torch.tensor([612.0]), torch.randn(1, rows, CONFIG.text_dim, generator=generator)


def test_keys_and_values_of_a_prompt_are_computed_once(model: WanTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    attention = type(model.blocks[0].cross_attn)
    original = attention.keys_values
    monkeypatch.setattr(attention, "keys_values", lambda self, rows: calls.append(self) or original(self, rows))
    x, timestep, text = inputs()
    prompt = model.prompt(text, Run())
    first = model(x, timestep, prompt, Run())
    assert len(calls) == CONFIG.num_layers
    assert torch.equal(model(x, timestep, prompt, Run()), first)
    assert len(calls) == CONFIG.num_layers, "the second forward computed them again"


def test_padding_rows_are_attended(model: WanTransformer) -> None:
    x, timestep, text = inputs()
    bare = model(x, timestep, model.prompt(text, Run(), torch.zeros(1, text.shape[1])), Run())
    assert error(bare, model(x, timestep, model.prompt(text, Run()), Run())) > 1e-2


def test_one_weighted_zero_row_stands_for_all_padding(model: WanTransformer) -> None:
    x, timestep, text = inputs()
    bias = torch.tensor([[0.0] * text.shape[1] + [math.log(CONFIG.text_len - text.shape[1])]])
    short = model.prompt(F.pad(text, (0, 0, 0, 1)), Run(), bias)
    assert error(model(x, timestep, short, Run()), model(x, timestep, model.prompt(text, Run()), Run())) < 2e-5


def test_one_prompt_serves_a_batch_of_latents(model: WanTransformer) -> None:
    x, _, text = inputs()
    batch, timesteps = torch.cat((x, x.flip(4))), torch.tensor([612.0, 87.5])
    together = model(batch, timesteps, model.prompt(text, Run()), Run())
    for i in range(2):
        alone = model(batch[i : i + 1], timesteps[i : i + 1], model.prompt(text, Run()), Run())
        assert error(together[i : i + 1], alone) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(model: WanTransformer, dtype: torch.dtype) -> None:
    x, timestep, text = inputs()
    exact = model(x, timestep, model.prompt(text, Run()), Run())
    out = model(x, timestep, model.prompt(text, Run(dtype=dtype)), Run(dtype=dtype))
    assert out.dtype == torch.float32
    assert error(out, exact) < 2e-2


def test_a_run_stops_between_blocks(model: WanTransformer) -> None:
    asked = []

    def interrupt() -> None:
        asked.append(None)
        if len(asked) == 2:
            raise InterruptedError

    x, timestep, text = inputs()
    run = Run(check_interrupt=interrupt)
    with pytest.raises(InterruptedError):
        model(x, timestep, model.prompt(text, run), run)
    assert len(asked) == 2


def test_too_many_text_rows_are_refused(model: WanTransformer) -> None:
    with pytest.raises(ValueError, match="at most 512 text rows, got 513"):
        model.prompt(torch.zeros(1, 513, CONFIG.text_dim), Run())


def test_odd_latents_are_refused(model: WanTransformer) -> None:
    _, timestep, text = inputs()
    with pytest.raises(ValueError, match="divide into patches"):
        model(torch.zeros(1, 16, 1, 5, 8), timestep, model.prompt(text, Run()), Run())


def test_no_float64_reaches_the_device(model: WanTransformer) -> None:
    """Angles are formed on the CPU: what comes back for any device is float32."""
    cos, sin = model.rope((2, 3, 4), torch.device("meta"))
    assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
    assert cos.shape == (24, CONFIG.dim // CONFIG.num_heads // 2)


def test_heads_must_fit_the_width() -> None:
    with pytest.raises(ValueError, match="does not split into 5 heads"):
        WanConfig(dim=48, ffn_dim=8, num_heads=5, num_layers=1)


@pytest.mark.parametrize(("dim", "ffn_dim"), [(96, 560), (96, 259)])  # the shares of the 1.3B and of the 14B
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_working_bytes_tell_the_measured_peak(dim: int, ffn_dim: int, dtype: torch.dtype) -> None:
    config = WanConfig(dim=dim, ffn_dim=ffn_dim, num_heads=3, num_layers=2, freq_dim=32, text_dim=40)
    model, run = WanTransformer(config).requires_grad_(False), Run(dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter).to(torch.float32 if keep_float32(name) else dtype)
    x = torch.randn(1, 16, 3, 32, 32)

    def step() -> None:
        prompts = [model.prompt(torch.randn(1, 9, 40), run) for _ in range(2)]
        for prompt in prompts:
            model(x, torch.tensor([500.0]), prompt, run)

    with torch.no_grad():
        peak = peak_bytes(step, torch.device("cpu"))
    conditionings = [Conditioning(text=torch.zeros(1, 9, 40))] * 2
    assert peak <= working_bytes(config, tuple(x.shape), conditionings, dtype) <= 1.5 * peak
