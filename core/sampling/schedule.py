"""Which noise levels a run visits: grids, shifts, custom tables, and the part of them that a request asks for.

Sigma is the share of noise in `x = (1 - sigma) * latent + sigma * noise`: 1 is noise alone, 0 is the picture.
"""
# N steps of a run; a table has N + 1 sigmas, the last one where the run ends

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from ..types import SampleRequest, Schedule
from .guidance import per_step
from .solvers import find_solver

TRAIN_TIMESTEPS = 1000  # the model is told 1000 * sigma


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """The steps of one run: N + 1 sigmas, N timesteps and N guidance values.

    `start` is the index of the first of them in the whole schedule. `from_noise` says that the run begins where the
    schedule does: with noise alone, even where the first sigma is a little below 1.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    guidance: tuple[float, ...]
    start: int
    from_noise: bool

    def __post_init__(self) -> None:
        assert len(self.sigmas) - 1 == len(self.timesteps) == len(self.guidance) > 0


def plan_steps(request: SampleRequest, published: Schedule) -> StepPlan:
    """Return the steps that a request asks for.

    The whole schedule is `request.sigmas`, or `request.steps` levels of the published one; `request.shift` takes that
    shift instead, and no terminal, as distilled models were made with. With
    `denoise` < 1 the last `steps` levels of a schedule of int(steps / denoise). `start_step` and `end_step` then take a
    part of it. A guidance list goes with the whole schedule, so that a run in two parts is given the same list twice.
    Raises ValueError for anything that cannot be run.
    """
    schedule = published if request.shift is None else replace(published, shift=request.shift, terminal=None)
    grid_start = find_solver(request.solver).grid_start
    sigmas = _shifted_sigmas(request, schedule, grid_start) if request.sigmas is None else _custom_sigmas(request)
    timesteps = [timestep_of(sigma, schedule.whole_timesteps) for sigma in sigmas[:-1]]
    guidance = per_step(request.guidance, len(timesteps))
    start, end = _part(request, len(timesteps))
    return StepPlan(
        sigmas=_descending_float32(sigmas)[start : end + 1],
        timesteps=tuple(timesteps[start:end]),
        guidance=guidance[start:end],
        start=start,
        from_noise=start == 0 and (sigmas[0] == 1 or (request.sigmas is None and request.denoise == 1)),
    )


def even_grid(steps: int, start: float = 1.0, first: int = 0) -> list[float]:
    """Return `steps` evenly spaced levels from `start` down to, but without, 0; or those from number `first` on."""
    # Not start * (1 - i / steps): the last bit decides which timestep 1000 * sigma is cut to.
    spacing = -start / steps
    return [i * spacing + start for i in range(first, steps)]


def static_shift(levels: Sequence[float], shift: float) -> list[float]:
    """Return levels moved towards noise, `s u / (1 + (s - 1) u)`; 1 leaves them as they are.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 23.
    """
    return [shift * u / (1 + (shift - 1) * u) for u in levels]


def stretch_to_terminal(levels: Sequence[float], terminal: float) -> list[float]:
    """Return levels stretched away from 1 so that the last one is `terminal`; a single level of 1 stays."""
    if levels[-1] == 1:
        return list(levels)
    factor = (1 - terminal) / (1 - levels[-1])
    return [1 - (1 - level) * factor for level in levels]


def timestep_of(sigma: float, whole: bool) -> float:
    """Return what the model is told of a noise level, 0 to 1000; with `whole` without its fraction."""
    timestep = sigma * TRAIN_TIMESTEPS
    return float(int(timestep)) if whole else timestep


def _shifted_sigmas(request: SampleRequest, schedule: Schedule, grid_start: float) -> list[float]:
    if request.steps < 1:
        raise ValueError(f"steps is {request.steps}: a run needs at least 1.")
    if not 0 < schedule.shift < math.inf:
        raise ValueError(f"shift is {schedule.shift}: it must be a number above 0 (1 spaces the steps evenly).")
    if not 0 < request.denoise <= 1:
        raise ValueError(f"denoise is {request.denoise}: it must be above 0 and at most 1 (1 starts from noise alone).")
    whole = int(request.steps / request.denoise)
    levels = static_shift(even_grid(whole, grid_start, first=whole - request.steps), schedule.shift)
    if schedule.terminal is not None:
        levels = stretch_to_terminal(levels, schedule.terminal)
    return [*levels, 0.0]


def _custom_sigmas(request: SampleRequest) -> list[float]:
    sigmas = [float(sigma) for sigma in request.sigmas]
    if len(sigmas) < 2:
        raise ValueError(f"sigmas holds {len(sigmas)} value(s): a run needs at least 2, a start and an end.")
    for i, sigma in enumerate(sigmas):
        if not 0 <= sigma <= 1:
            raise ValueError(f"sigmas[{i}] is {sigma}: flow models need sigmas from 1 (noise) down to 0 (picture).")
    if request.denoise != 1:
        raise ValueError(
            f"denoise is {request.denoise} beside custom sigmas, which say themselves where to start: "
            "leave denoise at 1, or begin the sigmas lower."
        )
    return sigmas


def _part(request: SampleRequest, steps: int) -> tuple[int, int]:
    start, end = request.start_step, steps if request.end_step is None else request.end_step
    if not 0 <= start < end <= steps:
        raise ValueError(
            f"start_step {start} and end_step {end} do not fit a schedule of {steps} steps: "
            f"0 <= start_step < end_step <= {steps} is needed."
        )
    return start, end


def _descending_float32(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Round to float32, as published tables are stored: near 1 the rounding moves log(1 - sigma) visibly."""
    single = tuple(torch.tensor(sigmas, dtype=torch.float32).tolist())
    for i, (sigma, following) in enumerate(pairwise(single)):
        if following >= sigma:
            raise ValueError(
                f"sigma {i + 1} of the schedule is {following} after {sigma}, and each must be below the one before: "
                "correct the sigmas, or take a smaller shift or fewer steps."
            )
    return single
