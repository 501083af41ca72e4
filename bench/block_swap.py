"""What does it cost that blocks stream, beside a card that holds the whole model?

    python -m wanqwen.bench.block_swap --simulate              without a GPU: the ring in simulated time, on three cards
    python -m wanqwen.bench.block_swap --vram 24 16 12 8       on a GPU: measured steps, peaks and start-up
    python -m wanqwen.bench.block_swap --link 25e9             the same, copies slowed down to that many bytes a second
    python -m wanqwen.bench.block_swap --against-diffusers     beside diffusers' group offloading

Weights are random and of the published sizes and dtypes (bf16). A step has both guidance passes.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from ..core import planning
from ..core.blocks import Run
from ..core.memory import resident
from ..core.memory.link import CudaLink
from ..core.memory.placement import GB, Job, Machine, Plan, make_plan, visits_of
from ..core.memory.report import where
from ..core.memory.resident import placed
from ..core.memory.slab import Loaded
from ..core.memory.timeline import step_seconds
from ..core.planning import CARDS, Scene, job_of, plan_for, working_bytes
from ..core.sampling.guidance import Guided, combination
from ..core.types import MemoryOptions
from ..plans import SYSTEM_VRAM
from .measure import capped
from .models import CASES, DFLOAT11, Case, RandomWeights, load
from .ring import simulated_seconds

GIB = 1 << 30
# Of DFloat11 there are no streams to decode.
FIRST = ("Wan-14B 832x480x81", "Wan-14B 1280x720x81", "Qwen-Image 1328x1328")
CHOICES = (*FIRST, *(name for name, case in CASES.items() if name not in FIRST and case.stored != DFLOAT11))
SIMULATED = ("RTX 3090", "RTX 4090", "H200")
HEADER = (
    "| card, VRAM of the plan | stream | slots | together | peak | ring | planned | max(N t_c, S t_x) | over resident |"
    "\n|---|---|---|---|---|---|---|---|---|"
)
STEPS = 3


def main() -> None:
    """Simulate or measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="without a GPU, in simulated time")
    parser.add_argument("--case", nargs="+", choices=CHOICES, default=CHOICES[:3])
    parser.add_argument("--vram", type=float, nargs="+", default=[24.0], help="GB that a run may take")
    parser.add_argument("--link", type=float, help="bytes a second that may cross to the card")
    parser.add_argument("--against-diffusers", action="store_true")
    options = parser.parse_args()
    if options.simulate:
        for name in options.case:
            _simulate(name, CASES[name], options.vram)
    else:
        _measure_all(options)


# Simulated


def _simulate(name: str, case: Case, sizes: list[float]) -> None:
    loaded, scene = load(case), case.scene()
    interleaved = working_bytes(loaded, scene, interleaved=True)
    sys.stdout.write(f"\n{name}: blocks that stream, slots, passes together; seconds of a step\n{HEADER}\n")
    for label in SIMULATED:
        card = CARDS[label]
        job = replace(job_of(loaded, scene, card), working_interleaved=interleaved)
        for size in sizes:
            machine = Machine(
                vram=int(size * GIB) - SYSTEM_VRAM,
                ram=100 * GB,
                total_ram=128 * GB,
                link=card.link,
                libraries=card.libraries,
            )
            for together in (None, False):
                plan = make_plan(job, machine, MemoryOptions(interleave=together))
                sys.stdout.write(_row(f"{label}, {size:g} GB", job, machine, plan) + "\n")


def _row(title: str, job: Job, machine: Machine, plan: Plan) -> str:
    visits, walks = visits_of(job, machine, plan)
    ring = walks * simulated_seconds(visits, plan.num_slots)
    timeline = walks * step_seconds(visits, plan.num_slots)
    computing = sum(visit.seconds for visit in visits)
    copying = sum(visit.coming for visit in visits) if len(plan.streaming) > plan.num_slots else 0.0
    closed = walks * max(computing, copying)
    return (
        f"| {title} | {len(plan.streaming)} of {len(job.blocks)} | {plan.num_slots} | "
        f"{'yes' if plan.interleaved else 'no'} | {plan.peak / GB:.2f} GB | {ring:.3f} | {timeline:.3f} | "
        f"{closed:.3f} | {ring / (walks * computing):.3f} |"
    )


# Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What a run took: seconds to the end of the first step, the median of the later ones, and bytes of the card."""

    first: float
    step: float
    peak: int


class ThrottledLink(CudaLink):
    """A link of no more than so many bytes a second: the copy stream sleeps as long as a slower copy would take."""

    speed = 25e9

    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        """Copy, and keep the stream busy for as long as the slower link would."""
        measured = planning.measured_speed(device.device)
        super().load(slot, device, host)
        spare = host.numel() / self.speed - (0.0 if measured is None else host.numel() / measured)
        if spare > 0:
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(int(spare * _cycles_per_second()))
                self.ready[slot].record(self.stream)


@cache
def _cycles_per_second() -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(10**8)
    end.record()
    end.synchronize()
    return 10**8 / (start.elapsed_time(end) / 1000)


def _measure_all(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        sys.stderr.write("There is no CUDA device here: give --simulate.\n")
        sys.exit(2)
    device = torch.device("cuda")
    link = planning.measured_speed(device) or 0.0
    sys.stdout.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, link {link / 1e9:.1f} GB/s\n")
    for name in options.case:
        case = CASES[name]
        loaded, scene = load(case, RandomWeights), case.scene()
        whole = _measure(loaded, scene, MemoryOptions(swapped=0), None, None)
        sys.stdout.write(f"{name}: resident {_said(whole)}\n")
        for vram in options.vram:
            swapped = _measure(loaded, scene, MemoryOptions(), vram, options.link)
            sys.stdout.write(f"    {vram:g} GB: {_said(swapped)}, swapped/resident {swapped.step / whole.step:.3f}\n")
        if options.against_diffusers:
            theirs = _diffusers(case, scene)
            sys.stdout.write(f"    diffusers, block level with a stream: {_said(theirs)}\n")
        loaded.masters.clear()
        gc.collect()


def _said(timing: Timing) -> str:
    return f"step {timing.step:.3f} s, first after {timing.first:.2f} s, peak {timing.peak / GB:.2f} GB"


def _measure(loaded: Loaded, scene: Scene, options: MemoryOptions, vram: float | None, link: float | None) -> Timing:
    device, original = torch.device("cuda"), resident.link_to
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    machine = planning.machine_of(device)
    if vram is not None:
        machine = replace(machine, vram=min(machine.vram, int(vram * GIB)))
    if link is not None:
        machine = replace(machine, link=link)
        ThrottledLink.speed = link
        resident.link_to = ThrottledLink

    def plan(at_least: int) -> Plan:
        found, job = plan_for(loaded, scene, planning.card_of(device), machine, options, at_least)
        sys.stdout.write(f"        {where(found, len(job.blocks))}; predicted {found.peak / GB:.2f} GB\n")
        return found

    started = time.perf_counter()
    try:
        with (
            capped(None if vram is None else vram * GIB),
            torch.inference_mode(),
            placed(loaded, device, plan) as residency,
        ):
            run = Run(dtype=scene.dtype, hooks=(residency,))
            step = _stepper(loaded, scene, run, residency.plan.interleaved, device)
            return _timed(step, started)
    finally:
        resident.link_to = original


def _stepper(loaded: Loaded, scene: Scene, run: Run, interleaved: bool, device: torch.device) -> Callable[[], object]:
    guided = Guided(
        denoise=scene.family.denoiser(loaded.module, run, list(scene.conditionings), device),
        has_negative=len(scene.conditionings) > 1,
        interleaved=interleaved,
        combine=combination(scene.family.guidance_patch(scene.config)),
    )
    x = torch.randn(scene.latent_shape, device=device)
    return lambda: guided(x, torch.full((1,), 500.0), 4.0)


def _timed(step: Callable[[], object], started: float) -> Timing:
    times = [started]
    for _ in range(1 + STEPS):
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(times[1:])]
    return Timing(first=times[1] - started, step=statistics.median(seconds), peak=torch.cuda.max_memory_allocated())


def _diffusers(case: Case, scene: Scene) -> Timing:
    """Measure diffusers' own class with its group offloading: every block streams, one ahead on a stream."""
    import diffusers

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = case.config
    if case.family.name.startswith("wan"):
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads,
            ffn_dim=config.ffn_dim, num_layers=config.num_layers, text_dim=config.text_dim,
        )  # fmt: skip
    else:
        model = diffusers.QwenImageTransformer2DModel(num_layers=config.num_layers)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    started = time.perf_counter()
    device = torch.device("cuda")
    model.enable_group_offload(
        onload_device=device, offload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1,
        use_stream=True,
    )  # fmt: skip
    x = torch.randn(scene.latent_shape, device=device, dtype=torch.bfloat16)
    text = torch.randn(1, case.rows[0], config.text_dim, device=device, dtype=torch.bfloat16)

    def step() -> None:
        for _ in scene.conditionings:
            if case.family.name.startswith("wan"):
                model(x, torch.tensor([500], device=device), text, return_dict=False)
            else:
                height, width = scene.latent_shape[3] // 2, scene.latent_shape[4] // 2
                tokens = x.reshape(1, -1, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, height * width, -1)
                time_ = torch.tensor([0.5], device=device, dtype=torch.bfloat16)
                model(tokens, text, None, time_, [[(1, height, width)]], return_dict=False)

    with torch.inference_mode():
        return _timed(step, started)


if __name__ == "__main__":
    main()
