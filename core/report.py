"""What a run was and what it took, in a few lines for people."""

import time
from collections.abc import Sequence

import torch

from . import host
from .memory.kept import idle_bytes
from .memory.placement import GB
from .ops.attention_choice import name_of
from .ops.choice import Ops
from .planning import working
from .sampling.schedule import StepPlan
from .types import Lora, ModelHandle, SampleRequest

WORTH_SAYING = GB // 100  # bytes


def described(handle: ModelHandle, request: SampleRequest, plan: StepPlan, dtype: torch.dtype, ops: Ops) -> list[str]:
    """Return lines that say which model makes what, and how."""
    identity, latent_format = handle.identity, handle.family.latent_format
    shape = f"{identity.config.num_layers} blocks of width {identity.config.dim}"
    batch, _, frames, height, width = request.latent.shape
    size = f"{width * latent_format.spatial_factor} x {height * latent_format.spatial_factor}"
    clip = f", {latent_format.pixel_frames(frames)} frames" if frames > 1 else ""
    return [
        f"{handle.checkpoint.path.name}: {identity.family} {identity.variant}, {shape}; weights "
        f"{identity.weight_format}, computed in {str(dtype).removeprefix('torch.')}; "
        f"attention by {name_of(ops.attention)}",
        f"{size}{clip}{f', {batch} of them' if batch > 1 else ''}; {_steps(request, plan)}; seed {request.seed}",
        *map(_lora, working(handle.loras)),
    ]


def _steps(request: SampleRequest, plan: StepPlan) -> str:
    taken, whole = len(plan.timesteps), request.num_steps
    part = f" (numbers {plan.start + 1} to {plan.start + taken} of {whole})" if taken < whole else ""
    levels = "" if request.shift is None or request.sigmas is not None else f", shift {request.shift:g}"
    guided = "no guidance" if request.negative is None else f"guidance {_range(plan.guidance)}"
    start = "" if plan.from_noise or not request.add_noise else f", from noise level {plan.sigmas[0]:.2f}"
    return f"{taken} steps of {request.solver}{part}{levels}{start}, {guided}"


def _range(values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def _lora(lora: Lora) -> str:
    used, total = sum(map(len, lora.parts.values())), len(lora.checkpoint.tensors)
    when = "" if (lora.start, lora.end) == (0, 1) else f", from {lora.start:.0%} to {lora.end:.0%} of the steps"
    return f"LoRA {lora.checkpoint.path.name} at {lora.strength:g}{when}: {used} of {total} tensors used"


class Costs:
    """The time and the memory of a run, from when this is made."""

    def __init__(self, device: torch.device):
        self.device = device
        self._started = self._last = time.monotonic()
        self._opening = 0.0
        self._steps: list[float] = []
        host.forget_peak(device)

    def opened(self) -> None:
        """Say that the model is there, and the first step begins."""
        self._opening, self._last = self._tick(), time.monotonic()

    def step(self) -> None:
        """End a step."""
        self._steps.append(self._tick())

    def lines(self) -> list[str]:
        """Return what it took until now."""
        first, *others = self._steps or [0.0]
        each = f"the others {sum(others) / len(others):.2f} s each" if others else ""
        spent = [f"opening the model {self._opening:.1f} s", f"the first step {first:.1f} s", each]
        kept = idle_bytes()
        memory = [f"RAM kept for the next run: {kept / GB:.2f} GB"] if kept >= WORTH_SAYING else []
        if (peak := host.peak(self.device)) is not None:
            memory.insert(0, f"VRAM: {peak / GB:.2f} GB at most")
        total = time.monotonic() - self._started
        return [f"{total:.1f} s: {', '.join(filter(None, spent))}", *filter(None, ["; ".join(memory)])]

    def _tick(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds
