"""The promises of the VACE network beside its goldens: order of work, several controls, memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from wanqwen.core.blocks import Run
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.types import Conditioning, Control
from wanqwen.wan import transformer
from wanqwen.wan.config import WanConfig
from wanqwen.wan.family import denoiser, planned
from wanqwen.wan.transformer import WanTransformer
from wanqwen.wan.vace import VaceBlock

from .test_family import CPU, META, Order, conditionings, made

CONFIG = WanConfig(
    dim=48, ffn_dim=112, num_heads=3, num_layers=4, freq_dim=32, text_dim=40, vace_layers=(0, 1, 3), vace_dim=96
)
T = torch.tensor([400.0])


def clip() -> Tensor:
    return torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))


def controls(*strengths: float) -> tuple[Control, ...]:
    """Return controls of these strengths, each of its own content."""
    contexts = [torch.randn(1, 96, 3, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(len(strengths))]
    return tuple(Control(context=c, strength=s) for c, s in zip(contexts, strengths, strict=True))


def velocity(model: WanTransformer, *given: Control, dtype: torch.dtype = torch.float32) -> Tensor:
    [text] = conditionings(7)
    with torch.inference_mode():
        denoise = denoiser(model, Run(dtype=dtype), [replace(text, controls=given)], CPU)
        return denoise(clip(), T, (0,))[0]


def error(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def hints_first(model: WanTransformer, *given: Control) -> Tensor:
    """Return the velocity with all hints computed before the main blocks, from the clip's first tokens, and kept."""
    run, x = Run(), clip()
    prompt, seen = model.prompt(conditionings(7)[0].text, run), []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(x, T, prompt, run)
    handle.remove()
    [shared], first = seen, model.patch_embedding(x, run.dtype)
    hints = torch.zeros(len(model.vace_blocks), *first.shape)
    for control in given:
        context = model.vace_patch_embedding(control.context, run.dtype)
        tokens = model.vace_blocks[0].before_proj(context) + first
        for j, block in enumerate(model.vace_blocks):
            tokens = block(tokens.clone(), shared, [(*block.cross_attn.keys_values(prompt.rows_BSE), None)])
            hints[j] += control.strength * block.after_proj(tokens)
    tokens = first
    for i, block in enumerate(model.blocks):
        tokens = block(tokens, shared, [(*block.cross_attn.keys_values(prompt.rows_BSE), None)])
        if i in model.config.vace_layers:
            tokens = tokens + hints[model.config.vace_layers.index(i)]
    time_B1E = model.time_embedding(transformer.timestep_embedding(T, model.config.freq_dim))[:, None]
    return model.head(tokens, time_B1E, model.patch_embedding.grid(x), shared.chunks)


@pytest.mark.parametrize("strengths", [(1.0,), (0.6,), (1.0, 0.4), (-0.5, 2.0, 0.0)])
def test_hints_come_from_the_first_tokens_and_are_added_with_their_strengths(strengths: tuple[float, ...]) -> None:
    model, given = made(config=CONFIG), controls(*strengths)
    assert error(velocity(model, *given), hints_first(model, *given)) < 2e-6
    assert error(velocity(model, *given), hints_first(model)) > 1e-2


def test_a_control_of_strength_0_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, visited = made(config=CONFIG), []
    original = VaceBlock.forward
    monkeypatch.setattr(VaceBlock, "forward", lambda self, *a: visited.append(self) or original(self, *a))
    none = velocity(model, *controls(0.0, 0.0))
    assert not visited
    assert torch.equal(none, velocity(model))
    assert torch.equal(velocity(model, *controls(0.7, 0.0)), velocity(model, *controls(0.7)))
    assert len(visited) == 2 * 3


def test_each_vace_block_is_visited_right_after_the_block_that_it_guides() -> None:
    model = made(config=CONFIG)
    kinds = [isinstance(block, VaceBlock) for block in model.visits()]
    assert kinds == [False, True, False, True, False, False, True]
    order = Order()
    denoise = denoiser(model, Run(hooks=(order,)), [replace(*conditionings(7), controls=controls(1.0))], CPU)
    denoise(clip(), T, (0,))
    assert order.visits == list(range(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_with_controls_taken_together_have_the_bits_of_each_alone(dtype: torch.dtype) -> None:
    model = made(dtype, CONFIG)
    first, other = controls(1.0, 0.5)
    texts = [
        replace(text, controls=given)
        for text, given in zip(conditionings(7, 4, 7, 7), [(first,), (first, other), (other,), ()], strict=True)
    ]
    with torch.inference_mode():
        denoise = denoiser(model, Run(dtype=dtype), texts, CPU)
        alone = [denoise(clip(), T, (k,))[0] for k in range(4)]
        for which in ((0, 1), (3, 2, 1, 0)):
            together = denoise(clip(), T, which)
            assert all(torch.equal(v, alone[k]) for k, v in zip(which, together, strict=True))
    assert not torch.equal(alone[0], alone[2]) and not torch.equal(alone[0], alone[3])


def test_prompts_are_shared_only_where_their_controls_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made_prompts = made(config=CONFIG), []
    original = WanTransformer.prompt
    monkeypatch.setattr(WanTransformer, "prompt", lambda self, *a: made_prompts.append(a[-1]) or original(self, *a))
    [text], (one, two) = conditionings(7), controls(1.0, 1.0)
    copied = replace(one, context=one.context.clone())
    given = [(one,), (copied,), (two,), (replace(one, strength=0.9),), (one, two), ()]
    denoiser(model, Run(), [replace(text, controls=each) for each in given], CPU)
    assert len(made_prompts) == 5
    # What the prompts have in common is on the device once.
    assert made_prompts[0][0].context is made_prompts[2][0].context is made_prompts[3][0].context


def test_keys_and_values_of_both_kinds_of_blocks_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(config=CONFIG)
    kept = velocity(model, *controls(1.0, 0.5))
    monkeypatch.setattr(transformer, "TOKENS_THAT_KEEP_KEYS", 0)
    assert torch.equal(velocity(model, *controls(1.0, 0.5)), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_in_place_has_the_bits_of_work_that_keeps_everything(dtype: torch.dtype) -> None:
    model, given = made(dtype, CONFIG), controls(0.7, 1.0)
    contexts = [control.context.clone() for control in given]
    run = Run(dtype=dtype)
    kept = model(clip(), T, model.prompt(conditionings(7)[0].text, run, controls=given), run)
    assert torch.equal(velocity(model, *given, dtype=dtype), kept)
    assert all(torch.equal(c.context, before) for c, before in zip(given, contexts, strict=True))


@pytest.mark.parametrize("chunk_rows", [1, 5, 17])
def test_chunks_change_nothing_but_rounding(chunk_rows: int) -> None:
    model, given = made(config=CONFIG), controls(0.7, 1.0)
    run = Run(chunk_rows=chunk_rows)
    with torch.inference_mode():
        out = model(clip(), T, model.prompt(conditionings(7)[0].text, run, controls=given), run)
    assert error(out, velocity(model, *given)) < 2e-6


def test_one_control_serves_a_batch_of_latents() -> None:
    model, given, run = made(config=CONFIG), controls(0.7), Run()
    batch, times = torch.cat((clip(), clip().flip(4))), torch.tensor([400.0, 87.5])
    with torch.inference_mode():
        prompt = model.prompt(conditionings(7)[0].text, run, controls=given)
        together = model(batch, times, prompt, run)
        for i in range(2):
            assert error(together[i : i + 1], model(batch[i : i + 1], times[i : i + 1], prompt, run)) < 2e-6


def test_every_parameter_learns() -> None:
    model = made(config=CONFIG).requires_grad_(True)
    run = Run()
    prompt = model.prompt(conditionings(7)[0].text, run, controls=controls(1.0, 0.5))
    model(clip(), T, prompt, run).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("num_controls", [1, 2])
def test_a_control_of_the_14b_takes_its_tokens_and_no_more(num_controls: int) -> None:
    """A unit is the tokens of 480p in bfloat16, a stream two of them; the rest is a T2V model's own work."""
    grid, unit = (21, 60, 104), 21 * 30 * 52 * 5120 * 2
    config = replace(CONFIG, dim=5120, ffn_dim=13824, num_heads=40, num_layers=2, vace_layers=(0, 1), text_dim=4096)
    x = torch.empty(1, 16, *grid, device=META)

    def peak(config: WanConfig, given: int) -> int:
        with META:
            model = WanTransformer(config).bfloat16().requires_grad_(False)
        prompt = planned(config, tuple(x.shape), Conditioning(text=torch.zeros(1, 9, 4096)))
        prompt = replace(prompt, controls=prompt.controls * given)

        def step() -> None:
            denoiser(model, Run(dtype=torch.bfloat16), [prompt], META)(x, T, (0,))

        return peak_bytes(step, META)

    plain = peak(replace(config, vace_layers=(), vace_dim=0), 0)
    assert plain + 1.9 * num_controls * unit < peak(config, num_controls) < plain + 2.1 * num_controls * unit


def test_a_control_of_another_size_than_the_latent_is_an_error() -> None:
    model, [control] = made(config=CONFIG), controls(1.0)
    with pytest.raises(ValueError, match=r"latent is \(3, 4, 6\) .* control was encoded for \(2, 4, 6\)"):
        velocity(model, replace(control, context=control.context[:, :, :2]))


@pytest.mark.parametrize(("layers", "dim"), [((0, 4), 96), ((1, 0), 96), ((0, 0), 96), ((), 96), ((0,), 0)])
def test_vace_layers_are_blocks_of_the_model_in_order(layers: tuple[int, ...], dim: int) -> None:
    with pytest.raises(ValueError, match=f"controls of {dim} channels into the blocks .* some of the 4 blocks"):
        replace(CONFIG, vace_layers=layers, vace_dim=dim)
