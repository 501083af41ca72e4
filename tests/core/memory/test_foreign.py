"""The memory of code that decides by numbers, and of attention; counted by hand, and on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wanqwen.core.memory.foreign import traced_bytes
from wanqwen.core.memory.trace import peak_bytes

META = torch.device("meta")


def decide(x: Tensor, lengths: Tensor) -> Tensor:
    """Do what foreign code does: ask numbers, mask what has none, split by lengths that lie beside the data."""
    mask = torch.ones(len(x), dtype=torch.long, device=x.device)
    if not mask.bool().all():
        x = torch.cat((x, x, x, x))
    ends = torch.tensor([0, 3], device=x.device).repeat(2).unique_consecutive() + lengths[0]
    parts = torch.split(x[torch.arange(len(x), device=x.device).flip(0)], lengths.tolist())
    bias = torch.zeros(len(x), len(x), device=x.device, dtype=x.dtype)
    bias[:, : int(ends[1])] = 1
    with torch.autocast(x.device.type, enabled=False):
        turned = torch.cat([part * 2 for part in parts]) * lengths.sum().to(x.device)
    return (bias @ turned).to(x.device)


def test_code_that_decides_by_numbers_takes_what_it_takes_on_the_cpu() -> None:
    x, bare, lengths = torch.randn(40, 64), torch.empty(40, 64, device=META), torch.tensor([30, 10])
    assert traced_bytes(lambda: decide(bare, lengths)) == peak_bytes(lambda: decide(x, lengths))


def test_what_depends_on_numbers_that_were_not_computed_is_refused() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        traced_bytes(lambda: bool(torch.ones(3, device=META).sum() > 0))


@pytest.mark.parametrize(("columns", "is_bool", "copied"), [(64, False, 0), (64, True, 64), (61, False, 64)])
def test_attention_holds_what_the_kernels_of_devices_do(columns: int, is_bool: bool, copied: int) -> None:
    q, k = (torch.ones(1, 2, length, 8, device=META) for length in (32, columns))
    mask = torch.ones(1, 1, 32, columns, device=META, dtype=torch.bool if is_bool else torch.float32)
    result_and_row_sums = 4 * 2 * 32 * (8 + 1)
    found = traced_bytes(lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask))
    assert found == result_and_row_sums + 4 * 32 * copied


@pytest.mark.parametrize("mask", [None, torch.ones(1, 128, 128, dtype=torch.bool)])
def test_attention_without_a_batch_of_heads_spells_out_its_scores(mask: Tensor | None) -> None:
    q = torch.ones(2, 128, 8) if mask is None else torch.ones(1, 2, 128, 8)
    found = traced_bytes(lambda: F.scaled_dot_product_attention(*[q.to(META)] * 3, attn_mask=mask))
    measured = peak_bytes(lambda: F.scaled_dot_product_attention(*[q] * 3, attn_mask=mask))
    assert measured <= found and found >= 4 * 2 * 128 * 128
