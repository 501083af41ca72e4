"""Our models as ComfyUI's MODEL, under its own samplers, against our own sampler at the same noise levels."""

from dataclasses import replace
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from wanqwen.core import planning, runtime
from wanqwen.core.memory import resident
from wanqwen.core.types import Conditioning, MemoryOptions, ModelHandle, SampleRequest
from wanqwen.loading import DEMO_FOLDER, load_model
from wanqwen.nodes.stock_model import stock_model

# Of the latents' spread: an Euler step is x + dt v here and x + dt (x - (x - sigma v)) / sigma there. After one step
# they are 1e-6 apart, and what the model makes of that in four more is 2e-5.
ROUNDING = 1e-4
LEVELS = torch.tensor((1.0, 0.9, 0.75, 0.5, 0.2, 0.0))
SHAPES = {"wan_dit": (1, 16, 3, 8, 8), "qwen_dit": (1, 16, 1, 8, 8), "qwen_edit_dit": (1, 16, 1, 8, 8)}


def demo(name: str, **changes: Any) -> ModelHandle:
    return replace(load_model(DEMO_FOLDER / f"{name}.safetensors"), **changes)


def prompts(handle: ModelHandle) -> list[torch.Tensor]:
    """A long prompt and a short one."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, rows, handle.identity.config.text_dim, generator=generator) for rows in (7, 4)]


def ours(handle: ModelHandle, guidance: float, **changes: Any) -> torch.Tensor:
    positive, negative = (Conditioning(text=rows) for rows in prompts(handle))
    name = handle.checkpoint.path.stem
    request = SampleRequest(
        latent=torch.zeros(SHAPES[name]), positive=positive, negative=negative, sigmas=tuple(LEVELS.tolist()), seed=5,
        guidance=(guidance,), solver="euler",
    )  # fmt: skip
    return runtime.generate(handle, replace(request, **changes))


def theirs(
    model: Any, guidance: float, sampler: str = "euler", callback: Any = None, options: Any = None, shape: Any = None
) -> torch.Tensor:
    handle = model.model.handle
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*([[rows, {"pooled_output": None} | (options or {})]] for rows in prompts(handle)))
    guider.set_cfg(guidance)
    latent = torch.zeros(shape or SHAPES[handle.checkpoint.path.stem])
    noise = comfy.sample.prepare_noise(latent, 5)
    solver = comfy.samplers.sampler_object(sampler)
    levels = LEVELS.clone()  # uni_pc writes into what it is given
    made = guider.sample(noise, latent, solver, levels, callback=callback, disable_pbar=True, seed=5)
    assert not model.model.is_running and model.loaded_size() == 0
    return made.cpu()


def are_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() < ROUNDING * other.std())


def fails(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def test_euler_gives_what_our_sampler_gives() -> None:
    for name in SHAPES:
        handle = demo(name)
        model = stock_model(handle, 3.0)
        for guidance in (1.0, 4.0):
            assert are_near(theirs(model, guidance), ours(handle, guidance)), (name, guidance)
        assert not are_near(ours(handle, 1.0), ours(handle, 4.0))


def test_a_batch_is_made_together() -> None:
    handle = demo("wan_dit")
    made = theirs(stock_model(handle, 3.0), 4.0, shape=(2, 16, 3, 8, 8))
    assert made.shape == (2, 16, 3, 8, 8) and are_near(made[:1], ours(handle, 4.0))
    assert not are_near(made[:1], made[1:])


def test_its_other_samplers_run() -> None:
    model = stock_model(demo("wan_dit"), 3.0)
    euler = theirs(model, 4.0)
    for name in ("heun", "dpmpp_2m", "uni_pc", "lcm", "res_multistep", "dpmpp_sde"):
        made = theirs(model, 4.0, name)
        assert made.isfinite().all() and not are_near(made, euler), name


def test_each_step_is_told_with_the_picture_so_far() -> None:
    seen = []
    theirs(stock_model(demo("wan_dit"), 3.0), 4.0, callback=lambda step, x0, x, total: seen.append((step, total, x0)))
    assert [(step, total) for step, total, _ in seen] == [(i, 5) for i in range(5)]
    assert seen[0][2].shape == SHAPES["wan_dit"]


def test_blocks_stream_beneath_with_the_same_bits() -> None:
    handle = demo("wan_dit")
    whole = theirs(stock_model(handle, 3.0), 4.0)
    streamed = replace(handle, memory=MemoryOptions(swapped=3, source="staged"), weights=type(handle.weights)())
    resident.computes_in_ram = lambda device: False
    runtime.machine_of = lambda device: replace(planning.machine_of(device), needs_pinning=True)
    model, held = stock_model(streamed, 3.0), []
    try:
        made = theirs(model, 4.0, callback=lambda *_: held.append(model.loaded_size()))
    finally:
        resident.computes_in_ram, runtime.machine_of = lambda device: device.type == "cpu", planning.machine_of
    assert torch.equal(made, whole)
    assert runtime.loaded_of(streamed, torch.float32).kept_bytes > 0
    assert len(set(held)) == 1 and held[0] > 0, "ComfyUI sees what the run takes"


def test_loras_go_with_it_and_work_in_their_steps() -> None:
    from wanqwen.core.types import Lora
    from wanqwen.core.weights.reader import open_checkpoint

    path = DEMO_FOLDER / "wan_dit.safetensors"
    name = "blocks.0.ffn.2.bias"
    lora = Lora(checkpoint=open_checkpoint(path), parts={name: {"diff": name}}, strength=9.0, start=0.4, end=0.8)
    plain = demo("wan_dit")
    handle = replace(plain, loras=(lora,))
    made = theirs(stock_model(handle, 3.0), 4.0)
    assert are_near(made, ours(handle, 4.0)) and not are_near(made, ours(plain, 4.0))


def test_a_patch_of_the_noise_levels_is_a_copy_s_own() -> None:
    model = stock_model(demo("wan_dit"), 3.0)
    [patched] = ModelSamplingSD3().patch(model, 9.0)
    for one, shift in ((model, 3.0), (patched, 9.0)):
        sigmas = comfy.samplers.calculate_sigmas(one.get_model_object("model_sampling"), "simple", 4)
        assert abs(float(sigmas[2]) - shift * 0.5 / (1 + (shift - 1) * 0.5)) < 1e-6
    assert torch.equal(theirs(patched, 4.0), theirs(model, 4.0)), "at the same noise levels"


def test_what_changes_its_inside_is_refused_by_name() -> None:
    model = stock_model(demo("wan_dit"), 3.0)
    assert "LoRA (WanQwen)" in fails(lambda: comfy.sd.load_lora_for_models(model, None, {}, 1.0, 0.0))
    patched = model.clone()
    patched.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, v))
    assert "changes the inside of this model (patches)" in fails(lambda: theirs(patched, 4.0))
    assert "control" in fails(lambda: theirs(model, 4.0, options={"control": Control()}))
    assert "can't be saved" in fails(model.model.state_dict_for_saving)
    theirs(model, 4.0)


class Control:
    """As much of a ControlNet as ComfyUI looks at before it asks the model."""

    extra_hooks = previous_controlnet = None

    def get_extra_hooks(self) -> list[Any]:
        return []

    def get_models(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: Any) -> int:
        return 0

    def pre_run(self, *_: Any) -> None:
        pass

    def cleanup(self) -> None:
        pass


def test_what_does_not_fit_is_said_as_by_our_sampler() -> None:
    model = stock_model(demo("wan_i2v_dit"), 3.0)
    assert "has no encoded picture" in fails(lambda: theirs(model, 4.0, shape=(1, 16, 3, 8, 8)))
    model = stock_model(demo("qwen_dit"), 3.0)
    reference = {"reference_latents": [torch.zeros(1, 16, 1, 8, 8)]}
    assert "this model is Qwen-Image" in fails(lambda: theirs(model, 4.0, options=reference))


def test_an_interrupt_stops_it_within_a_block_and_the_next_run_works() -> None:
    handle = demo("wan_dit")
    model = stock_model(handle, 3.0)
    wanted, blocks = theirs(model, 4.0), []
    original = runtime.Stopwatch.before

    def before(self: Any, i: int) -> None:
        blocks.append(i)
        if len(blocks) == 3:
            management.interrupt_current_processing()
        original(self, i)

    runtime.Stopwatch.before = before
    try:
        theirs(model, 4.0)
        raise AssertionError("it went on")
    except management.InterruptProcessingException:
        pass
    finally:
        runtime.Stopwatch.before = original
    assert len(blocks) == 3 and not model.model.is_running
    assert torch.equal(theirs(model, 4.0), wanted)


def test_many_models_leave_nothing_behind() -> None:
    handle = demo("qwen_dit")
    for _ in range(5):
        theirs(stock_model(handle, 3.0), 4.0)
    assert sum(isinstance(model.model, type(stock_model(handle, 3.0).model)) for model in alive()) <= 1


def alive() -> list[Any]:
    """What ComfyUI still lists, after it has looked."""
    management.cleanup_models()
    return [model for model in management.loaded_models() if model is not None]


def test_unloading_models_between_runs_is_harmless() -> None:
    model = stock_model(demo("wan_dit"), 3.0)
    before = theirs(model, 4.0)
    management.unload_all_models()
    assert torch.equal(theirs(model, 4.0), before)
