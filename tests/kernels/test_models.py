"""Whole models with every kernel, beside the same models in plain PyTorch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wanqwen.core import planning, runtime
from wanqwen.core.blocks import Run
from wanqwen.core.ops import choice
from wanqwen.core.ops.choice import EXACT, FUSED, Ops, choose, proven
from wanqwen.core.types import EXACT_KERNELS, Conditioning, FastPaths, SampleRequest
from wanqwen.loading import load_model
from wanqwen.qwen_image.config import QwenImageConfig
from wanqwen.tests.nodes import tiny
from wanqwen.tests.qwen_image import test_transformer as qwen
from wanqwen.tests.wan import test_transformer as wan

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the largest number of a velocity: what float32 sums in another order, and bfloat16 a few numbers of which fall on
# the other side of a half step, come to in two blocks.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try kernels on few rows: the interpreter takes them one by one."""
    monkeypatch.setattr(choice, "PROBE", replace(choice.PROBE, rows=3))


def fused(heads: tuple[int, int], dtype: torch.dtype, calls: dict[str, int]) -> Ops:
    """Return all operations as kernels, which count their calls."""
    found, said = proven(heads, dtype, DEVICE)
    assert all(getattr(found, name) is not getattr(EXACT, name) for name in FUSED), said

    def counted(name: str, kernel: Callable) -> Callable:
        def call(*arguments):
            calls[name] = calls.get(name, 0) + 1
            return kernel(*arguments)

        return call

    return Ops(**{name: counted(name, getattr(found, name)) for name in FUSED})


def velocities(model, inputs: tuple[Tensor, Tensor, Tensor], run: Run, **more) -> Tensor:
    x, timestep, text = (tensor.to(DEVICE) for tensor in inputs)
    with torch.inference_mode():
        return model(x, timestep.cpu(), model.prompt(text, run), run, **more)


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_wan_with_every_kernel_is_wan(dtype: torch.dtype) -> None:
    model, calls = wan.made(wan.CONFIG, dtype).to(DEVICE), {}
    exact = velocities(model, wan.inputs(), Run(dtype=dtype))
    found = velocities(model, wan.inputs(), Run(dtype=dtype, ops=fused((3, 16), dtype, calls)))
    assert wan.error(found, exact) < ALLOWED[dtype]
    assert calls == {"layer_norm": 2, "norm_rotate": 4, "add_norm": 4, "rms_norm": 2, "add_to_rows": 2}


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_qwen_image_with_every_kernel_is_qwen_image(dtype: torch.dtype) -> None:
    """With a batch of two, each with a modulation of its own, and a reference that follows another."""
    config = QwenImageConfig(**qwen.SIZES, zero_cond_t=True)
    model, calls = qwen.build(config, torch.Generator().manual_seed(0)).to(DEVICE), {}
    references = [qwen.reference(4, 6).to(DEVICE)]
    exact = velocities(model, qwen.inputs(batch=2), Run(dtype=dtype), references=references)
    ops = fused((3, 12), dtype, calls)
    found = velocities(model, qwen.inputs(batch=2), Run(dtype=dtype, ops=ops), references=references)
    assert qwen.error(found, exact) < ALLOWED[dtype]
    assert set(calls) == {"layer_norm", "norm_rotate", "add_norm", "add_to_rows"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a card on which kernels run."""

    def chosen(mode: str, heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Ops, list[str]]:
        cuda = torch.device("cuda")
        return choose(mode, heads, dtype, cuda) if mode == EXACT_KERNELS else proven(heads, dtype, device)

    monkeypatch.setattr(runtime, "choose", chosen)


@pytest.mark.usefixtures("on_a_card")
def test_a_run_says_what_it_takes_and_its_bits_follow_from_it(path: Path) -> None:
    handle = load_model(path)
    request = SampleRequest(
        latent=torch.zeros(1, 16, 1, 4, 6), positive=Conditioning(text=torch.ones(1, 5, tiny.TEXT.dim)), steps=2
    )
    said: list[str] = []
    first = runtime.generate(handle, request, tell=said.append)
    assert "Fused kernels: layer_norm, rms_norm, norm_rotate, add_to_rows, add_norm." in said
    assert torch.equal(first, runtime.generate(handle, request))
    said.clear()
    exact = runtime.generate(replace(handle, fast=FastPaths(kernels=EXACT_KERNELS)), request, tell=said.append)
    assert "Fused kernels are off: the result has the bits of plain PyTorch." in said
    assert torch.allclose(first, exact, atol=1e-4 * float(exact.abs().max()))


def test_the_memory_of_a_run_is_planned_with_its_kernels(path: Path) -> None:
    handle = load_model(path)
    config, shape = handle.identity.config, (1, 16, 5, 32, 32)
    scene = planning.Scene(
        family=handle.family, config=config, latent_shape=shape, dtype=torch.bfloat16,
        conditionings=planning.conditionings_of(handle.family, config, shape, (5, 4)),
    )  # fmt: skip
    loaded, ops = runtime.loaded_of(handle, torch.bfloat16), proven(handle.family.heads(config), scene.dtype, DEVICE)[0]
    plain, kernels = (
        planning.working_bytes(loaded, one, interleaved=False) for one in (scene, replace(scene, ops=ops))
    )
    assert 0 < kernels < plain
