"""Bytes counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from wanqwen.core.memory.trace import LiveBytes, peak_bytes

MIB = 1 << 20


@pytest.fixture(params=["meta", "cpu"])
def x(request: pytest.FixtureRequest) -> torch.Tensor:
    """One mebibyte that was there before."""
    return torch.ones(512, 512, device=request.param)


def test_tensors_count_while_they_live_and_views_do_not(x: torch.Tensor) -> None:
    def call() -> torch.Tensor:
        a = x + 1  # 1
        b = a.t()[:100].flatten()[:5]  # flatten copies 100 columns
        del b
        c = a * 2  # 2
        c.mul_(3).add_(a)
        del a
        return torch.cat((c, c))  # 1 + 2

    assert peak_bytes(call) == 3 * MIB


def test_what_was_there_before_is_not_counted(x: torch.Tensor) -> None:
    assert peak_bytes(lambda: x.t().unsqueeze(0).mul_(2)) == 0


def test_other_devices_are_not_counted(x: torch.Tensor) -> None:
    other = torch.device("cpu" if x.is_meta else "meta")
    assert peak_bytes(lambda: x * 2, x.device) == MIB
    assert peak_bytes(lambda: x * 2, other) == 0


def test_the_parts_of_composite_operations_are_seen(x: torch.Tensor) -> None:
    """A linear layer of bias and product makes one tensor; RMS norm spelt in parts makes more than its result."""
    weight = torch.empty(512, 512, device=x.device)
    assert peak_bytes(lambda: F.linear(x, weight)) == MIB
    assert peak_bytes(lambda: F.softmax(x.bfloat16().float() @ weight, dim=-1)) == 2 * MIB


def test_nothing_stays_counted(x: torch.Tensor) -> None:
    with torch.no_grad(), LiveBytes() as counted:
        kept = [x + i for i in range(3)]
        assert counted.live == 3 * MIB
        kept.pop()
        assert counted.live == 2 * MIB
        kept.clear()
    assert counted.live == 0 and counted.peak == 3 * MIB
