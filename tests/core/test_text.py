"""What text encoders share: the cache, where to run, the table that stays on file, blocks that visit the device."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from wanqwen.core import host
from wanqwen.core.memory.placement import HEADROOM
from wanqwen.core.memory.slab import Loaded
from wanqwen.core.memory.supply import Source
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.ops import formats
from wanqwen.core.text import (
    Design,
    EmbeddingCache,
    Footprint,
    Part,
    Placement,
    compute_dtype,
    num_parameters,
    some,
)
from wanqwen.core.types import Checkpoint, Identity, TensorInfo
from wanqwen.core.weights.reader import open_checkpoint

from .memory.conftest import cuda_runtime  # noqa: F401 - a fixture
from .memory.toy import InMemory
from .stand_in import StandIn, limits, nothing_is_left, rest, stand_in

CPU = torch.device("cpu")
WIDTH, DEPTH, VOCABULARY = 4, 4, 6


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Stack(nn.Module):
    """A token embedding, blocks, a wide head, and a buffer that no file carries."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 9)
        self.register_buffer("shift", torch.arange(float(WIDTH), device="cpu"), persistent=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x * scale + self.shift.to(x.dtype))


DESIGN = Design(name="text encoder", build=Stack, blocks="blocks", table="table")
INPUTS = (torch.ones(2, WIDTH), torch.tensor(2.0))
WORK = 10


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in Stack().state_dict().items()}


def written(tensors: dict[str, Tensor], path: Path) -> Checkpoint:
    save_file({f"file.{name}": tensor for name, tensor in tensors.items()}, path)
    return open_checkpoint(path)


def opened(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Part:
    names = {name.removeprefix("file."): name for name in checkpoint.tensors if name != "file.more"}
    return DESIGN.open(checkpoint, names, dtype=dtype)


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return opened(written(state(), tmp_path / "stack.safetensors"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, cuda_runtime: object) -> StandIn:  # noqa: F811
    return stand_in(monkeypatch)


def test_cache_forgets_what_was_unused_longest():
    cache = EmbeddingCache(max_bytes=3 * 40)
    for name in "abc":
        cache.put((name,), torch.zeros(10))
    cache.get(("a",))
    cache.put(("d",), torch.zeros(10))
    assert [cache.get((name,)) is not None for name in "abcd"] == [True, False, True, True]
    cache.put(("large",), torch.zeros(1000))
    assert cache.get(("large",)) is None


def test_the_smaller_limit_counts_and_room_is_asked_for_first(device: StandIn):
    device.free = HEADROOM + 7
    assert Placement().limit(5) == 7 and Placement(max_vram_bytes=9).limit(12) == 7
    assert Placement(max_vram_bytes=4).limit(3) == 4
    assert device.asked == [HEADROOM + wanted for wanted in (5, 9, 3)]
    device.free = HEADROOM - 1
    assert Placement().limit(5) == Placement(max_vram_bytes=4).limit(5) == 0


def test_a_part_is_opened_without_its_weights_and_its_sizes_are_known(part: Part):
    assert all(t.is_meta for t in part.loaded.module.parameters()) and not part.loaded.module.shift.is_meta
    slab = 256 + 4 * WIDTH  # a weight, and a bias behind it at the next multiple of 256
    footprint = DESIGN.footprint(torch.float32, DEPTH, WORK)
    assert footprint.blocks == (slab,) * DEPTH
    assert footprint.others == 512 + 4 * 9  # the buffer, and the two of the head
    assert [layout.nbytes for layout in part.loaded.layouts()] == [*footprint.blocks, footprint.others]
    assert footprint.whole == DEPTH * slab + footprint.others + WORK
    assert footprint.streamed(2) == 2 * slab + footprint.others + WORK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.5), torch.rand(VOCABULARY) + 0.5, torch.rand(VOCABULARY, 1)])
def test_rows_of_the_table_are_those_of_the_whole_table(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype, scale: Tensor | None
):
    tensors = state()
    table = tensors["table.weight"] = tensors["table.weight"].to(stored)
    if scale is not None:
        tensors["table.scale_weight"] = scale
    part, ids = opened(written(tensors, tmp_path / "table.safetensors"), dtype), [2, 0, 5, 2]
    found = part.embed(ids)
    assert torch.equal(found, F.embedding(torch.tensor([ids]), formats.dequantise(table, scale, dtype)))
    assert found.dtype == dtype and "table" not in dict(part.loaded.module.named_modules())


def test_the_table_is_left_in_its_file(part: Part):
    part.embed([1])
    held = part.table._stored["file.table.weight"]
    assert f"{held.data_ptr():x}" and _is_mapped(held, part.table.checkpoint.path)


def _is_mapped(tensor: Tensor, path: Path) -> bool:
    """Say whether a tensor lies in the pages of a file, where the system tells."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    for line in maps.read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(path))
    return False


def test_on_the_cpu_the_weights_are_used_where_they_lie_and_a_limit_means_nothing(part: Part):
    expected = Stack()
    expected.load_state_dict(state())
    with part.on(Placement(max_vram_bytes=1), lambda: 1 / 0) as run:
        assert torch.equal(run(*INPUTS), expected(*INPUTS))
        assert _is_mapped(run.head.weight, part.table.checkpoint.path)
    assert nothing_is_left(part)


@pytest.mark.parametrize("in_memory", [False, True])
def test_blocks_stay_or_stream_as_the_limit_says_with_the_same_bits(
    part: Part, device: StandIn, in_memory: bool, monkeypatch: pytest.MonkeyPatch
):
    if in_memory:
        module = part.loaded.weights.materialise()
        part = Part(name="text encoder", loaded=Loaded(InMemory(module), module.blocks))
    before, rows = rest(part), []
    for limit, (num_streaming, num_slots) in limits(part, WORK).items():
        with torch.no_grad(), part.on(Placement(max_vram_bytes=limit), lambda: WORK) as run:
            rows += [run(*INPUTS) for _ in range(2)]
        plan = device.plans[-1]
        assert (len(plan.streaming), plan.num_slots) == (num_streaming, num_slots), limit
        assert plan.peak <= limit and set(plan.sources.values()) <= {Source.DISK} and not part.loaded.masters
        assert rest(part) == before and nothing_is_left(part)
        device.spoil()
    monkeypatch.undo()
    with torch.no_grad(), part.on(Placement(), lambda: WORK) as run:
        rows.append(run(*INPUTS))
    assert all(torch.equal(found, rows[0]) for found in rows)


def test_what_is_free_is_a_limit_too(part: Part, device: StandIn):
    whole = DESIGN.footprint(torch.float32, DEPTH, WORK).whole
    for free, num_streaming in ((whole, 0), (whole - 1, 3)):
        device.free = HEADROOM + free
        with part.on(Placement(), lambda: WORK) as run:
            run(*INPUTS)
        assert len(device.plans[-1].streaming) == num_streaming and device.asked[-1] == HEADROOM + whole


def test_too_little_memory_is_said_before_anything_moves(part: Part, device: StandIn):
    least = DESIGN.footprint(torch.float32, DEPTH, WORK).streamed(1)
    before = rest(part)
    message = rf"The text encoder can't run in {least - 1} bytes .* or run it on the CPU"
    with pytest.raises(ValueError, match=message), part.on(Placement(max_vram_bytes=least - 1), lambda: WORK):
        raise AssertionError("it may not come so far")
    assert not device.links and rest(part) == before and nothing_is_left(part)


def test_a_stop_is_asked_for_before_every_block_and_leaves_nothing(
    part: Part, device: StandIn, monkeypatch: pytest.MonkeyPatch
):
    before, limit = rest(part), Placement(max_vram_bytes=DESIGN.footprint(torch.float32, DEPTH, WORK).streamed(2))

    def encode() -> Tensor:
        with torch.no_grad(), part.on(limit, lambda: WORK) as run:
            return run(*INPUTS)

    expected = encode()
    for failing in range(1, DEPTH + 1):
        asked = _interrupt_at(monkeypatch, failing)
        with pytest.raises(InterruptedError):
            encode()
        assert len(asked) == failing and rest(part) == before and nothing_is_left(part)
    assert len(_interrupt_at(monkeypatch, 1000)) == 0 and torch.equal(encode(), expected)


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, failing: int) -> list[int]:
    asked = []

    def interrupt() -> None:
        asked.append(1)
        if len(asked) == failing:
            raise InterruptedError

    monkeypatch.setattr(host, "check_interrupt", interrupt)
    return asked


def test_a_stop_works_on_the_cpu_too(part: Part, monkeypatch: pytest.MonkeyPatch):
    _interrupt_at(monkeypatch, 2)
    with pytest.raises(InterruptedError), part.on(Placement(), lambda: WORK) as run:
        run(*INPUTS)
    assert nothing_is_left(part)


def test_a_file_that_breaks_off_while_it_streams_is_named(part: Part, device: StandIn):
    path = part.table.checkpoint.path
    starts = [info.start for info in part.table.checkpoint.tensors.values()]
    path.write_bytes(path.read_bytes()[: min(starts) + 8])
    limit = Placement(max_vram_bytes=DESIGN.footprint(torch.float32, DEPTH, WORK).streamed(1))
    with pytest.raises(ValueError, match="cut off since it was opened"), part.on(limit, lambda: WORK) as run:
        run(*INPUTS)
    assert nothing_is_left(part)


def test_of_a_quantised_file_nothing_else_is_kept(tmp_path: Path, device: StandIn):
    tensors, meant = state(), state()
    for name in [name for name in tensors if name.endswith("linear.weight")]:
        tensors[name] = (tensors[name] / 0.01).to(torch.float8_e4m3fn)
        tensors[name.replace("weight", "scale_weight")] = torch.tensor(0.01)
        meant[name] = formats.dequantise(tensors[name], torch.tensor(0.01), torch.float32)
    part = opened(written(tensors, tmp_path / "fp8.safetensors"), torch.bfloat16)
    other = opened(written(meant, tmp_path / "meant.safetensors"), torch.bfloat16)
    inputs, rows = (INPUTS[0].bfloat16(), INPUTS[1].bfloat16()), []
    for one in (part, other):
        with torch.no_grad(), one.on(Placement(), lambda: WORK) as run:
            rows.append(run(*inputs))
        assert all(t.is_meta for t in one.loaded.module.parameters()) and not one.loaded.masters
    assert torch.equal(*rows)


def test_what_does_not_fit_is_named(tmp_path: Path):
    tensors = state()
    del tensors["head.bias"]
    wrong = {"head.weight": torch.zeros(9, 5), "more": torch.zeros(1), "nobody.bias": torch.ones(1)}
    with pytest.raises(ValueError, match=r"wrong\.safetensors .* does not fit a model of") as error:
        opened(written(tensors | wrong, tmp_path / "wrong.safetensors"))
    for complaint in (
        "1 missing: head.bias",
        "2 not part of this model: file.more, file.nobody.bias",
        "head.weight is [9, 5] instead of [9, 4]",
    ):
        assert complaint in str(error.value)
    whole = state() | {"head.weight": torch.zeros(9, 4, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"kinds of weights stored in a way that can't be read: I8"):
        opened(written(whole, tmp_path / "int8.safetensors"))
    lonely = state() | {"nobody.scale_weight": torch.ones(())}
    with pytest.raises(ValueError, match=r"stored in a way that can't be read: nobody\.scale_weight"):
        opened(written(lonely, tmp_path / "lonely.safetensors"))
    with pytest.raises(ValueError, match=r"table\.weight is \[6, 3\] instead of \[6, 4\]"):
        opened(written(state() | {"table.weight": torch.zeros(6, 3)}, tmp_path / "narrow.safetensors"))


def test_the_work_space_is_what_a_run_takes():
    module = Stack()
    measured = peak_bytes(lambda: module(*(tensor.clone() for tensor in INPUTS)))
    assert DESIGN.working_bytes(torch.float32, INPUTS[0].to("meta"), INPUTS[1]) == measured > INPUTS[0].nbytes


def test_large_models_compute_in_bfloat16_and_small_ones_in_float32_on_the_cpu():
    info = {"a": TensorInfo("F8_E4M3", (1 << 10, 1 << 19)), "b": TensorInfo("F32", ())}
    identity = Identity(
        family="x", role="text_encoder", variant="x", weight_format="fp32", spelling="x", config=None, names={"A": "a"}
    )
    checkpoint = Checkpoint(path=None, tensors=info, location={})
    assert num_parameters(checkpoint, identity) == 1 << 29
    assert compute_dtype(1 << 29, CPU) == torch.float32
    assert compute_dtype((1 << 29) + 1, CPU) == compute_dtype(1, torch.device("cuda")) == torch.bfloat16


def test_long_lists_are_shortened():
    assert some([]) == "none" and some(["a", "b"]) == "a, b"
    assert some([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_a_footprint_of_blocks_of_several_sizes_streams_through_slots_of_the_largest():
    assert Footprint(blocks=(3, 5), others=1, working=2).streamed(1) == 8
