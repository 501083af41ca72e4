"""Is the peak that a plan predicts the one that a run takes?

    python -m wanqwen.bench.plan_peaks [--case NAME ...] [--vram 24 16 12 8] [--steps 2] [--device cuda]

Whole sampling runs of the published sizes: all weights that stay, the ring, the work of every block, and what sampling
holds. On PyTorch's meta device, where no number is computed, every tensor that lives is counted; on a CUDA device
PyTorch's allocator says what it handed out at the most, and gives no more than the size of the card in question.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch

from ..core.blocks import Run
from ..core.memory.placement import GB, Machine, Plan
from ..core.memory.resident import placed
from ..core.memory.slab import Loaded
from ..core.memory.trace import LiveBytes
from ..core.memory.unpack import Unpack
from ..core.planning import CARDS, Scene, libraries_on, plan_for
from ..core.sampling import sample as sampling
from ..core.sampling.guidance import Guided, combination
from ..core.sampling.schedule import plan_steps
from ..core.sampling.solvers import SOLVERS
from ..core.types import MemoryOptions, SampleRequest
from ..core.weights.adapters import Adapters
from ..plans import GIB, SYSTEM_VRAM
from .measure import capped
from .models import CASES, META, load


def main() -> None:
    """Print predicted and measured peaks of each case on each card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--vram", type=float, nargs="+", default=[24.0, 8.0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=META)
    options = parser.parse_args()
    solver, card = "unipc", CARDS["RTX 4090"]
    sys.stdout.write("| case, card | stream | together | predicted | measured | predicted / measured |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for name in options.case:
        loaded, scene = load(CASES[name]), CASES[name].scene(SOLVERS[solver].kept_latents)
        for vram in options.vram:
            machine = Machine(
                vram=int(vram * GIB) - SYSTEM_VRAM,
                ram=64 * GB,
                total_ram=64 * GB,
                libraries=libraries_on(options.device) or card.libraries,
            )
            plan, job = plan_for(loaded, scene, card, machine, MemoryOptions(source="disk"))
            with capped(vram * GIB - SYSTEM_VRAM):
                found = measured_peak(loaded, scene, plan, solver, options.steps, options.device)
            sys.stdout.write(
                f"| {name}, {vram:g} GB | {len(plan.streaming)} of {len(job.blocks)} | "
                f"{'yes' if plan.interleaved else 'no'} | {plan.peak / GB:.3f} GB | {found / GB:.3f} GB | "
                f"{plan.peak / found:.4f} |\n"
            )
            sys.stdout.flush()


def measured_peak(
    loaded: Loaded, scene: Scene, plan: Plan, solver: str, steps: int = 3, device: torch.device = META
) -> int:
    """Return the most bytes that all of a sampling run takes at once on a device, weights and slots included."""
    family = scene.family
    request = SampleRequest(latent=torch.zeros(1), positive=scene.conditionings[0], steps=steps, guidance=(3.0,))
    schedule = plan_steps(request, family.schedule(scene.config, scene.latent_shape))
    with torch.no_grad(), _blind(), _watched(device) as peak:
        adapters = Adapters(loaded.module, loaded.blocks, scene.loras, scene.dtype, device)
        clean, noise = (torch.zeros(scene.latent_shape).to(device) for _ in range(2))
        x = sampling.start_of(schedule, clean, noise)
        unpack = Unpack(loaded.blocks, device, scene.dtype)
        with placed(loaded, device, lambda at_least: plan) as residency, closing(unpack), closing(adapters):
            hooks = (residency, unpack, adapters)
            run = Run(dtype=scene.dtype, chunk_rows=scene.chunk_rows, ops=scene.ops, hooks=hooks)
            adapters.turn_to(0, steps)
            guided = Guided(
                denoise=family.denoiser(loaded.module, run, list(scene.conditionings), device),
                has_negative=len(scene.conditionings) > 1,
                interleaved=plan.interleaved,
                combine=combination(family.guidance_patch(scene.config)),
            )
            hold = sampling.Hold(mask=torch.ones(1, device=device), clean=clean)
            sampling.sample(x, schedule, solver, guided, lambda step: torch.empty_like(noise), hold=hold)
    return peak()


@contextmanager
def _watched(device: torch.device) -> Iterator[Callable[[], int]]:
    """Give what tells the most bytes that were taken of a device at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    with LiveBytes(device) as counted:
        yield lambda: counted.peak


@contextmanager
def _blind() -> Iterator[None]:
    """Tell sampling that all numbers are finite: nobody knows those of the meta device, or of weights left empty."""
    original = torch.isfinite
    torch.isfinite = lambda x: torch.tensor(True)
    try:
        yield
    finally:
        torch.isfinite = original


if __name__ == "__main__":
    main()
