"""Blocks of GGUF mean what the `gguf` package says, to the bit."""

import gguf
import pytest
import torch
from wanqwen.core import storage
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.ops import formats, gguf_blocks
from wanqwen.core.ops.gguf_blocks import UNPACK
from wanqwen.core.ops.linear import Linear
from wanqwen.core.storage import PACKINGS
from wanqwen.core.types import TensorInfo
from wanqwen.tests.gguf_files import HALVES, meaning, random_blocks

NUMBERS = 512  # of a row: two of the longest blocks
each_kind = pytest.mark.parametrize("kind", PACKINGS)


def test_sizes_are_those_of_ggml() -> None:
    for kind, packing in PACKINGS.items():
        assert (packing.numbers, packing.num_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


@each_kind
def test_random_blocks_equal_the_reference_bit_for_bit(kind: str) -> None:
    for seed in range(4):
        blocks = random_blocks(kind, 65, NUMBERS, seed=seed)
        found = formats.dequantise(blocks[1], None, torch.float32, kind)
        assert found.shape == (65, NUMBERS)
        assert torch.equal(found.view(torch.int32), meaning(blocks).view(torch.int32))


@each_kind
def test_blocks_may_begin_anywhere(kind: str) -> None:
    blocks = random_blocks(kind, 1, 256)
    odd = torch.cat((torch.zeros(1, dtype=torch.uint8), blocks[1].flatten()))[1:].view(blocks[1].shape)
    assert torch.equal(formats.dequantise(odd, None, torch.float32, kind), meaning(blocks))


@each_kind
def test_every_scale_equals_the_reference(kind: str) -> None:
    """All 65,536 halves, tiny ones and infinities among them; what is not a number is none on both sides."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2)
    packing = PACKINGS[kind]
    blocks = torch.randint(256, (len(halves), packing.num_bytes), dtype=torch.uint8)
    for shift, at in enumerate(HALVES[kind]):
        blocks[:, at : at + 2] = halves.roll(shift * 12345, 0)
    found, wanted = UNPACK[kind](blocks), meaning((kind, blocks))
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(0).view(torch.int32), wanted.nan_to_num(0).view(torch.int32))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_computes_with_what_its_blocks_mean(kind: str, dtype: torch.dtype) -> None:
    blocks = random_blocks(kind, 24, NUMBERS)
    packed, plain = Linear(NUMBERS, 24, bias=False), Linear(NUMBERS, 24, bias=False)
    packed.weight, packed.stored = torch.nn.Parameter(blocks[1], requires_grad=False), kind
    plain.weight = torch.nn.Parameter(meaning(blocks).to(dtype), requires_grad=False)
    x = torch.randn(3, NUMBERS, dtype=dtype)
    assert torch.equal(packed(x), plain(x))


def test_blocks_are_unpacked_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks("Q4_K", 600, NUMBERS)
    wanted = formats.dequantise(blocks[1], None, torch.bfloat16, "Q4_K")
    monkeypatch.setattr(gguf_blocks, "ELEMENTS_AT_ONCE", 50 * NUMBERS)
    found = []
    peak = peak_bytes(lambda: found.append(formats.dequantise(blocks[1], None, torch.bfloat16, "Q4_K")))
    assert torch.equal(found[0], wanted)
    assert peak < wanted.nbytes + 4 * 50 * NUMBERS * 4


@pytest.mark.parametrize("shape", [(2, 3, 256), (256,), (0, 256), (1, 0, 256), (2, 0)])
def test_blocks_of_any_shape(shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape[:-1]).numel()
    _, packed = random_blocks("Q6_K", max(1, rows), 256)
    dtype, stored = formats.layout(TensorInfo("Q6_K", shape))
    assert dtype == torch.uint8 and stored == (*shape[:-1], shape[-1] // 256 * 210)
    content = packed.flatten()[: torch.Size(stored).numel()].view(stored)
    found = formats.dequantise(content, None, torch.float32, "Q6_K")
    assert found.shape == shape


def test_formats_are_called_as_users_call_them() -> None:
    def named(**sizes: int) -> str:
        return storage.weight_format({str(i): TensorInfo(kind, (n,)) for i, (kind, n) in enumerate(sizes.items())})

    assert named(Q4_K=100, Q6_K=60, F32=30) == "gguf Q4_K"
    assert named(Q8_0=100, F16=1) == "gguf Q8_0"
    assert named(BF16=100, F32=1) == "bf16"
    assert named(I8=100, F32=1) == "int8"
