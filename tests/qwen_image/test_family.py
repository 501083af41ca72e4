"""What core asks of the family: schedule, precision, velocities, memory."""

from dataclasses import replace

import pytest
import torch
from wanqwen.core.blocks import Run
from wanqwen.core.memory.trace import peak_bytes as traced_bytes
from wanqwen.core.sampling.schedule import plan_steps
from wanqwen.core.types import Conditioning, SampleRequest
from wanqwen.qwen_image.config import QwenImageConfig
from wanqwen.qwen_image.family import FAMILY, denoiser, keep_float32, mu_for_length, schedule
from wanqwen.qwen_image.transformer import QwenImageTransformer

CPU, META = torch.device("cpu"), torch.device("meta")
CONFIG = QwenImageConfig(num_layers=2, num_heads=2, dim=32, ffn_dim=64, text_dim=12, freq_dim=16, axes=(4, 6, 6))


def made(config: QwenImageConfig = CONFIG, dtype: torch.dtype = torch.float32) -> QwenImageTransformer:
    torch.manual_seed(0)
    model = QwenImageTransformer(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = 0.2 * torch.randn_like(parameter).to(torch.float32 if keep_float32(name) else dtype)
    return model


def text(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, num, 12, generator=torch.Generator().manual_seed(seed))


def request(**fields) -> SampleRequest:
    return SampleRequest(latent=torch.zeros(1, 16, 1, 4, 4), positive=Conditioning(text=text(3)), **fields)


@pytest.mark.parametrize(
    ("tokens", "mu"), [(64, 0.490322581), (256, 0.5), (4096, 0.693548387), (6889, 0.834325), (9216, 0.951612903)]
)
def test_mu_is_the_published_one(tokens, mu):
    assert mu_for_length(tokens) == pytest.approx(mu, abs=1e-6)


def test_the_schedule_of_1328_squared_is_the_published_one():
    plan = plan_steps(request(steps=50, solver="euler"), schedule(CONFIG, (1, 16, 1, 166, 166)))
    assert plan.sigmas[:3] == pytest.approx((1, 0.99099, 0.98177), abs=1e-5)
    assert plan.sigmas[-3:] == pytest.approx((0.06378, 0.02, 0), abs=1e-5)
    assert plan.timesteps[1] == pytest.approx(1000 * plan.sigmas[1], abs=1e-3)  # never rounded


@pytest.mark.parametrize(
    ("name", "sigmas"),
    [
        ("lightning-4", (1, 0.9, 0.75, 0.5, 0)),
        ("lightning-8", (1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0)),
    ],
)
def test_the_lightning_presets_are_the_published_tables(name, sigmas):
    preset = FAMILY.files.presets[name]
    asked = request(steps=preset.steps, shift=preset.shift, solver=preset.solver)
    plan = plan_steps(asked, schedule(CONFIG, (1, 16, 1, 128, 128)))
    assert plan.sigmas == pytest.approx(sigmas, abs=1e-6) and preset.guidance == 1


def test_the_layered_schedule_knows_neither_terminal_nor_exponential():
    layered = QwenImageConfig(layered=True)
    plan = plan_steps(request(steps=4, solver="euler"), schedule(layered, (1, 16, 5, 80, 80)))
    assert plan.sigmas == pytest.approx([2.5 * u / (1 + 1.5 * u) for u in (1, 0.75, 0.5, 0.25, 0)], abs=1e-6)
    assert FAMILY.guidance_patch(layered) is None and FAMILY.guidance_patch(CONFIG) == 2


def test_references_reach_the_transformer_normalised():
    model, x, t = made(), torch.randn(1, 16, 1, 4, 6), torch.tensor([400.0])
    reference = torch.randn(1, 16, 1, 2, 4)
    raw = FAMILY.latent_format.denormalise(reference)
    denoise = denoiser(model, Run(), [Conditioning(text=text(5), references=(raw,))], CPU)
    direct = model(x, t, model.prompt(text(5), Run()), Run(), references=(reference,))
    torch.testing.assert_close(denoise(x, t, (0,))[0], direct, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(direct, model(x, t, model.prompt(text(5), Run()), Run()), atol=1e-3)


def test_equal_prompts_are_embedded_once(monkeypatch):
    model, calls = made(), []
    original = model.prompt
    monkeypatch.setattr(model, "prompt", lambda *a: calls.append(1) or original(*a))
    denoiser(model, Run(), [Conditioning(text=text(5)), Conditioning(text=text(5))], CPU)
    assert len(calls) == 1


def test_both_passes_of_a_step_share_the_modulation(monkeypatch):
    model, x = made(), torch.randn(1, 16, 1, 4, 6)
    calls = []
    layer = model.transformer_blocks[0].img_mod[1]
    layer.register_forward_hook(lambda *_: calls.append(1))
    denoise = denoiser(model, Run(), [Conditioning(text=text(5)), Conditioning(text=text(3, 1))], CPU)
    for timestep in (900.0, 500.0):
        denoise(x, torch.tensor([timestep]), (0, 1))
        denoise(x, torch.tensor([timestep]), (1,))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_taken_together_have_the_bits_of_each_alone(dtype: torch.dtype) -> None:
    config = replace(CONFIG, zero_cond_t=True)
    model, x, t = made(config, dtype), torch.randn(2, 16, 1, 4, 6), torch.tensor([400.0, 90.0])
    pictures = (torch.randn(1, 16, 1, 2, 4), torch.randn(1, 16, 1, 8, 2))
    conditionings = [
        Conditioning(text=text(5), references=pictures), Conditioning(text=text(3, 1), references=pictures[:1]),
        Conditioning(text=text(5)),
    ]  # fmt: skip
    with torch.inference_mode():
        denoise = denoiser(model, Run(dtype=dtype), conditionings, CPU)
        alone = [denoise(x, t, (k,))[0] for k in (0, 1, 2)]
        for which in ((0, 1), (2, 0, 1), (1, 2)):
            together = denoise(x, t, which)
            assert all(torch.equal(v, alone[k]) for k, v in zip(which, together, strict=True))
    assert not torch.equal(alone[0], alone[2])


def test_text_of_another_encoder_is_refused():
    with pytest.raises(ValueError, match=r"width 12 .Qwen2.5-VL-7B., the conditioning has 40"):
        denoiser(made(), Run(), [Conditioning(text=torch.zeros(1, 3, 40))], CPU)


def test_float16_is_not_offered():
    assert torch.float16 not in FAMILY.dtypes


@pytest.mark.parametrize(("side", "references", "most"), [(166, (), 8.0), (128, (128, 128), 6.75)])
def test_the_memory_of_both_ways_is_traced_without_a_device(
    side: int, references: tuple[int, ...], most: float
) -> None:
    """Taken together, a second pass adds its streams of two units, a unit being all tokens in bfloat16."""
    with META:
        model = QwenImageTransformer(QwenImageConfig(num_layers=2)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep_float32(name) else torch.bfloat16)
    pictures = tuple(torch.zeros(1, 16, 1, size, size) for size in references)
    conditionings = [Conditioning(text=torch.full((1, 128, 3584), float(k)), references=pictures) for k in (0, 1)]
    x, t = torch.empty(1, 16, 1, side, side, device=META), torch.tensor([500.0])
    unit = (128 + sum(size * size // 4 for size in (side, *references))) * 3072 * 2

    def step(*walks: tuple[int, ...]) -> int:
        def call() -> None:
            denoise = denoiser(model, Run(dtype=torch.bfloat16), conditionings, META)
            for which in walks:
                assert [v.shape for v in denoise(x, t, which)] == [x.shape] * len(which)

        return traced_bytes(call, META)

    one, both, together = step((0,)), step((0,), (1,)), step((0, 1))
    assert one <= most * unit and one <= both < one + unit / 10
    assert both + 1.8 * unit < together < both + 2.1 * unit
