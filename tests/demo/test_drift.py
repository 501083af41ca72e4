"""How far fused kernels may take a whole run, and that what stands for them in the measurement does as they do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from wanqwen.core.ops.choice import FUSED
from wanqwen.core.ops.trials import TRIALS, Tokens, deviation
from wanqwen.core.types import FastPaths
from wanqwen.demo import drift

ALLOWED_DB = {torch.bfloat16: 45.0, torch.float32: 110.0}  # of the range of the latents
ALLOWED_DB_INT8 = 45.0
ALLOWED_DB_ALL = 30.0


@pytest.mark.parametrize("name", FUSED)
def test_what_stands_for_a_kernel_gives_its_numbers(name: str) -> None:
    pytest.importorskip("triton")
    from wanqwen import kernels

    tokens, kernel = Tokens(rows=9, heads=3, head_width=32, batch=2), kernels.KERNELS[name].load(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for trial in TRIALS[name]:
        runs = (
            trial.run(call, trial.arguments(tokens, torch.bfloat16, device))
            for call in (getattr(drift.EMULATED, name), kernel)
        )
        for emulated, fused in zip(*runs, strict=True):
            assert deviation(emulated, fused) <= 1
            assert (emulated != fused).float().mean() < (0.002 if fused.dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("dtype", ALLOWED_DB, ids=str)
def test_a_whole_run_stays_near_the_exact_one(dtype: torch.dtype) -> None:
    _, run, _ = drift.clip_runs(drift.DEMO_FOLDER / "wan_dit.safetensors", 1, seed=3)
    near_the_exact_one(run, FastPaths(), dtype, ALLOWED_DB[dtype])


TASKS = [(drift.clip_runs, drift.CLIPS), (drift.card_runs, drift.CARDS)]


@pytest.mark.parametrize(("runs", "file"), TASKS, ids=["clips", "cards"])
def test_a_whole_run_with_attention_in_8_bits_stays_near_the_exact_one(runs: Callable, file: str) -> None:
    _, run, rate = runs(drift.DEMO_FOLDER / f"{file}.safetensors", 1, seed=3)
    fast = FastPaths(kernels="exact", attention="int8")
    assert rate([near_the_exact_one(run, fast, torch.float32, ALLOWED_DB_INT8).pixels]) == 1


@pytest.mark.parametrize(("runs", "file"), TASKS, ids=["clips", "cards"])
@pytest.mark.parametrize("weights", drift.IN_8_BITS)
def test_a_whole_run_with_all_fast_paths_stays_near_the_exact_one(
    runs: Callable, file: str, weights: str, tmp_path: Path
) -> None:
    path = drift.DEMO_FOLDER / f"{file}.safetensors"
    _, run, rate = runs(drift.write_in_8_bits(path, tmp_path / path.name, drift.IN_8_BITS[weights]), 1, seed=3)
    fast = FastPaths(products="8bit", attention="int8")
    assert rate([near_the_exact_one(run, fast, torch.bfloat16, ALLOWED_DB_ALL).pixels]) == 1


def near_the_exact_one(run: drift.Run, fast: FastPaths, dtype: torch.dtype, decibels: float) -> drift.Result:
    with drift.kernels_anywhere(emulated=True):
        exact, found = run(drift.PLAIN, dtype, 0), run(fast, dtype, 0)
    assert not torch.equal(found.latents, exact.latents)
    assert drift.psnr(found.latents, exact.latents) > decibels
    return found
