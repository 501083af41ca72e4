"""What does torch.compile cost and bring, and what makes it compile again?

    python -m wanqwen.bench.compiled_blocks [--steps 4]

The miniatures run on this machine's device: a first run, then runs with other prompts, another size, a LoRA and other
strengths of it. For each the seconds of the run, plain and compiled, and how many functions were compiled in it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..core import runtime
from ..core.compiling import num_compiled
from ..core.types import Conditioning, FastPaths, ModelHandle, SampleRequest
from ..loading import DEMO_FOLDER, load_model, with_lora

MODELS = {"wan_dit": (96, 3), "qwen_dit": (128, 1)}  # width of the text rows, latent frames
RANK = 4


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps
    for file in MODELS:
        sys.stdout.write(f"{file}, {steps} steps\n| run | plain | compiled | functions compiled |\n|---|---|---|---|\n")
        with tempfile.TemporaryDirectory() as folder:
            for name, handle, request in _runs(file, steps, Path(folder)):
                plain, _ = _run(handle, request)
                compiled, number = _run(replace(handle, fast=FastPaths(compile="blocks")), request)
                sys.stdout.write(f"| {name} | {plain:.2f} s | {compiled:.2f} s | {number} |\n")
                sys.stdout.flush()


def _runs(file: str, steps: int, folder: Path) -> Iterator[tuple[str, ModelHandle, SampleRequest]]:
    handle = load_model(DEMO_FOLDER / f"{file}.safetensors")
    yield "first", handle, _request(file, steps)
    yield "again", handle, _request(file, steps)
    yield "other prompts", handle, _request(file, steps, rows=(23, 9))
    yield "another size", handle, _request(file, steps, size=(16, 12))
    yield "a third size", handle, _request(file, steps, size=(12, 20))
    lora = _write_lora(handle, folder / "lora.safetensors")
    for name, strength in (("with a LoRA", 0.3), ("another strength", 0.7), ("and another", 1.1)):
        yield name, with_lora(handle, lora, strength)[0], _request(file, steps)
    yield "without it", handle, _request(file, steps)


def _request(file: str, steps: int, rows: tuple[int, int] = (40, 4), size: tuple[int, int] = (16, 8)) -> SampleRequest:
    width, frames = MODELS[file]
    positive, negative = (Conditioning(text=torch.ones(1, n, width)) for n in rows)
    latent = torch.zeros(1, 16, frames, *size)
    return SampleRequest(latent=latent, positive=positive, negative=negative, steps=steps, guidance=(2.0,))


def _write_lora(handle: ModelHandle, path: Path) -> Path:
    """Write a LoRA of the layers in blocks that are as wide as the model."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in handle.family.files.parameters(handle.identity.config).items():
        if len(shape) == 2 and shape[0] == shape[1] and "blocks." in name:
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.01
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.01
    save_file(tensors, path)
    return path


def _run(handle: ModelHandle, request: SampleRequest) -> tuple[float, int]:
    before, started = num_compiled(), time.perf_counter()
    runtime.generate(handle, request)
    return time.perf_counter() - started, num_compiled() - before


if __name__ == "__main__":
    main()
