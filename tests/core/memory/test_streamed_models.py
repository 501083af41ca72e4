"""Whole runs of both families with blocks that stream: the very bits of a resident run, also after a run that broke."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from wanqwen.core import host, pace, planning, runtime
from wanqwen.core.memory import kept
from wanqwen.core.memory import resident as memory
from wanqwen.core.memory.placement import Plan, spread
from wanqwen.core.memory.supply import Source
from wanqwen.core.ops.linear import Linear
from wanqwen.core.sampling.sample import SampleError
from wanqwen.core.types import Conditioning, Control, FastPaths, ModelHandle, SampleRequest
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.demo.drift import write_in_8_bits
from wanqwen.loading import DEMO_FOLDER, load_model, with_lora
from wanqwen.tests.gguf_files import quantised, write

from ... import loras
from ...nodes import tiny
from .late_link import LateLink

pytestmark = pytest.mark.usefixtures("cuda_runtime")

VACE = "vace"  # two blocks, two VACE blocks, guided by two controls
# The width of a model's text rows. The second one is partly in scaled fp8, the third the first one in blocks of GGUF.
FILES = {"wan_dit": 96, "qwen_dit": 128, "wan_gguf": 96, VACE: tiny.TEXT.dim}
KINDS = ("Q8_0", "Q5_1", "Q4_0")


@pytest.fixture(scope="module")
def wan_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, tensors = DEMO_FOLDER / "wan_dit.safetensors", {}
    for i, (name, tensor) in enumerate(load_file(path).items()):
        is_matrix = name.startswith("blocks.") and tensor.dim() == 2
        tensors[name] = quantised(tensor, KINDS[i % len(KINDS)]) if is_matrix else tensor
    own = open_checkpoint(path).metadata["wanqwen"]
    return write(tmp_path_factory.mktemp("gguf") / "wan.gguf", tensors, {"wanqwen": own})


@pytest.fixture(scope="module")
def vace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("vace") / "vace.safetensors", tiny.VACE)


@pytest.fixture(params=FILES)
def run(request: pytest.FixtureRequest) -> tuple[ModelHandle, SampleRequest]:
    generator, width = torch.Generator().manual_seed(0), FILES[request.param]
    is_demo = (path := DEMO_FOLDER / f"{request.param}.safetensors").is_file()
    positive, negative = (Conditioning(text=torch.randn(1, n, width, generator=generator)) for n in (7, 4))
    latent = torch.zeros(1, 16, 1, 8, 8)
    if request.param == VACE:
        contexts = [torch.randn(1, tiny.VACE.vace_dim, 1, 8, 8, generator=generator) for _ in range(2)]
        controls = tuple(Control(context=c, strength=s) for c, s in zip(contexts, (1.0, 0.6), strict=True))
        positive, negative = replace(positive, controls=controls), replace(negative, controls=controls[:1])
    asked = SampleRequest(latent=latent, positive=positive, negative=negative, steps=3, guidance=(3.0,), seed=5)
    return load_model(path if is_demo else request.getfixturevalue(request.param)), asked


def with_at_least(plan: Plan, at_least: int) -> Plan:
    """Return the plan with so many blocks streaming, if it has fewer."""
    if len(plan.streaming) >= at_least:
        return plan
    streaming = spread(4, at_least)
    return replace(plan, streaming=streaming, num_slots=2, sources=dict.fromkeys(streaming, Source.PINNED))


def stream(
    monkeypatch: pytest.MonkeyPatch,
    streaming: tuple[int, ...],
    num_slots: int,
    kind: Source = Source.DISK,
    interleaved: bool = False,
) -> list[LateLink]:
    """Make the CPU stand for a device that nothing is on yet, with this plan; return the links made."""
    links = []

    def link_to(where: torch.device, slots: int) -> LateLink:
        links.append(LateLink())
        return links[-1]

    plan = Plan(
        streaming=streaming, num_slots=num_slots, sources=dict.fromkeys(streaming, kind), interleaved=interleaved
    )
    monkeypatch.setattr(memory, "computes_in_ram", lambda device: False)
    monkeypatch.setattr(memory, "link_to", link_to)
    monkeypatch.setattr(planning, "make_plan", lambda *asked: with_at_least(plan, asked[3]))
    return links


@pytest.mark.parametrize(
    ("streaming", "num_slots", "kind", "interleaved"),
    [
        ((0, 1, 2, 3), 2, Source.PINNED, True),
        ((0, 2, 3), 1, Source.STAGED, False),
        ((1, 3), 3, Source.DISK, True),
        ((), 0, Source.DISK, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_runs_give_the_bits_of_resident_ones(
    run: tuple[ModelHandle, SampleRequest],
    monkeypatch: pytest.MonkeyPatch,
    streaming: tuple[int, ...],
    num_slots: int,
    kind: Source,
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    handle, request = replace(run[0], dtype=dtype), run[1]
    links = stream(monkeypatch, (), 0)
    wanted = runtime.generate(handle, request)
    links = stream(monkeypatch, streaming, num_slots, kind, interleaved)
    for _ in range(2):
        assert torch.equal(runtime.generate(handle, request), wanted)
    assert len(links) == 2 and all(link.loads >= len(streaming) for link in links)
    for link in links:
        link.spoil()
    monkeypatch.undo()
    assert torch.equal(runtime.generate(handle, request), wanted)


@pytest.fixture
def changed(run: tuple[ModelHandle, SampleRequest], tmp_path: Path) -> ModelHandle:
    """The model with LoRAs that change all there is, one of them in some steps only."""
    handle = run[0]
    state = {name: torch.empty(shape) for name, shape in handle.family.files.parameters(handle.identity.config).items()}
    for name, writer, start in (("all", loras.differences, 0.0), ("late", loras.loha, 0.5)):
        handle, _ = with_lora(handle, loras.write(tmp_path / f"{name}.safetensors", writer(state)), 0.3, start)
    return handle


@pytest.mark.parametrize(
    ("streaming", "num_slots", "kind", "interleaved"),
    [((0, 1, 2, 3), 2, Source.PINNED, True), ((1, 3), 3, Source.DISK, False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_runs_with_loras_give_the_bits_of_resident_ones(
    run: tuple[ModelHandle, SampleRequest],
    changed: ModelHandle,
    monkeypatch: pytest.MonkeyPatch,
    streaming: tuple[int, ...],
    num_slots: int,
    kind: Source,
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    (plain, request), handle = (replace(run[0], dtype=dtype), run[1]), replace(changed, dtype=dtype)
    wanted, without = runtime.generate(handle, request), runtime.generate(plain, request)
    assert not torch.equal(wanted, without)
    stream(monkeypatch, (), 0)
    assert torch.equal(runtime.generate(handle, request), wanted)
    links = stream(monkeypatch, streaming, num_slots, kind, interleaved)
    for _ in range(2):
        assert torch.equal(runtime.generate(handle, request), wanted)
        assert torch.equal(runtime.generate(plain, request), without)
    for link in links:
        link.spoil()
    monkeypatch.undo()
    assert torch.equal(runtime.generate(handle, request), wanted)
    assert torch.equal(runtime.generate(plain, request), without)


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_in_8_bits_stream_with_loras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interleaved: bool
) -> None:
    path = write_in_8_bits(DEMO_FOLDER / "wan_dit.safetensors", tmp_path / "wan.safetensors", torch.int8)
    handle = replace(load_model(path), fast=FastPaths(products="8bit"))
    state = {name: torch.empty(shape) for name, shape in handle.family.files.parameters(handle.identity.config).items()}
    written = loras.low_rank(state, loras.DIALECTS["official"])
    handle, _ = with_lora(handle, loras.write(tmp_path / "lora.safetensors", written), 0.3)
    texts = (Conditioning(text=torch.randn(1, n, 96, generator=torch.Generator().manual_seed(n))) for n in (7, 4))
    positive, negative = texts
    request = SampleRequest(
        latent=torch.zeros(1, 16, 3, 8, 8), positive=positive, negative=negative, steps=2, guidance=(3.0,), seed=5
    )
    wanted = runtime.generate(handle, request)
    assert not torch.equal(wanted, runtime.generate(replace(handle, fast=FastPaths()), request))
    stream(monkeypatch, (0, 1, 3), 2, Source.PINNED, interleaved)
    assert torch.equal(runtime.generate(handle, request), wanted)


def test_loras_survive_passes_that_run_out_of_memory(
    run: tuple[ModelHandle, SampleRequest], changed: ModelHandle, crowded: list[int]
) -> None:
    (handle, request), said = run, []
    wanted, without = runtime.generate(changed, request), runtime.generate(handle, request)
    for needed in (1, 4):
        crowded[0] = needed
        assert torch.equal(runtime.generate(changed, request, tell=said.append), wanted)
    assert len([line for line in said if line.startswith("The device ran out of memory; now ")]) > 1
    crowded[0] = 0
    assert torch.equal(runtime.generate(handle, request), without)


def test_a_block_that_ran_out_of_memory_is_let_go_before_the_next_plan(
    run: tuple[ModelHandle, SampleRequest], changed: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed copies are in the block then, each with the parameter whose place it takes."""
    request, bound, left = run[1], [], []
    wanted = runtime.generate(changed, request)
    stream(monkeypatch, (), 0)
    before, come, at = memory.Residency.before, memory.Residency.come, Linear.at

    def bind(self: memory.Residency, i: int) -> None:
        before(self, i)
        if i == 2 and not self.plan.streaming:
            bound[:] = [weakref.ref(parameter) for parameter in self.loaded.blocks[i].parameters()]

    def plan(self: memory.Residency, at_least: int = 0) -> None:
        left.append([ref() for ref in bound if ref() is not None])
        come(self, at_least)

    def ready(self: Linear, *arguments: object) -> Callable[[Tensor], Tensor]:
        if bound and self is last and len(left) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return at(self, *arguments)

    block = runtime.loaded_of(changed, runtime.compute_dtype(changed, torch.device("cpu"))).blocks[2]
    *_, last = (part for part in block.modules() if isinstance(part, Linear))
    monkeypatch.setattr(memory.Residency, "before", bind)
    monkeypatch.setattr(memory.Residency, "come", plan)
    monkeypatch.setattr(Linear, "at", ready)
    assert torch.equal(runtime.generate(changed, request), wanted)
    assert left == [[], []] and bound


def test_a_run_that_broke_off_leaves_nothing_behind(
    run: tuple[ModelHandle, SampleRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, request = run
    wanted = runtime.generate(handle, request)
    links = stream(monkeypatch, (0, 1, 3), 2)
    for failing in range(1, 12):
        asked = []

        def interrupt(asked: list[int] = asked, failing: int = failing) -> None:
            asked.append(1)
            if len(asked) == failing:
                raise InterruptedError

        monkeypatch.setattr(host, "check_interrupt", interrupt)
        with pytest.raises(InterruptedError):
            runtime.generate(handle, request)
    monkeypatch.setattr(host, "check_interrupt", lambda: None)
    assert torch.equal(runtime.generate(handle, request), wanted)
    for link in links:
        link.spoil()
    monkeypatch.undo()
    assert torch.equal(runtime.generate(handle, request), wanted)


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that everything fits on, but where nothing runs until so many blocks have left it; how many is set."""
    needed = [0]
    stream(monkeypatch, (), 0)
    original = memory.Residency.before

    def before(self: memory.Residency, i: int) -> None:
        if i == 2 and len(self.plan.streaming) < needed[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, i)

    monkeypatch.setattr(memory.Residency, "before", before)
    return needed


def test_a_pass_that_runs_out_of_memory_is_repeated_with_fewer_blocks_there(
    run: tuple[ModelHandle, SampleRequest], crowded: list[int]
) -> None:
    handle, request = run
    wanted, said = runtime.generate(handle, request), []
    for needed in (1, 3, 4):
        crowded[0] = needed
        assert torch.equal(runtime.generate(handle, request, tell=said.append), wanted)
    broke = [line for line in said if line.startswith("The device ran out of memory; now ")]
    assert broke[0].endswith("1 of 4 blocks stay on the device, 3 stream through 2 slots: 3 from pinned RAM")
    assert broke[-1].endswith("0 of 4 blocks stay on the device, 4 stream through 2 slots: 4 from pinned RAM")
    assert "4 of 4 blocks stay on the device" in said


def test_where_memory_never_suffices_the_last_good_latent_is_kept(
    run: tuple[ModelHandle, SampleRequest], crowded: list[int]
) -> None:
    handle, request = run
    wanted = runtime.generate(handle, replace(request, end_step=2, solver="euler"))

    class Late:
        def update(self, done: int, total: int, x0: torch.Tensor) -> None:
            crowded[0] = 5 if done == 2 else 0

    with pytest.raises(SampleError, match=r"step 3 of 3: cpu is out of memory with 1 x 1 x 8 x 8 .* smaller") as caught:
        runtime.generate(handle, replace(request, solver="euler"), Late())
    assert caught.value.steps_done == 2 and torch.equal(caught.value.latent, wanted)
    crowded[0] = 0
    assert runtime.generate(handle, request).isfinite().all()


@pytest.mark.parametrize("spills", [True, False])
def test_a_driver_that_swaps_is_met_with_a_new_plan(
    run: tuple[ModelHandle, SampleRequest], monkeypatch: pytest.MonkeyPatch, spills: bool
) -> None:
    """The third step takes long on a card without free memory; from then on more blocks stream, if drivers do that."""
    handle, request = run
    request = replace(request, steps=5)
    stream(monkeypatch, (), 0)
    wanted = runtime.generate(handle, request)
    stream(monkeypatch, (), 0)
    now, said = [0.0], []

    class Clock(pace.Pace):
        def step(self) -> float:
            self._last, now[0] = now[0], now[0] + (30.0 if self.steps == 2 else 1.0)
            monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
            return super().step()

    monkeypatch.setattr(runtime, "Pace", Clock)
    monkeypatch.setattr(host, "driver_free", lambda device: 0)
    monkeypatch.setattr(host, "driver_spills", lambda: spills)
    assert torch.equal(runtime.generate(handle, request, tell=said.append), wanted)
    lines = [line for line in said if "the driver has begun to swap" in line]
    if not spills:
        assert not lines
        return
    [line] = lines
    assert line.startswith("A step took 30.0 s: ") and "Now 1 of 4 blocks stay on the device, 3 stream" in line


def test_the_first_step_tells_how_long_a_block_computes(
    run: tuple[ModelHandle, SampleRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, request = run
    stream(monkeypatch, (), 0)
    runtime.generate(handle, request)
    dtype = runtime.compute_dtype(handle, torch.device("cpu"))
    loaded = runtime.loaded_of(handle, dtype)
    scene = runtime.scene_of(handle, request, dtype)
    [(key, seconds)] = loaded.visit_seconds.items()
    assert key == scene.key and 0 < seconds < 1
    assert planning.job_of(loaded, scene, None).visit_seconds == seconds


def test_the_next_run_finds_in_ram_what_the_last_one_kept(
    run: tuple[ModelHandle, SampleRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second plan counts the first one's slabs as RAM that it may have; what it does not name is let go."""
    handle, request = run
    loaded = runtime.loaded_of(handle, runtime.compute_dtype(handle, torch.device("cpu")))
    blocks = [layout.nbytes for layout in loaded.layouts()[:-1]]
    stream(monkeypatch, (0, 1, 2, 3), 2, Source.PINNED)
    wanted = runtime.generate(handle, request)
    assert loaded.kept_bytes == sum(blocks)
    seen = []
    plan = Plan(streaming=(1, 3), num_slots=1, sources={1: Source.PINNED, 3: Source.DISK})
    monkeypatch.setattr(planning, "make_plan", lambda job, machine, *_: seen.append(machine.ram) or plan)
    monkeypatch.setattr(host, "available_ram", lambda: 5 << 30)
    monkeypatch.setattr(planning, "idle_bytes", lambda but: 0)  # of the models of other tests
    assert torch.equal(runtime.generate(handle, request), wanted)
    assert seen == [(5 << 30) + sum(blocks)] * len(seen) and seen
    assert set(loaded.masters) == {1}


def test_a_device_without_the_memory_of_the_plan_gets_another(
    run: tuple[ModelHandle, SampleRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking what the plan names fails as long as more than one block stays; nothing of the failed tries is left."""
    handle, request = run
    stream(monkeypatch, (), 0)
    wanted = runtime.generate(handle, request)
    taken, original = [], memory.Residency._empty

    def empty(self: memory.Residency, num_bytes: int) -> torch.Tensor:
        if len(self.plan.streaming) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken.append(num_bytes)
        return original(self, num_bytes)

    monkeypatch.setattr(memory.Residency, "_empty", empty)
    assert torch.equal(runtime.generate(handle, request), wanted)
    assert len(taken) == 1 + 2  # one that stays, two slots
    monkeypatch.setattr(memory.Residency, "_empty", lambda *_: torch.empty(1 << 60))
    with pytest.raises(RuntimeError, match=r"out of memory, even with all blocks streaming|can't allocate memory"):
        runtime.generate(handle, request)
    monkeypatch.setattr(memory.Residency, "_empty", original)
    assert torch.equal(runtime.generate(handle, request), wanted)


def test_idle_models_give_their_ram_to_the_one_that_runs(
    run: tuple[ModelHandle, SampleRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, request = run
    other = replace(handle, weights=type(handle.weights)())
    dtype = runtime.compute_dtype(handle, torch.device("cpu"))
    idle, loaded = (runtime.loaded_of(one, dtype) for one in (other, handle))
    stream(monkeypatch, (0, 1, 2, 3), 2, Source.PINNED)
    wanted = runtime.generate(other, request)
    assert idle.kept_bytes and kept.idle_bytes(loaded) >= idle.kept_bytes
    # Where RAM suffices nothing is taken from anybody.
    runtime.generate(handle, request)
    assert idle.kept_bytes and loaded.kept_bytes
    loaded.keep_only(())
    monkeypatch.setattr(host, "available_ram", lambda: (8 << 30) if not idle.kept_bytes else 0)
    assert torch.equal(runtime.generate(handle, request), wanted)
    assert not idle.kept_bytes and loaded.kept_bytes
