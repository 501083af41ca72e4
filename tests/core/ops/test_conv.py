"""Convolutions with fewer multiplications give the sums that the plain ones do."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wanqwen.core.ops.conv import conv3d, conv3d_in_pairs, doubled_conv2d, halved_conv2d, pairs_pay
from wanqwen.core.ops.norm import channel_norm, norm_silu_into

# Largest error over the largest number: a few roundings of the format, of sums of weights among them.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def as_in_use() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return random tensors, the largest numbers of sums of which are about 1."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) / shape[0]).to(dtype) for shape in shapes]


def check(out: Tensor, expected_double: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype and out.shape == expected_double.shape
    assert (out.double() - expected_double).abs().max() < TOLERANCE[dtype] * expected_double.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"), [(1, 2, 7, 5), (2, 4, 9, 300), (1, 6, 17, 128), (1, 2, 1, 3), (1, 2, 5, 1)]
)
def test_frames_in_pairs(batch: int, frames: int, height: int, width: int, layout: torch.memory_format) -> None:
    shapes = (batch, 7, frames + 2, height, width), (9, 7, 3, 3, 3), (9,)
    x, weight, bias = tensors(*shapes, dtype=torch.float32)
    x = x.contiguous(memory_format=layout)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), padding=(0, 1, 1))
    check(conv3d_in_pairs(x, weight, bias), expected, x.dtype)
    check(conv3d(x, weight, bias, padding=(0, 1, 1)), expected, x.dtype)


def test_pairs_are_for_float32_on_a_cpu_where_there_is_much_to_do() -> None:
    def pay(frames: int, side: int, channels: int, kernel: int = 3, dtype: torch.dtype = torch.float32) -> bool:
        x = torch.empty(1, channels, frames + 2, side, side, dtype=dtype, device="meta")
        return pairs_pay(x, torch.empty(channels, channels, kernel, kernel, kernel, device="meta"))

    assert pay(4, 64, 96) and pay(2, 32, 384)
    assert not pay(4, 64, 96, dtype=torch.bfloat16)
    assert not any((pay(3, 64, 96), pay(1, 64, 96), pay(4, 64, 96, kernel=1), pay(4, 16, 96), pay(4, 64, 32)))


@each_dtype
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (3, 5, 7), (2, 16, 3)])
def test_doubled(batch: int, height: int, width: int, dtype: torch.dtype) -> None:
    x, weight, bias = tensors((batch, 7, height, width), (5, 7, 3, 3), (5,), dtype=dtype)
    large = x.double().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    check(doubled_conv2d(x, weight, bias), F.conv2d(large, weight.double(), bias.double(), padding=1), dtype)


@each_dtype
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 2, 2), (3, 6, 10), (2, 16, 4)])
def test_halved(batch: int, height: int, width: int, dtype: torch.dtype) -> None:
    x, weight, bias = tensors((batch, 7, height, width), (5, 7, 3, 3), (5,), dtype=dtype)
    padded = F.pad(x.double(), (0, 1, 0, 1))
    check(halved_conv2d(x, weight, bias), F.conv2d(padded, weight.double(), bias.double(), stride=2), dtype)


@each_dtype
def test_norm_and_silu_are_written_where_they_belong(dtype: torch.dtype) -> None:
    x, weight = tensors((2, 7, 3, 5, 9), (7, 1, 1, 1), dtype=dtype)
    x[0, :, 1, 2, 3] = 0
    room = torch.full((2, 7, 5, 5, 9), 3.0, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    now = room[:, :, 2:]
    assert norm_silu_into(x, weight, now) is now
    exact = F.silu(F.normalize(x.double(), dim=1) * 7**0.5 * weight.double())
    check(now, exact, dtype)
    assert not now[0, :, 1, 2, 3].any() and (room[:, :, :2] == 3).all()
    assert torch.equal(F.silu(channel_norm(x, weight)), now)
