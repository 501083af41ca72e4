"""Goldens of schedules and solvers: tables of sigmas and timesteps, and trajectories under a known velocity."""
# N steps

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor
from wanqwen.core.sampling.guidance import Guided
from wanqwen.core.sampling.sample import sample
from wanqwen.core.sampling.schedule import StepPlan, plan_steps
from wanqwen.core.types import Conditioning, SampleRequest, Schedule
from wanqwen.qwen_image.family import mu_for_length

from .golden import Golden, need

TOLERANCE = {"fp32": 1e-5}
SOLVERS = {"unipc": "unipc", "dpmpp": "dpm++2m"}  # in the goldens -> ours; these have a fixed shift and whole timesteps
DYNAMIC = {"qwen_euler": "euler", "qwen_lightning": "euler"}  # these shift by the length of the sequence
TABLE = re.compile(r"table_(?P<solver>[a-z_]+)_n(?P<steps>\d+)(?:_shift(?P<shift>[\d.]+))?(?:_seq(?P<tokens>\d+))?")


def recognise(golden: Golden) -> bool:
    """Say whether a file holds tables and trajectories, and no model."""
    cases = {key.split("/", 2)[1] for key in golden.keys("out")}
    return not golden.weights and bool(cases) and all(case.startswith(("table_", "trajectory")) for case in cases)


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how an output is checked."""
    return ("fp32",) if key.startswith("out/") else ()


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Make the table or the trajectory of an output and return ours and the reference."""
    _, case, name = key.split("/", 2)
    reference = golden.tensors[key]
    if case.startswith("trajectory"):
        return [(_trajectory(golden, case, name), reference)]
    wanted = TABLE.fullmatch(case)
    if wanted is None or name not in ("sigmas", "timesteps"):
        raise ValueError(f"{key} is no table of sigmas or timesteps whose name says solver, steps and shift or length")
    shift = float(wanted["shift"]) if wanted["shift"] else None
    plan = make_plan(golden, wanted["solver"], int(wanted["steps"]), shift, int(wanted["tokens"] or 0))
    return [(torch.tensor(getattr(plan, name), dtype=torch.float32).to(reference.dtype), reference)]


def make_plan(golden: Golden, solver: str, steps: int, shift: float | None, tokens: int) -> StepPlan:
    """Return the steps of a solver of the goldens, as its config says."""
    if solver in SOLVERS:
        if shift is None:
            raise ValueError(f"no shift is given for {solver}")
        return plan_steps(_request(SOLVERS[solver], steps), Schedule(shift=shift))
    if solver not in DYNAMIC:
        raise ValueError(f"unknown solver {solver}; known: {', '.join([*SOLVERS, *DYNAMIC])}")
    config = golden.config[solver]
    ends = [(config[f"{end}_image_seq_len"], config[f"{end}_shift"]) for end in ("base", "max")]
    shift = math.exp(mu_for_length(tokens, *ends))
    schedule = Schedule(shift=shift, terminal=config["shift_terminal"], whole_timesteps=False)
    return plan_steps(_request(DYNAMIC[solver], steps), schedule)


def _request(solver: str, steps: int) -> SampleRequest:
    nothing = torch.zeros(1, 1, 1, 1, 1)
    text = Conditioning(text=torch.zeros(1, 1, 1))
    return SampleRequest(latent=nothing, positive=text, steps=steps, solver=solver, guidance=(1.0,))


def _trajectory(golden: Golden, case: str, solver: str) -> Tensor:
    """Return the samples before each step and the final one, for the velocity `a * x + B[k]` of step k."""
    (offsets,) = need(golden.inputs(case), "B")
    x = next(t for other in (case, *golden.cases) if (t := golden.inputs(other).get("x0")) is not None)
    factor = _said(golden, case, r"v_k = ([\d.]+)\*x")
    plan = make_plan(
        golden,
        solver,
        len(offsets),
        _said(golden, case, r"shift ([\d.]+)"),
        int(_said(golden, case, r"image_seq_len (\d+)")),
    )
    following: Iterator[Tensor] = iter(offsets)
    rows = [x]
    sample(
        x,
        plan,
        (SOLVERS | DYNAMIC)[solver],
        Guided(denoise=lambda x, *_: [factor * x + next(following)]),
        lambda _: torch.zeros_like(x),
        lambda done, total, x0, x: rows.append(x),
    )
    return torch.stack(rows)


def _said(golden: Golden, case: str, pattern: str) -> float:
    """Return a number that the text of the case gives, or that of another case of the file ("same x0")."""
    for other in (case, *golden.cases):
        if found := re.search(pattern, str(golden.cases.get(other, ""))):
            return float(found[1])
    raise ValueError(f"no case of {golden.path.name} says {pattern}")
