"""The benchmark of a whole step: it runs, and counts the operations that a step takes."""

import sys
from argparse import Namespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from wanqwen.bench import step

CPU = torch.device("cpu")


def test_operations_are_those_of_the_products_of_blocks() -> None:
    counts = []
    for layers in (1, 2):
        options = Namespace(dim=128, ffn=320, layers=layers, size="64x32x5", text=7, comfyui=None)
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            one = step.wan_step(options, CPU, torch.float32)
            with FlopCounterMode(display=False) as counter:
                one.calls["ours"]()
        counts.append((one.operations, counter.get_total_flops()))
    (first, first_counted), (second, second_counted) = counts
    assert second - first == second_counted - first_counted > 0


def test_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["step", "wan", "--dim", "128", "--ffn", "256", "--layers", "1", "--size", "32x32x1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", small)
    step.main()
    said = capsys.readouterr().out
    assert "ours/diffusers: time" in said and "utilisation: ours " in said
    assert float(said.split("diffusers differs by ")[1].split(")")[0]) < 1e-4
