"""Blocks through torch.compile: one program for all of a class, whatever plans, prompts and strengths there are."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from wanqwen.core import compiling, runtime
from wanqwen.core.compiling import CompiledBlocks, num_compiled
from wanqwen.core.ops import attention_choice
from wanqwen.core.ops.attention import attention_int8
from wanqwen.core.types import Conditioning, FastPaths, ModelHandle, SampleRequest
from wanqwen.loading import DEMO_FOLDER, load_model, with_lora

from ... import loras
from .test_streamed_models import stream

pytestmark = pytest.mark.usefixtures("cuda_runtime")

COMPILED = FastPaths(compile="blocks")
CASES = {"wan_dit": (96, 3), "qwen_dit": (128, 1)}  # width of the text rows, latent frames
# All blocks of Wan are one program. The last one of Qwen-Image returns less than the others; both are made for the
# first prompt's length, and when a second one comes for any.
PROGRAMS = {"wan_dit": 1, "qwen_dit": 4}
ALLOWED = 1e-4  # of a result's size: traced operations are the same, but for rotations, which are no complex products


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace blocks as torch.compile does and run what was traced: making code of it takes minutes."""
    torch._dynamo.reset()

    @cache
    def traced(kind: type[nn.Module]) -> Callable:
        return torch.compile(kind.forward, fullgraph=True, backend="eager")

    monkeypatch.setattr(compiling, "compiled", traced)
    yield
    torch._dynamo.reset()


def asked(file: str, rows: tuple[int, int] = (40, 4)) -> SampleRequest:
    width, frames = CASES[file]
    generator = torch.Generator().manual_seed(0)
    positive, negative = (Conditioning(text=torch.randn(1, n, width, generator=generator)) for n in rows)
    latent = torch.zeros(1, 16, frames, 8, 8)
    return SampleRequest(latent=latent, positive=positive, negative=negative, steps=2, guidance=(2.0,), seed=5)


def programs(handle: ModelHandle, request: SampleRequest) -> tuple[int, Tensor, list[str]]:
    """Return how many programs a compiled run makes, its result, and what it says."""
    before, said = num_compiled(), []
    result = runtime.generate(replace(handle, fast=COMPILED), request, tell=said.append)
    assert not any("not compiled" in line for line in said), said
    return num_compiled() - before, result, said


def near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() < ALLOWED * wanted.norm())


@pytest.mark.parametrize("file", CASES)
def test_plans_prompts_and_strengths_need_no_program_of_their_own(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, request = load_model(DEMO_FOLDER / f"{file}.safetensors"), asked(file)
    number, found, said = programs(handle, request)
    assert number == PROGRAMS[file] and near(found, runtime.generate(handle, request))
    assert any(line.startswith("Blocks are compiled") for line in said)
    first_step = next(line for line in said if line.startswith("The first step took"))
    assert f"in which {number} functions were compiled" in first_step
    assert programs(handle, asked(file, (31, 9)))[0] == 0, "other prompts"
    stream(monkeypatch, (0, 1, 2, 3), 2)
    number, streamed, _ = programs(handle, request)
    assert number == 0 and torch.equal(streamed, found), "all blocks stream"
    stream(monkeypatch, (1, 3), 3, interleaved=True)
    number, streamed, _ = programs(handle, request)
    assert number == 0 and torch.equal(streamed, found), "some stream, interleaved"
    state = {name: torch.empty(shape) for name, shape in handle.family.files.parameters(handle.identity.config).items()}
    path = loras.write(tmp_path / "lora.safetensors", loras.low_rank(state, loras.DIALECTS["official"]))
    changed = [with_lora(handle, path, strength)[0] for strength in (0.3, 0.7)]
    number, with_it, _ = programs(changed[0], request)
    assert number <= PROGRAMS[file] and near(with_it, runtime.generate(changed[0], request)), "a LoRA: a program more"
    number, stronger, _ = programs(changed[1], request)
    assert number == 0 and near(stronger, runtime.generate(changed[1], request)), "another strength"
    assert not near(stronger, with_it) and programs(handle, request)[0] == 0, "and none again"


def test_attention_in_8_bits_is_a_part_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, request = load_model(DEMO_FOLDER / "wan_dit.safetensors"), asked("wan_dit")
    own = replace(attention_choice.BACKENDS["int8"], load=lambda dtype, device, width: (attention_int8, ""))
    monkeypatch.setitem(attention_choice.BACKENDS, "int8", own)
    monkeypatch.setattr(attention_choice, "LEAST_KEYS", 1)
    wanted = runtime.generate(replace(handle, fast=FastPaths(attention="int8")), request)
    said: list[str] = []
    found = runtime.generate(replace(handle, fast=replace(COMPILED, attention="int8")), request, tell=said.append)
    assert not any("not compiled" in line for line in said) and any("int8 kernel" in line for line in said)
    assert (found - wanted).norm() < 1e-3 * wanted.norm() < (wanted - runtime.generate(handle, request)).norm()


def test_a_compiler_that_fails_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> Callable:
        raise OSError("no compiler in the path\nat all")

    monkeypatch.setattr(
        compiling, "compiled", cache(lambda kind: torch.compile(kind.forward, fullgraph=True, backend=broken))
    )
    handle, request = load_model(DEMO_FOLDER / "wan_dit.safetensors"), asked("wan_dit")
    said: list[str] = []
    found = runtime.generate(replace(handle, fast=COMPILED), request, tell=said.append)
    assert torch.equal(found, runtime.generate(handle, request))
    lines = [line for line in said if "not compiled" in line]
    assert len(lines) == 1 and "no compiler in the path" in lines[0] and "run as they are" in lines[0]


class _Breaks(nn.Module):
    """Changes what it is given, and then does what can't be traced."""

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        torch._dynamo.graph_break()
        return x * 2


def test_a_block_that_can_t_be_compiled_has_changed_nothing_when_it_runs_as_it_is() -> None:
    said: list[str] = []
    visit = CompiledBlocks(said.append)
    assert torch.equal(visit(_Breaks(), torch.zeros(3)), torch.full((3,), 2.0)) and len(said) == 1
    assert torch.equal(visit(_Breaks(), torch.zeros(3)), torch.full((3,), 2.0)) and len(said) == 1


def test_too_many_programs_end_compiling_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    monkeypatch.setattr(compiling, "MOST_VERSIONS", 1)
    said: list[str] = []
    visit, block = CompiledBlocks(said.append), Doubles()
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(visit(block, torch.ones(3, dtype=dtype)), torch.full((3,), 2.0, dtype=dtype))
    assert len(said) == 1 and "limit" in said[0]


def test_what_goes_wrong_in_a_block_is_no_failure_to_compile() -> None:
    class Full(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.full.of_memory(x)

    @torch.library.custom_op("full::of_memory", mutates_args=())
    def of_memory(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("the card is full")

    of_memory.register_fake(torch.empty_like)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        CompiledBlocks(pytest.fail)(Full(), torch.zeros(3))
