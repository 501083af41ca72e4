from pathlib import Path

import pytest
import torch
from torch import nn
from wanqwen.core.blocks import Run, run_blocks
from wanqwen.core.memory import resident as memory
from wanqwen.core.memory.block_swap import BlockSwap
from wanqwen.core.memory.link import SynchronousLink
from wanqwen.core.memory.placement import Job, Machine, make_plan
from wanqwen.core.memory.resident import placed, resident
from wanqwen.core.memory.slab import Loaded
from wanqwen.core.memory.supply import Source, Supply
from wanqwen.core.types import MemoryOptions

from .conftest import Runtime
from .late_link import LateLink
from .toy import InMemory, from_file, in_memory, inputs


def test_weights_go_to_the_device_and_are_the_same_tensors_after() -> None:
    module = nn.Linear(3, 2).requires_grad_(False)
    module.register_buffer("scale", torch.ones(2))
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    with pytest.raises(KeyError), torch.inference_mode(), resident(module, torch.device("meta")) as there:
        assert {tensor.device.type for tensor in there.state_dict().values()} == {"meta"}
        raise KeyError
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before


def test_nothing_moves_that_is_there_already() -> None:
    module = nn.Linear(3, 2)
    pointer = module.weight.data_ptr()
    with resident(module, torch.device("cpu")):
        assert module.weight.data_ptr() == pointer


def test_weights_that_came_to_be_where_they_compute_are_not_made_again(path: Path) -> None:
    loaded = from_file(path)
    for _ in range(2):
        with placed(loaded, torch.device("cpu"), lambda: 1 / 0):
            pass
        assert not any(tensor.is_meta for tensor in loaded.module.parameters())


class Chain(nn.Module):
    """Blocks of a megabyte, and a little beside them."""

    def __init__(self, depth: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        self.blocks = nn.ModuleList(nn.Linear(512, 512) for _ in range(depth)).requires_grad_(False)


@pytest.mark.parametrize("megabytes", [3, 7, 100])
def test_as_much_is_pinned_as_the_plan_says(
    megabytes: int, cuda_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To one in a hundred: no rounding to powers of two, at the fullest moment staging included."""
    monkeypatch.setattr(memory, "computes_in_ram", lambda device: False)
    monkeypatch.setattr(memory, "link_to", lambda *_: LateLink())
    model = Chain(12)
    loaded = Loaded(InMemory(model), model.blocks)
    *blocks, others = (layout.nbytes for layout in loaded.layouts())
    job = Job(blocks=tuple(blocks), others=others, working=0, passes=1)
    budget = megabytes << 20
    machine = Machine(vram=4 << 20, ram=1 << 40, total_ram=1 << 40)
    plan = make_plan(job, machine, MemoryOptions(pinned=budget, headroom=0))
    most = []
    with placed(loaded, torch.device("cpu"), lambda at_least: plan) as residency:
        for _ in range(2):
            for i, block in enumerate(model.blocks):
                residency.before(i)
                block(torch.ones(1, 512))
                residency.after(i)
                most.append(sum(cuda_runtime.registered.values()))
    assert plan.streaming and max(most) <= budget
    sources = set(plan.sources.values())
    if Source.DISK in sources:  # else no staging buffer may have been needed
        assert abs(max(most) - plan.pinned) <= 0.01 * plan.pinned
        assert budget - plan.pinned < blocks[0]
    assert (Source.PINNED in sources) == (megabytes > 3)
    assert sum(cuda_runtime.registered.values()) <= 1.01 * loaded.kept_bytes


def test_what_is_injected_between_blocks_meets_streamed_blocks_alike(path: Path) -> None:
    """As control models do: a change of the state after some blocks."""
    x, inject = inputs(1)[0], {1: lambda state: state * 2, 4: lambda state: state + 1}

    def forward(loaded: Loaded, hooks: list[object]) -> torch.Tensor:
        run = Run(hooks=hooks)
        return run_blocks(loaded.blocks, x, lambda i, block, state: block(state), run=run, inject=inject)

    wanted, loaded = forward(in_memory(path), []), from_file(path)
    layouts = loaded.layouts()[:-1]
    ring = [torch.empty(max(layout.nbytes for layout in layouts), dtype=torch.uint8) for _ in range(2)]
    swap = BlockSwap({}, ring, Supply(loaded, layouts, {}, SynchronousLink(), torch.device("cpu")))
    swap.start()
    assert torch.equal(forward(loaded, [swap]), wanted)
    swap.close()
