"""The sampler node: from conditioning and noise to latents."""

import itertools
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from safetensors.torch import save_file

from ..core.conditioning import ComfyConditioning
from ..core.picture import latent_mask
from ..core.runtime import generate, prepared, with_preset
from ..core.sampling.sample import SampleError
from ..core.sampling.solvers import SOLVERS
from ..core.types import Conditioning, ModelHandle, SampleRequest
from ..families import FAMILIES
from .types import CATEGORY, WanModel, check_choice, clip_of, found_by, tell, verdict

NOISE_DEVICES = ("cpu", "gpu")
TO_THE_END = 10000  # as in ComfyUI's advanced sampler
NO_PRESET = "none"
PRESETS = (NO_PRESET, *(name for family in FAMILIES for name in family.presets))
AUTO_SHIFT = 0.0
MAX_SEED = 0xFFFFFFFFFFFFFFFF


class Sampler(io.ComfyNode):
    """One sampling run, whole or in part."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenSampler",
            display_name="Sampler (WanQwen)",
            **found_by("ksampler", "sample", "generate", "denoise", "steps", "cfg"),
            category=CATEGORY,
            description="Makes the picture or video, as latents: starts from noise and takes it towards the prompt "
            "step by step.",
            inputs=_inputs(),
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The finished latents, or noisy ones if end_step stopped before the end. For VAE Decode.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What the node shows: model, settings, LoRAs, where the weights were, time and memory. For "
                    "Preview as Text, or to save with the result.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, solver: str | None = None, noise_device: str | None = None, preset: str | None = None
    ) -> bool | str:
        return verdict(
            check_choice("solver", solver, SOLVERS),
            check_choice("noise_device", noise_device, NOISE_DEVICES),
            check_choice("preset", preset, PRESETS),
        )

    @classmethod
    def execute(
        cls,
        model: ModelHandle,
        positive: ComfyConditioning,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        guidance: float,
        shift: float,
        solver: str,
        denoise: float,
        negative: ComfyConditioning | None = None,
        start_step: int = 0,
        end_step: int = TO_THE_END,
        add_noise: bool = True,
        noise_device: str = "cpu",
        guidance_schedule: str = "",
        sigmas: torch.Tensor | None = None,
        preset: str = NO_PRESET,
    ) -> io.NodeOutput:
        samples = clip_of(latent)
        mask, temporal_factor = latent.get("noise_mask"), model.family.latent_format.temporal_factor
        request = SampleRequest(
            latent=samples,
            positive=_prompt("positive", positive, model),
            negative=None if negative is None else _prompt("negative", negative, model),
            seed=seed,
            steps=steps,
            shift=None if shift == AUTO_SHIFT else shift,
            guidance=guidance_values(guidance, guidance_schedule),
            solver=solver,
            sigmas=None if sigmas is None else tuple(sigmas.tolist()),
            denoise=denoise,
            start_step=start_step,
            end_step=None if end_step == TO_THE_END else end_step,
            add_noise=add_noise,
            noise_device=noise_device,
            mask=None if mask is None else latent_mask(mask, tuple(samples.shape), temporal_factor),
        )
        lines = []
        if preset != NO_PRESET:
            request, said = with_preset(model, request, preset)
            lines.append(said)
        lines += prepared(model, request)[1]

        def add(line: str) -> None:
            lines.append(line)
            tell(cls.hidden.unique_id, lines)

        def status(line: str) -> None:
            tell(cls.hidden.unique_id, [*lines, line])

        tell(cls.hidden.unique_id, lines)
        try:
            samples = generate(model, request, tell=add, status=status)
            shown = tell(cls.hidden.unique_id, lines)
            return io.NodeOutput({**latent, "samples": samples}, "\n".join(lines), ui=shown)
        except SampleError as error:
            raise ValueError(f"{error}{_kept(error)}") from error


def _kept(error: SampleError) -> str:
    """Keep what a run made before it went wrong, if anything, and say where."""
    if not error.steps_done:
        return ""
    try:
        return f" The latent of step {error.steps_done} is kept: {_keep(error.latent)}"
    except OSError as trouble:
        return f" The latent of step {error.steps_done} could not be kept: {trouble}"


def _keep(samples: torch.Tensor) -> Path:
    """Write latents where ComfyUI's Load Latent finds them, once moved to its input folder, and return the file."""
    folder = Path(folder_paths.get_output_directory()) / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    path = next(p for i in itertools.count(1) if not (p := folder / f"wanqwen_stopped_{i:05}.latent").exists())
    save_file({"latent_tensor": samples.contiguous(), "latent_format_version_0": torch.tensor([])}, path)
    return path


def guidance_values(constant: float, schedule: str) -> tuple[float, ...]:
    """Return the values of a list "6, 6, 4", or the constant alone if the list is empty. Raises ValueError."""
    if not schedule.strip():
        return (constant,)
    try:
        return tuple(float(value) for value in schedule.split(","))
    except ValueError as error:
        raise ValueError(
            f"guidance_schedule is {schedule!r}: expected numbers with commas between them, one per step, such as "
            "6, 6, 5, 4; or nothing, for the same guidance in all steps."
        ) from error


def _prompt(which: str, conditioning: ComfyConditioning, model: ModelHandle) -> Conditioning:
    prompts = model.family.conditionings(model.identity.config, conditioning)
    if len(prompts) > 1:
        raise ValueError(
            f"{which} holds {len(prompts)} prompts (Conditioning Combine, or a batch of them), and this sampler takes "
            "one: write them as one text, or join them with Conditioning Concat."
        )
    return prompts[0]


def _inputs() -> list[io.Input]:
    return [
        WanModel.Input("model", tooltip="From Load Wan Model or Load Qwen-Image Model."),
        io.Conditioning.Input(
            "positive", tooltip="What to show: from the Text Encode node of the model's kind, or ComfyUI's own."
        ),
        io.Latent.Input(
            "latent",
            tooltip="Size and length (an Empty Latent node), or a picture or clip to start from; a mask on it says "
            "what to make anew.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=MAX_SEED, control_after_generate=True,
            tooltip="Number of the random noise: the same seed and settings give the same picture.",
        ),
        io.Int.Input(
            "steps", default=30, min=1, max=10000,
            tooltip="How many steps to take. More take longer and look better, with little gain above 50.",
        ),
        io.Float.Input(
            "guidance", default=5.0, min=0.0, max=100.0, step=0.1,
            tooltip="How strongly to follow the prompt rather than the negative one. 1 switches this off and takes "
            "half the time. Wan: 5, or 6 with the 1.3B model. Qwen-Image: 4.",
        ),
        io.Float.Input(
            "shift", default=AUTO_SHIFT, min=AUTO_SHIFT, max=100.0, step=0.1,
            tooltip="More shift spends more of the steps on layout and motion, less on detail. 0 takes the schedule "
            "that the model was published with (Wan: 5, image to video at 480p 3, first and last frame and VACE 16; "
            "Qwen-Image: by the size of the picture). Text to video at 480p: 3; with the 1.3B model: 8 to 12.",
        ),
        io.Combo.Input(
            "solver", options=list(SOLVERS), default="unipc",
            tooltip="How a step is taken. unipc: the best in few steps. dpm++2m: much like it. euler: plain, what "
            "Qwen-Image was published with. lcm: for distilled Wan models, 4 to 8 steps.",
        ),
        io.Float.Input(
            "denoise", default=1.0, min=0.01, max=1.0, step=0.01,
            tooltip="1 starts from noise alone. Less keeps more of what is in latent: 0.5 redoes half of it. For Wan "
            "Video to Video 0.4 to 0.8.",
        ),
        io.Conditioning.Input(
            "negative", optional=True,
            tooltip="What to steer away from. Without it there is no guidance, as for distilled models.",
        ),
        io.Int.Input(
            "start_step", default=0, min=0, max=10000, optional=True,
            tooltip="Begin at this step of the schedule, counted from 0: to go on where another sampler stopped.",
        ),
        io.Int.Input(
            "end_step", default=TO_THE_END, min=0, max=TO_THE_END, optional=True,
            tooltip="Stop before this step and give the latents as noisy as they are. 10000 goes to the end.",
        ),
        io.Boolean.Input(
            "add_noise", default=True, optional=True,
            tooltip="Switch off when the latent is noisy already, because another sampler stopped before its end.",
        ),
        io.Combo.Input(
            "noise_device", options=list(NOISE_DEVICES), default="cpu", optional=True,
            tooltip="cpu: a seed gives the same picture on every machine. gpu: noise as the official code draws it.",
        ),
        io.String.Input(
            "guidance_schedule", default="", optional=True,
            tooltip="Guidance for each step, with commas between: 6, 6, 5, 4. Empty: guidance in all of them.",
        ),
        io.Sigmas.Input(
            "sigmas", optional=True,
            tooltip="Noise levels from a scheduler node, 1 down to 0, instead of steps, shift and denoise.",
        ),
        io.Combo.Input(
            "preset", options=list(PRESETS), default=NO_PRESET, optional=True,
            tooltip="Settings of distilled models and LoRAs, instead of steps, shift, guidance and solver above. "
            "lightx2v-4, self-forcing-4, causvid-4: for Wan. lightning-4, lightning-8: Qwen-Image-Lightning.",
        ),
    ]  # fmt: skip
