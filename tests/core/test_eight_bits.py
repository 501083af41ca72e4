"""A whole run whose products are in 8 bits: near the exact one, chosen for this run alone, and said."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wanqwen.bench.eight_bits import psnr
from wanqwen.core import runtime
from wanqwen.core.types import Conditioning, FastPaths, ModelHandle, SampleRequest
from wanqwen.demo.drift import write_in_8_bits
from wanqwen.loading import DEMO_FOLDER, load_model

CASES = {"wan_dit": (96, 3), "qwen_dit": (128, 1)}  # width of the text rows, latent frames
# Of trained miniatures after all steps. In fp8 a number has three bits after the first one.
LEAST_DECIBELS = {torch.int8: 35, torch.float8_e4m3fn: 25}


def run(model: ModelHandle, products: str, asked: SampleRequest) -> tuple[Tensor, list[str]]:
    said: list[str] = []
    return runtime.generate(replace(model, fast=FastPaths(products=products)), asked, tell=said.append), said


@pytest.mark.parametrize("dtype", LEAST_DECIBELS, ids=str)
@pytest.mark.parametrize("file", CASES)
def test_a_run_in_8_bits_is_near_the_exact_one(tmp_path: Path, file: str, dtype: torch.dtype) -> None:
    model = load_model(write_in_8_bits(DEMO_FOLDER / f"{file}.safetensors", tmp_path / "8.safetensors", dtype))
    width, frames = CASES[file]
    generator = torch.Generator().manual_seed(0)
    positive, negative = (Conditioning(text=torch.randn(1, n, width, generator=generator)) for n in (40, 4))
    latent = torch.zeros(1, 16, frames, 16, 8)
    asked = SampleRequest(latent=latent, positive=positive, negative=negative, steps=6, guidance=(2.0,), seed=5)
    exact, said = run(model, "exact", asked)
    assert not any("Products in" in line for line in said)
    rounded, said = run(model, "8bit", asked)
    assert sum(line.startswith("Products in") for line in said) == 1
    decibels = psnr(rounded, exact, float(exact.max() - exact.min()))
    print(f"{file} {dtype}: latents of 8-bit products are {decibels:.1f} dB from the exact ones")
    assert not torch.equal(rounded, exact) and decibels >= LEAST_DECIBELS[dtype]
    assert torch.equal(run(model, "auto", asked)[0], exact), "the next run has what it asked for"
