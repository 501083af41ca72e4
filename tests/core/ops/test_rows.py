"""Work in chunks and in place against the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.ops import attention as attention_module
from wanqwen.core.ops.attention import attention, attention_in_place
from wanqwen.core.ops.linear import Linear, feed_forward, gelu_tanh
from wanqwen.core.ops.rows import LEAST_ROWS, MOST_CHUNKS, add_to_rows, chunk_size, row_chunks


def linear(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Linear:
    layer = Linear(columns, rows)
    layer.weight = torch.nn.Parameter(torch.randn(rows, columns).to(dtype), requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.randn(rows), requires_grad=False)
    return layer


# Chunks


@pytest.mark.parametrize(
    ("num", "chunk_rows"), [(1, 0), (2048, 0), (4095, 0), (4097, 0), (32760, 0), (75601, 0), (10, 3), (9, 3), (7, 1)]
)
@torch.no_grad()
def test_chunks_cover_all_rows_once_and_are_about_equal(num: int, chunk_rows: int) -> None:
    chunks = row_chunks(num, chunk_rows, first=5)
    assert [row for rows in chunks for row in range(rows.start, rows.stop)] == list(range(5, 5 + num))
    sizes = [rows.stop - rows.start for rows in chunks]
    longest = chunk_rows or max(2 * LEAST_ROWS - 1, num // MOST_CHUNKS + 1)
    assert max(sizes) == chunk_size(num, chunk_rows) <= longest
    assert max(sizes) - min(sizes) < len(sizes) + 1
    assert chunk_rows or min(sizes) >= min(num, LEAST_ROWS) - len(sizes)


@torch.no_grad()
def test_few_rows_and_none_are_not_divided() -> None:
    assert row_chunks(2 * LEAST_ROWS - 1) == (slice(0, 2 * LEAST_ROWS - 1),)
    assert row_chunks(0) == ()


def test_with_gradients_rows_are_not_divided() -> None:
    assert row_chunks(10, 3, first=2) == (slice(2, 12),)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 7), slice(2, 5)])
def test_a_branch_is_added_in_place_or_so_that_gradients_flow(gated: bool, rows: slice) -> None:
    x, gate = torch.randn(2, 7, 4), torch.randn(2, 1, 4) if gated else None
    branch = torch.randn(2, rows.stop - rows.start, 4).bfloat16()
    expected = x.clone()
    expected[:, rows] += branch.float() * (1 if gate is None else gate)
    leaf, learning = x.clone().requires_grad_(), branch.float().requires_grad_()
    out = add_to_rows(leaf * 1, rows, learning, gate)
    assert torch.allclose(out, expected, atol=1e-6) and torch.equal(leaf, x)
    out.square().sum().backward()
    assert torch.allclose(leaf.grad, 2 * expected, atol=1e-5)
    wanted = 2 * expected[:, rows] * (1 if gate is None else gate)
    assert torch.allclose(learning.grad, wanted, atol=1e-5)
    with torch.no_grad():
        changed = add_to_rows(x, rows, branch, gate)
    assert changed is x and torch.allclose(x, expected, atol=1e-6)


# Attention over groups of heads


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "GROUP_ROWS", 20)


@pytest.mark.parametrize("num_heads", [1, 3, 8, 20])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_in_place_is_attention(small_groups: None, num_heads: int, biased: bool) -> None:
    q, k, v = torch.randn(2, 9, num_heads, 8), torch.randn(1, 7, num_heads, 8), torch.randn(1, 7, num_heads, 8)
    bias = torch.randn(1, 7) if biased else None
    expected = attention(q, k, v, bias)
    with torch.no_grad():
        given = q.clone()
        out = attention_in_place(given, k, v, bias)
    assert torch.allclose(out, expected, atol=1e-6)
    assert (out.data_ptr() == given.data_ptr()) == (num_heads > 2), "18 rows a head: two heads are one group"


def test_attention_in_place_keeps_q_for_gradients(small_groups: None) -> None:
    q, k, v = torch.randn(3, 1, 9, 6, 8)
    leaf = q.clone().requires_grad_()
    attention_in_place(leaf, k, v).square().sum().backward()
    plain = q.clone().requires_grad_()
    attention(plain, k, v).square().sum().backward()
    assert torch.equal(leaf, q) and torch.allclose(leaf.grad, plain.grad, atol=1e-6)


def test_result_of_many_rows_takes_an_eighth_of_them() -> None:
    q, k, v = (torch.empty(1, 32760, 40, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    peak = peak_bytes(lambda: attention_in_place(q, k, v), q.device)
    assert q.nbytes / 8 <= peak < q.nbytes / 7


# Feed-forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_is_two_layers_with_a_gelu_between(dtype: torch.dtype) -> None:
    first, second, x = linear(24, 8, dtype), linear(8, 24, dtype), torch.randn(2, 5, 8).to(dtype)
    expected = second(F.gelu(first(x), approximate="tanh"))
    assert torch.equal(feed_forward(first, second, dtype)(x), expected)
    with torch.no_grad():
        assert torch.equal(feed_forward(first, second, dtype)(x), expected)


def test_gelu_takes_no_memory_of_its_own_but_keeps_what_gradients_need() -> None:
    x = torch.randn(64, 8)
    learning = x.clone().requires_grad_()
    out = gelu_tanh(learning * 1)
    out.sum().backward()
    assert learning.grad is not None and torch.equal(learning, x)
    given = x.clone()
    assert peak_bytes(lambda: gelu_tanh(given)) == 0
    assert torch.equal(given, F.gelu(x, approximate="tanh"))


def test_a_layer_made_ready_once_decodes_its_weight_once() -> None:
    layer = Linear(16, 4)
    layer.weight = torch.nn.Parameter(torch.randn(4, 16).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale = torch.rand(4)
    x = torch.randn(3, 16)
    ready = layer.at(torch.float32)
    assert torch.equal(ready(x), layer(x))
    assert peak_bytes(lambda: ready(x)) == 3 * 4 * 4, "the result alone"
