"""How far fused kernels may take a whole run, and that what stands for them in the measurement does as they do."""

import pytest
import torch
from wanqwen.core.ops.choice import FUSED
from wanqwen.core.ops.trials import TRIALS, Tokens, deviation
from wanqwen.core.types import AUTO_KERNELS, EXACT_KERNELS
from wanqwen.demo import drift

ALLOWED_DB = {torch.bfloat16: 45.0, torch.float32: 110.0}  # of the range of the latents


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
    _, run, _ = drift.clip_runs(1, seed=3)
    with drift.kernels_anywhere(emulated=True):
        exact, fused = run(EXACT_KERNELS, dtype, 0), run(AUTO_KERNELS, dtype, 0)
    assert not torch.equal(fused.latents, exact.latents)
    assert drift.psnr(fused.latents, exact.latents) > ALLOWED_DB[dtype]
