"""What text encoders share: the cache, where to run, how weights come in and visit the device."""

import pytest
import torch
from torch import Tensor, nn
from wanqwen.core import text as module
from wanqwen.core.text import EmbeddingCache, Part, Placement, compute_dtype, load_state, num_parameters, run_on, some
from wanqwen.core.types import Checkpoint, Identity, TensorInfo

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Stack(nn.Module):
    """Blocks, a wide head, and a buffer that no file carries."""

    def __init__(self, width: int = 4, num_blocks: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, 9)
        self.register_buffer("shift", torch.arange(float(width)), persistent=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x * scale + self.shift)


@pytest.fixture
def part() -> Part:
    torch.manual_seed(0)
    stack = Stack().requires_grad_(False)
    return Part(name="text encoder", module=stack, blocks=stack.blocks, table_VE=torch.arange(12.0).view(3, 4))


INPUTS = (torch.ones(2, 4), torch.tensor(2.0))


def test_cache_forgets_what_was_unused_longest():
    cache = EmbeddingCache(max_bytes=3 * 40)
    for name in "abc":
        cache.put((name,), torch.zeros(10))
    cache.get(("a",))
    cache.put(("d",), torch.zeros(10))
    assert [cache.get((name,)) is not None for name in "abcd"] == [True, False, True, True]
    cache.put(("large",), torch.zeros(1000))
    assert cache.get(("large",)) is None


def test_the_smaller_limit_counts():
    assert Placement().limit(5) is None
    assert Placement(max_vram_bytes=7).limit(5) == 7
    assert Placement(max_vram_bytes=7, make_room=lambda needed: needed - 1).limit(5) == 4
    assert Placement(make_room=lambda needed: 100).limit(5) == 100


def test_sizes_of_a_part(part):
    assert part.num_bytes == 4 * (3 * 20 + 45)
    assert part.block_bytes == 4 * 45  # the head is larger than a block, and comes at once too
    assert torch.equal(part.embed([2, 0]), torch.tensor([[[8.0, 9, 10, 11], [0, 1, 2, 3]]]))


def test_a_part_runs_whole_streamed_or_as_a_copy_with_the_same_result(part, monkeypatch):
    expected = part.module(*INPUTS)
    before = {name: tensor.data_ptr() for name, tensor in part.module.named_parameters()}
    streams, original = [], module.streamed
    monkeypatch.setattr(module, "streamed", lambda *args: (streams.append(1), original(*args))[1])
    whole, less = part.num_bytes + 10, part.num_bytes + 9
    for limit, num_streams in ((None, 0), (whole, 0), (less, 1), (part.block_bytes + 10, 2)):
        with part.on(Placement(max_vram_bytes=limit), 10) as run:
            assert torch.equal(run(*INPUTS), expected)
        assert len(streams) == num_streams
    assert torch.equal(run_on(part.module, CPU)(*INPUTS), expected)
    with pytest.raises(ValueError, match=r"The text encoder can't run in 189 bytes .* or run it on the CPU"):
        part.on(Placement(max_vram_bytes=part.block_bytes + 9), 10).__enter__()
    assert {name: tensor.data_ptr() for name, tensor in part.module.named_parameters()} == before


def test_copies_go_to_the_device_and_the_masters_stay(part):
    run = run_on(part.module, torch.device("meta"))
    assert run(*(tensor.to("meta") for tensor in INPUTS)).device.type == "meta"
    assert {tensor.device for tensor in (*part.module.parameters(), part.module.shift)} == {CPU}


def test_an_exception_while_streaming_puts_everything_back(part):
    expected = part.module(*INPUTS)
    with pytest.raises(KeyboardInterrupt), module.streamed(part.module, part.blocks, CPU):
        assert all(p.device.type == "meta" for p in part.blocks.parameters())
        raise KeyboardInterrupt
    assert torch.equal(part.module(*INPUTS), expected)


def meta_stack() -> nn.Module:
    with torch.device("meta"):
        return Stack()


def test_weights_are_used_as_they_are_or_converted_with_their_scale(part):
    state = {f"file.{name}": tensor for name, tensor in part.module.state_dict().items()}
    stored = state["file.head.weight"]
    state["file.head.weight"] = (stored / 0.5).to(torch.float8_e4m3fn)
    loaded = meta_stack()
    scales = [("file.head.scale_weight", torch.tensor(0.5))]
    load_state(loaded, lambda name: name.removeprefix("file."), scales, state.items(), dtype=torch.float32, title="it")
    assert loaded.blocks[0].linear.weight.data_ptr() == part.blocks[0].linear.weight.data_ptr()
    assert torch.equal(loaded.head.weight, state["file.head.weight"].float() * 0.5)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_what_does_not_fit_is_named(part):
    state = dict(part.module.state_dict())
    del state["head.bias"]
    wrong = state | {"head.weight": torch.zeros(9, 4, dtype=torch.int8), "more": torch.zeros(1)}
    scales = [("nobody.scale_weight", torch.ones(()))]
    with pytest.raises(ValueError, match="these weights don't make it") as error:
        load_state(meta_stack(), str, scales, wrong.items(), dtype=torch.float32, title="it")
    for complaint in (
        "head.weight is int8 [9, 4], expected floats [9, 4]",
        "more is unknown",
        "head.bias is missing",
        "the scale of nobody has no weight",
    ):
        assert complaint in str(error.value)


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
