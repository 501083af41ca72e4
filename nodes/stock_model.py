"""Our transformers as ComfyUI's own MODEL, for its samplers, schedulers and guiders. Weights stay with our runtime.

ComfyUI's side is a `ModelPatcher` around a `BaseModel` that has no weights. From `pre_run` to `cleanup`, which all of
its samplers call around a run, the model is open as it is for our own: planned, streamed, interrupted and let go.
"""
# B batch, C channels, T latent frames, h w latent positions

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models_base
import torch
from torch import Tensor

from ..core.planning import Scene, working
from ..core.runtime import Denoising, compute_dtype, denoising, prepared, spelled
from ..core.sampling.guidance import combination
from ..core.sampling.schedule import timestep_of
from ..core.sampling.solvers import SOLVERS
from ..core.types import Conditioning, ModelHandle, SampleRequest

log = logging.getLogger(__name__)

NEGATIVE = "negative"
# Options of a prompt that ComfyUI's samplers carry out themselves, and what they add to them.
NOT_THE_MODEL_S = (
    *("area", "mask", "strength", "mask_strength", "set_area_to_bounds", "default", "hooks"),
    *("start_percent", "end_percent", "clip_start_percent", "clip_end_percent", "timestep_start", "timestep_end"),
    *("cross_attn", "model_conds", "uuid", "device", "noise", "width", "height", "prompt_type", "latent_image"),
    *("denoise_mask", "seed", "latent_shapes"),
)
INSTEAD = "leave that node out, or load the model with ComfyUI's own Load Diffusion Model."


def stock_model(handle: ModelHandle, shift: float) -> comfy.model_patcher.ModelPatcher:
    """Return a MODEL; its noise levels have this shift, until a node such as ModelSamplingSD3 gives it another one."""
    device = comfy.model_management.get_torch_device()
    patcher = Patcher(Model(handle, shift), load_device=device, offload_device=torch.device("cpu"))
    if (patch := handle.family.guidance_patch(handle.identity.config)) is not None:
        patcher.set_model_sampler_cfg_function(_guidance(patch))
    return patcher


def _guidance(patch: int) -> Any:
    """Return our guidance as ComfyUI asks for it. Both velocities come times sigma, which changes nothing."""
    combine = combination(patch)

    def guide(args: dict[str, Any]) -> Tensor:
        if args["cond_scale"] == 1:
            return args["cond"]
        return combine(args["cond"], args["uncond"], args["cond_scale"])

    return guide


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt and whether it is one to steer away from; equal to itself alone."""

    conditioning: Conditioning
    is_negative: bool


class PromptCond(comfy.conds.CONDRegular):
    """Prompts on their way through a sampler: any of them go together, whatever their lengths."""

    def __init__(self, cond: Sequence[Prompt]):
        super().__init__(tuple(cond))

    def process_cond(self, area: Any = None, **kwargs: Any) -> "PromptCond":
        pictures = [c for p in self.cond for c in (p.conditioning.extra, *p.conditioning.controls) if c is not None]
        if area is not None and pictures:
            raise ValueError(
                "A prompt with pictures or controls is limited to an area (Conditioning Set Area), where this model "
                f"needs them whole: {INSTEAD}"
            )
        return self

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, PromptCond)

    def concat(self, others: Sequence["PromptCond"]) -> tuple[Prompt, ...]:
        return self.cond + tuple(prompt for other in others for prompt in other.cond)

    def size(self) -> list[int]:
        return [len(self.cond)]


class Elsewhere(torch.nn.Module):
    """What stands where ComfyUI's models have their transformer."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"A node wants to run this pack's transformer by itself, which is not possible: {INSTEAD}")


class Model(comfy.model_base.BaseModel):
    """A model of ours as ComfyUI's samplers see it."""

    def __init__(self, handle: ModelHandle, shift: float):
        device = comfy.model_management.get_torch_device()
        super().__init__(_config(handle, shift), comfy.model_base.ModelType.FLOW, device=device)
        self.handle, self.dtype = handle, compute_dtype(handle, device)
        self.diffusion_model = Elsewhere(self.dtype)
        self._run: Run | None = None

    def begin(self) -> None:
        """Begin a run: the model is opened when its first velocity is wanted."""
        self.end()
        self._run = Run(self.handle, self.dtype)

    def end(self) -> None:
        """End the run, if one is going on: nothing of it stays on the device."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    @property
    def is_running(self) -> bool:
        return self._run is not None

    @property
    def device_bytes(self) -> int:
        """What the run may take on the device at most; 0 while there is none."""
        return 0 if self._run is None else self._run.device_bytes

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        for name in ("control", "gligen"):
            if kwargs.get(name) is not None:
                raise ValueError(f"The prompt comes with {name}, which this pack's models don't know: {INSTEAD}")
        options = {name: value for name, value in kwargs.items() if name not in NOT_THE_MODEL_S}
        found = self.handle.family.conditionings(self.handle.identity.config, [[kwargs["cross_attn"], options]])
        if len(found) > 1:
            raise ValueError(f"A prompt is a batch of {len(found)}: write one text for all pictures of a batch.")
        prompt = Prompt(found[0], kwargs.get("prompt_type") == NEGATIVE)
        if self._run is not None:
            self._run.prompts.append(prompt)
        return {"prompts": PromptCond([prompt])}

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> int:
        """Return 0: what a run takes is planned when it begins, and room for it asked for then."""
        return 0

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("The weights of this model are not ComfyUI's, and can't be saved by its nodes.")

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        prompts: Sequence[Prompt] = (),
        **kwargs: Any,
    ) -> Tensor:
        _check_patches(transformer_options or {})
        levels = (transformer_options or {}).get("sample_sigmas")
        sigmas = None if levels is None else levels.tolist()
        run, is_alone = self._run, self._run is None
        if is_alone:  # a node asks for a single pass
            run = self._run = Run(self.handle, self.dtype)
            run.prompts += prompts
        try:
            velocity = run.velocity(x, float(t.flatten()[0]), prompts, sigmas)
        finally:
            if is_alone:
                self.end()
        return self.model_sampling.calculate_denoised(t, velocity, x)


class Run:
    """One run of a sampler of ComfyUI's: all `prompts` are known before the first velocity is wanted."""

    def __init__(self, handle: ModelHandle, dtype: torch.dtype):
        self.handle, self.dtype = handle, dtype
        self.prompts: list[Prompt] = []
        self._stack, self._model, self._known = ExitStack(), None, ()

    @property
    def device_bytes(self) -> int:
        """What the plan gives the run of the device."""
        return 0 if self._model is None else self._model.there.residency.plan.peak

    def velocity(self, x: Tensor, sigma: float, prompts: Sequence[Prompt], sigmas: Sequence[float] | None) -> Tensor:
        """Return the velocities of as many equal parts of the batch as there are prompts, in float32."""
        parts = x.float().chunk(len(prompts))
        model = self._opened(tuple(parts[0].shape), len(sigmas or (0, 0)) - 1)
        model.at(_step(sigma, sigmas))
        schedule = self.handle.family.schedule(self.handle.identity.config, tuple(parts[0].shape))
        timestep_B = torch.full((len(parts[0]),), timestep_of(sigma, schedule.whole_timesteps))
        which = [self._known.index(prompt) for prompt in prompts]
        together = model.there.residency.plan.interleaved and all(torch.equal(part, parts[0]) for part in parts)
        if together:
            return torch.cat(model.denoise(parts[0], timestep_B, tuple(which)))
        return torch.cat([model.denoise(part, timestep_B, (k,))[0] for part, k in zip(parts, which, strict=True)])

    def close(self) -> None:
        """Let go of all that is on the device."""
        self._model = None
        self._stack.close()

    def _opened(self, shape: tuple[int, ...], num_steps: int) -> Denoising:
        if self._model is None:
            device = comfy.model_management.get_torch_device()
            scene = Scene(
                family=self.handle.family,
                config=self.handle.identity.config,
                latent_shape=shape,
                conditionings=self._checked(shape),
                dtype=self.dtype,
                chunk_rows=self.handle.memory.chunk_rows,
                kept_latents=max(solver.kept_latents for solver in SOLVERS.values()),
                loras=working(self.handle.loras),
            )
            scene = replace(scene, ops=spelled(self.handle, device, scene)[0])
            self._known = tuple(self.prompts)
            self._model = self._stack.enter_context(denoising(self.handle, device, scene, num_steps, log.info))
        return self._model

    def _checked(self, shape: tuple[int, ...]) -> tuple[Conditioning, ...]:
        """Return the prompts as they are run. Raises ValueError for what the model can't run, as our sampler does."""
        positive = next((prompt for prompt in self.prompts if not prompt.is_negative), self.prompts[0]).conditioning
        latent, made = torch.zeros(shape), []
        for prompt in self.prompts:
            request = SampleRequest(latent=latent, positive=prompt.conditioning, guidance=(1.0,))
            if prompt.is_negative:
                request = replace(request, positive=positive, negative=prompt.conditioning, guidance=(2.0,))
            request, _ = prepared(self.handle, request)
            if request.latent.shape != latent.shape:
                needed = request.latent.shape[2]
                raise ValueError(
                    f"The latent has {shape[2]} frames, and with those of the reference images it needs {needed}: "
                    "connect the latent of Wan VACE, and put Trim Video Latent after the sampler."
                )
            made.append(request.negative if prompt.is_negative else request.positive)
        return tuple(made)


class Patcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's handle on a model whose weights it does not move, patch or save."""

    @property
    def is_needed_by_wanqwen(self) -> bool:
        """Whether a run of ours must not unload it for the room that it asks for."""
        return self.model.is_running

    def model_size(self) -> int:
        """What ComfyUI could get back of the device: nothing is loaded before a run or after it."""
        return self.model.device_bytes

    def loaded_size(self) -> int:
        return self.model.device_bytes

    def current_loaded_device(self) -> torch.device:
        return self.load_device

    def pre_run(self) -> None:
        super().pre_run()
        self.model.begin()

    def cleanup(self) -> None:
        self.model.end()
        super().cleanup()

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:
            self.model.end()
        return super().detach(unpatch_all)

    def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> None:
        self.model.device, self.model.current_weight_patches_uuid = device_to, self.patches_uuid

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def add_patches(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "ComfyUI's own LoRA and merge nodes can't change this model: put LoRA (WanQwen) before the node that made "
            "it a MODEL."
        )

    add_hook_patches = add_patches


def _config(handle: ModelHandle, shift: float) -> comfy.supported_models_base.BASE:
    """Return what ComfyUI's models are made from. The latent space is the same in both packs."""
    latent_format = getattr(comfy.latent_formats, handle.family.latent_format.comfy_name)

    class Config(comfy.supported_models_base.BASE):
        sampling_settings = {"shift": shift, "multiplier": 1000}  # noqa: RUF012 as ComfyUI has it

    Config.latent_format = latent_format
    config = Config({"disable_unet_model_creation": True})
    if handle.family.latent_format.rgb:  # a miniature, whose latents have colours of their own
        config.latent_format.latent_rgb_factors = handle.family.latent_format.rgb
        config.latent_format.latent_rgb_factors_bias = handle.family.latent_format.rgb_bias
    return config


def _step(sigma: float, sigmas: Sequence[float] | None) -> int:
    """Return in which step of a run a noise level is met: solvers of higher order meet some between two steps."""
    return max(0, sum(level >= sigma for level in sigmas or ()) - 1)


def _check_patches(options: dict[str, Any]) -> None:
    """Raise ValueError for what other packs put into a model's inside, which ours does not look at."""
    inside = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    found = [name for name in ("patches", "patches_replace") if any(options.get(name, {}).values())]
    found += ["wrappers"] * bool(comfy.patcher_extension.get_all_wrappers(inside, options))
    if found:
        raise ValueError(
            f"A node before the sampler changes the inside of this model ({', '.join(found)}), which models of this "
            f"pack don't carry out: {INSTEAD}"
        )
