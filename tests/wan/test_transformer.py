"""The Wan transformer's promises beside the goldens (tests/goldens)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wanqwen.core.blocks import Run
from wanqwen.core.memory.trace import peak_bytes as traced_bytes
from wanqwen.core.ops.choice import EXACT
from wanqwen.core.ops.rows import row_chunks
from wanqwen.wan import transformer
from wanqwen.wan.config import WanConfig
from wanqwen.wan.family import keep_float32
from wanqwen.wan.transformer import Shared, WanTransformer

META = torch.device("meta")
CONFIG = WanConfig(dim=48, ffn_dim=112, num_heads=3, num_layers=2, freq_dim=32, text_dim=40)


def made(config: WanConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> WanTransformer:
    """Return a random model, stored as the runtime would store it for this compute dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0)
        parameter.data = parameter.data.to(torch.float32 if keep_float32(name) else dtype)
    return model


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return made(CONFIG)


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


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_in_place_has_the_bits_of_work_that_keeps_everything(dtype: torch.dtype) -> None:
    model, (x, timestep, text) = made(CONFIG, dtype), inputs()
    run, given = Run(dtype=dtype), x.clone()
    prompt = model.prompt(text, run)
    rows = prompt.rows_BSE.clone()
    kept = model(x, timestep, prompt, run)
    with torch.inference_mode():
        assert torch.equal(model(x, timestep, prompt, run), kept)
    assert torch.equal(x, given) and torch.equal(prompt.rows_BSE, rows)


@pytest.mark.parametrize("chunk_rows", [1, 5, 35])
def test_chunks_change_nothing_but_rounding(model: WanTransformer, chunk_rows: int) -> None:
    x, _, text = inputs()
    batch, timesteps = torch.cat((x, x.flip(4))), torch.tensor([612.0, 87.5])
    with torch.inference_mode():
        prompt = model.prompt(text, Run())
        whole = model(batch, timesteps, prompt, Run())
        assert error(model(batch, timesteps, prompt, Run(chunk_rows=chunk_rows)), whole) < 2e-6


def test_every_parameter_learns(model: WanTransformer) -> None:
    learner = WanTransformer(CONFIG)
    learner.load_state_dict(model.state_dict())
    x, timestep, text = inputs()
    learner(x, timestep, learner.prompt(text, Run()), Run()).square().mean().backward()
    assert not [name for name, p in learner.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_keys_and_values_are_not_kept_where_there_are_many_tokens(
    model: WanTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, timestep, text = inputs()
    kept = model(x, timestep, model.prompt(text, Run()), Run())
    monkeypatch.setattr(transformer, "TOKENS_THAT_KEEP_KEYS", 35)
    prompt = model.prompt(text, Run())
    for _ in range(2):
        assert torch.equal(model(x, timestep, prompt, Run()), kept)
    assert not prompt._keys_values


@pytest.mark.parametrize("size", [(832, 480), (1280, 720)])
def test_a_block_of_the_14b_takes_six_units_for_a_clip(size: tuple[int, int]) -> None:
    """A unit is the tokens in bfloat16; the stream, which is float32, takes two of them."""
    width, height = size
    config = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=1)
    model, grid = made(config, torch.bfloat16, META), (21, height // 16, width // 16)
    num_tokens = math.prod(grid)
    unit = num_tokens * config.dim * 2

    def step() -> None:
        shared = Shared(time_B6E=torch.empty(1, 6, config.dim, device=META), rope=model.rope(grid, META),
                        chunks=row_chunks(num_tokens), ops=EXACT)  # fmt: skip
        keys_values = [torch.empty(1, 512, 40, 128, dtype=torch.bfloat16, device=META) for _ in range(2)]
        model.blocks[0](torch.empty(1, num_tokens, config.dim, device=META), shared, [(*keys_values, None)])

    assert 5 * unit < traced_bytes(step, META) <= 6 * unit
