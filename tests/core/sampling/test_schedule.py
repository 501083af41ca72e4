"""Schedules: every published table, and what a request may ask of one."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from wanqwen.core.sampling.schedule import (
    StepPlan,
    even_grid,
    plan_steps,
    static_shift,
    stretch_to_terminal,
)
from wanqwen.core.types import Conditioning, SampleRequest, Schedule
from wanqwen.qwen_image.family import mu_for_length

GOLDENS = Path(__file__).parents[2] / "fixtures" / "goldens" / "schedulers.safetensors"
TABLE_TOLERANCE = 1e-5  # of the largest entry; measured 1.2e-7, and 0 for the tables in double precision
SOLVER_OF = {"unipc": "unipc", "dpmpp": "dpm++2m"}


def request(**fields) -> SampleRequest:
    empty = torch.zeros(1, 1, 1, 1, 1)
    return SampleRequest(latent=empty, positive=Conditioning(text=torch.zeros(1, 1, 1)), **fields)


def tables() -> list[str]:
    with safe_open(GOLDENS, "pt") as file:
        return sorted(name.split("/")[1] for name in file.keys() if name.endswith("/sigmas"))  # noqa: SIM118


def plan_of(table: str, config: dict) -> StepPlan:
    """Plan what a table's name says: `table_<scheduler>_n<steps>[_shift<s>|_seq<tokens>]`."""
    kind, steps, value = re.fullmatch(r"table_(\w+?)_n(\d+)(?:_(?:shift|seq)(\d+))?", table).groups()
    if kind in SOLVER_OF:
        return plan_steps(request(steps=int(steps), solver=SOLVER_OF[kind], shift=float(value)), Schedule(shift=1.0))
    row = config[kind]
    shortest = (row["base_image_seq_len"], row["base_shift"])
    longest = (row["max_image_seq_len"], row["max_shift"])
    shift = math.exp(mu_for_length(int(value or 4096), shortest, longest))
    schedule = Schedule(shift=shift, terminal=row["shift_terminal"], whole_timesteps=False)
    return plan_steps(request(steps=int(steps), solver="euler"), schedule)


@pytest.mark.parametrize("table", tables())
def test_schedule_equals_the_published_table(table):
    with safe_open(GOLDENS, "pt") as file:
        plan = plan_of(table, json.loads(file.metadata()["config"]))
        for name, ours in (("sigmas", plan.sigmas), ("timesteps", plan.timesteps)):
            theirs = file.get_tensor(f"out/{table}/{name}")
            error = (torch.tensor(ours, dtype=torch.float64) - theirs).abs().max() / theirs.abs().max()
            exact = theirs.dtype == torch.int64 or table.split("_")[1] in SOLVER_OF
            assert error <= (0 if exact else TABLE_TOLERANCE), name


@pytest.mark.parametrize("solver, start", [("unipc", float(np.float32(0.999))), ("dpm++2m", 1.0)])
def test_whole_timesteps_equal_the_official_arithmetic_for_any_number_of_steps(solver, start):
    for steps in (*range(1, 61), 100, 200):
        for shift in (1.0, 3.0, 5.0, 8.0, 12.0, 16.0):
            u = np.linspace(start, 0, steps + 1)[:-1]
            expected = (shift * u / (1 + (shift - 1) * u) * 1000).astype(np.int64)
            plan = plan_steps(request(steps=steps, solver=solver, shift=shift), Schedule(shift=1.0))
            assert list(plan.timesteps) == expected.tolist(), (steps, shift)


def test_euler_and_lcm_take_the_grid_that_starts_at_one():
    for solver in ("dpm++2m", "euler", "lcm"):
        assert plan_steps(request(steps=4, solver=solver), Schedule(shift=5.0)).sigmas[0] == 1
    assert plan_steps(request(steps=4, solver="unipc"), Schedule(shift=5.0)).sigmas[0] < 1


def test_shift_of_the_request_goes_before_the_default():
    assert plan_steps(request(steps=4, shift=3.0), Schedule(shift=5.0)) == plan_steps(
        request(steps=4), Schedule(shift=3.0)
    )
    assert plan_steps(request(steps=4, shift=3.0), Schedule(shift=5.0)) != plan_steps(
        request(steps=4), Schedule(shift=5.0)
    )


def test_stretched_levels_begin_at_one_and_end_at_the_terminal():
    stretched = stretch_to_terminal(static_shift(even_grid(20), 2.0), 0.02)
    assert stretched[0] == 1
    assert stretched[-1] == pytest.approx(0.02, abs=1e-12)
    assert stretch_to_terminal([1.0], 0.02) == [1.0]


def test_denoise_keeps_the_last_steps_of_a_longer_schedule():
    part = plan_steps(request(steps=6, denoise=0.3, solver="euler"), Schedule(shift=5.0))
    whole = plan_steps(request(steps=20, solver="euler"), Schedule(shift=5.0))
    assert part.sigmas == whole.sigmas[-7:]
    assert part.timesteps == whole.timesteps[-6:]
    assert whole.from_noise
    assert not part.from_noise


def test_denoise_of_next_to_nothing_does_not_build_the_whole_schedule():
    plan = plan_steps(request(steps=3, denoise=1e-12, solver="euler"), Schedule(shift=5.0))
    assert len(plan.sigmas) == 4
    assert plan.sigmas[0] < 1e-10


def test_parts_join_to_the_whole_and_keep_their_guidance():
    fields = {"steps": 5, "guidance": (5.0, 4.0, 3.0, 2.0, 1.0)}
    whole = plan_steps(request(**fields), Schedule(shift=5.0))
    head = plan_steps(request(**fields, end_step=2), Schedule(shift=5.0))
    tail = plan_steps(request(**fields, start_step=2), Schedule(shift=5.0))
    assert head.sigmas + tail.sigmas[1:] == whole.sigmas
    assert head.timesteps + tail.timesteps == whole.timesteps
    assert head.guidance + tail.guidance == whole.guidance == (5.0, 4.0, 3.0, 2.0, 1.0)
    assert (head.start, tail.start) == (0, 2)
    assert (head.from_noise, tail.from_noise) == (True, False)


def test_custom_sigmas_replace_the_schedule():
    plan = plan_steps(
        request(sigmas=(1.0, 0.9375, 0.75, 0.25), steps=99, shift=7.0, guidance=(1.5,)), Schedule(shift=5.0)
    )
    assert plan.sigmas == (1.0, 0.9375, 0.75, 0.25)
    assert plan.timesteps == (1000, 937, 750)
    assert plan.guidance == (1.5, 1.5, 1.5)
    assert plan.from_noise
    assert not plan_steps(request(sigmas=(0.9, 0.0)), Schedule(shift=5.0)).from_noise


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"steps": 0}, "steps is 0"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"shift": math.nan}, "shift is nan"),
        ({"shift": 1e9}, "smaller shift"),
        ({"denoise": 0.0}, "denoise is 0.0"),
        ({"denoise": 1.2}, "denoise is 1.2"),
        ({"solver": "heun"}, "choose one of unipc, dpm.*2m, euler, lcm"),
        ({"steps": 8, "start_step": 8}, "start_step 8 and end_step 8 do not fit a schedule of 8 steps"),
        ({"steps": 8, "start_step": -1}, "start_step -1"),
        ({"steps": 8, "end_step": 9}, "end_step 9"),
        ({"steps": 8, "start_step": 4, "end_step": 3}, "start_step 4 and end_step 3"),
        ({"steps": 8, "guidance": (5.0, 4.0)}, "guidance holds 2 values for 8 steps"),
        ({"sigmas": (1.0,)}, "holds 1 value"),
        ({"sigmas": (1.0, 0.5, 0.5)}, "sigma 2 of the schedule is 0.5 after 0.5"),
        ({"sigmas": (0.5, 1.0)}, "sigma 1 of the schedule is 1.0 after 0.5"),
        ({"sigmas": (0.5, 0.5 - 1e-9, 0.0)}, "below the one before"),
        ({"sigmas": (1.5, 0.0)}, r"sigmas\[0\] is 1.5"),
        ({"sigmas": (1.0, -0.1)}, r"sigmas\[1\] is -0.1"),
        ({"sigmas": (1.0, math.nan, 0.0)}, r"sigmas\[1\] is nan"),
        ({"sigmas": (14.6, 0.0)}, "from 1 .noise. down to 0"),
        ({"sigmas": (1.0, 0.0), "denoise": 0.5}, "denoise is 0.5 beside custom sigmas"),
        ({"sigmas": (1.0, 0.0), "solver": "heun"}, "Unknown solver"),
    ],
)
def test_impossible_requests_are_refused_with_their_value(fields, message):
    with pytest.raises(ValueError, match=message):
        plan_steps(request(**fields), Schedule(shift=5.0))
