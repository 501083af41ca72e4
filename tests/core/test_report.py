"""A run in lines for people; the node's own test has the line of a LoRA and the whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from wanqwen.core import host, report
from wanqwen.core.ops.choice import EXACT
from wanqwen.core.sampling.schedule import plan_steps
from wanqwen.core.types import Conditioning, SampleRequest
from wanqwen.loading import load_model

from ..nodes import tiny

CPU = torch.device("cpu")
PROMPT = Conditioning(text=torch.zeros(1, 3, tiny.TEXT.dim))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "64 x 32, 9 frames; 6 steps of unipc, no guidance; seed 4"),
        (
            {"negative": PROMPT, "guidance": (6, 6, 5, 4, 4, 4), "shift": 8.0},
            "64 x 32, 9 frames; 6 steps of unipc, shift 8, guidance 4 to 6; seed 4",
        ),
        (
            {"start_step": 2, "end_step": 4, "add_noise": False, "solver": "euler"},
            "64 x 32, 9 frames; 2 steps of euler (numbers 3 to 4 of 6), no guidance; seed 4",
        ),
        (
            {"latent": torch.zeros(2, 16, 1, 4, 8), "denoise": 0.5, "shift": 1.0},
            "64 x 32, 2 of them; 6 steps of unipc, shift 1, from noise level 0.50, no guidance; seed 4",
        ),
    ],
)
def test_the_settings_are_said_as_they_were_run(changes: dict, said: str, tmp_path: Path) -> None:
    handle = load_model(tiny.write_model(tmp_path / "some.safetensors"))
    request = SampleRequest(latent=torch.zeros(1, 16, 3, 4, 8), positive=PROMPT, steps=6, seed=4, guidance=(1.0,))
    request = replace(request, **changes)
    plan = plan_steps(request, handle.family.schedule(handle.identity.config, tuple(request.latent.shape)))
    what, how = report.described(handle, request, plan, torch.bfloat16, EXACT)
    assert what.startswith(
        "some.safetensors: wan21 custom, 2 blocks of width 48; weights fp32, computed in bfloat16; attention by "
    )
    assert how == said


def test_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 103.0, 103.0, 107.0, 109.0, 112.0, 115.5])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(report, "idle_bytes", lambda: 2_500_000_000)
    monkeypatch.setattr(host, "peak", lambda where: 7_250_000_000)
    costs = report.Costs(CPU)
    costs.opened()
    for _ in range(3):
        costs.step()
    assert costs.lines() == [
        "15.5 s: opening the model 3.0 s, the first step 4.0 s, the others 2.50 s each",
        "VRAM: 7.25 GB at most; RAM kept for the next run: 2.50 GB",
    ]
