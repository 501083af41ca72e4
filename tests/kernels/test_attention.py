"""The attention kernel beside float64, on lengths that no tile divides: interpreted on the CPU, compiled on CUDA."""

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from wanqwen import kernels
from wanqwen.core.ops.attention import attention_in_place, attention_int8
from wanqwen.core.ops.trials import attention_arguments
from wanqwen.tests.kernels.test_kernels import Counted

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAME = "attention_int8"
# Of the result's size. From the same rounded q and k: what multiplies v, and the result, rounded to so many bits. From
# the true ones: steps of int8, of rows whose largest number is some three times their usual one.
ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
ALLOWED = 0.01
SHAPES = {  # queries, keys, heads, width
    "one tile and a rest": (130, 67, 2, 64),
    "wide heads": (7, 130, 1, 128),
    "narrow heads": (9, 41, 3, 10),
    "one query": (1, 64, 1, 64),
    "one key": (5, 1, 2, 32),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counted]:
    """The Triton functions of the kernel's file: what is not launched has not been tested."""
    module = sys.modules[kernels.KERNELS[NAME].load(NAME).__module__]
    found = {key: Counted(value) for key, value in vars(module).items() if key.endswith("_kernel")}
    for key, one in found.items():
        monkeypatch.setattr(module, key, one)
    return found


def kernel(*arguments: Any) -> Tensor:
    """Return what the kernel makes, and no other."""
    found, reason = kernels.find(NAME, *(tensor for tensor in arguments if tensor is not None))
    assert found is not None, reason
    with torch.inference_mode():
        return found(*arguments)


def softmax_of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return attention in float64 and the plainest words."""
    q, k, v = (t.double() for t in (q, k, v))
    logits = torch.einsum("blnd,bsnd->bnls", q, k) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias.double()[:, None, None]
    return torch.einsum("bnls,bsnd->blnd", logits.softmax(-1), v)


def rounded(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("is_biased", [False, True], ids=["all keys", "biased"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_is_attention_of_q_and_k_in_int8(
    shape: tuple[int, int, int, int], is_biased: bool, dtype: torch.dtype, launches: dict[str, Counted]
) -> None:
    q, k, v, bias = arguments = attention_arguments(*shape, dtype, DEVICE, is_biased)
    found = kernel(*arguments)
    assert {name: one.launches for name, one in launches.items()} == {"_round_kernel": 2, "_attend_kernel": 1}
    assert found.shape == q.shape and found.dtype == dtype
    rows = rounded(q.double()), rounded(k.double() - k.double().mean(1, keepdim=True))
    if shape[1] > 1:  # a mean of one key leaves nothing of it, whatever its scale
        assert distance(found, softmax_of(*rows, v, bias)) < ROUNDED[dtype]
    assert distance(found, softmax_of(*arguments)) < ALLOWED


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_the_twin_gives_the_kernel_s_numbers(dtype: torch.dtype) -> None:
    arguments = attention_arguments(67, 141, 2, 64, dtype, DEVICE, is_biased=True)
    assert distance(kernel(*arguments), attention_int8(*arguments).double()) < ROUNDED[dtype]


def test_keys_without_their_mean_are_rounded_more_finely() -> None:
    """So that a part that all share, of trained models large, costs nothing."""
    q, k, v, _ = attention_arguments(64, 200, 2, 64, torch.bfloat16, DEVICE, is_biased=False)
    true, as_they_are = softmax_of(q, k, v, None), softmax_of(rounded(q.double()), rounded(k.double()), v, None)
    assert distance(kernel(q, k, v), true) < 0.6 * distance(as_they_are, true)


@pytest.mark.parametrize("hidden", [slice(0, 64), slice(64, 150)], ids=["first tile", "last tiles"])
def test_tiles_of_hidden_keys_leave_no_trace(hidden: slice) -> None:
    q, k, v, _ = attention_arguments(5, 150, 2, 32, torch.float16, DEVICE, is_biased=False)
    bias = torch.zeros(1, 150, device=DEVICE)
    bias[:, hidden] = float("-inf")
    shown = torch.ones(150, dtype=torch.bool)
    shown[hidden] = False
    assert distance(kernel(q, k, v, bias.half()), softmax_of(q, k[:, shown], v[:, shown], None)) < ALLOWED


def test_a_batch_of_queries_may_share_its_keys() -> None:
    q, k, v, bias = attention_arguments(9, 70, 2, 32, torch.float16, DEVICE, is_biased=True)
    both = kernel(torch.cat((q, -q)), k, v, bias)
    assert torch.equal(both, torch.cat((kernel(q, k, v, bias), kernel(-q, k, v, bias))))


def test_heads_are_taken_in_groups_from_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    from wanqwen.core.ops import attention

    arguments = attention_arguments(9, 70, 4, 32, torch.float16, DEVICE, is_biased=True)
    whole = kernel(*arguments)
    monkeypatch.setattr(attention, "GROUP_ROWS", 18)
    with torch.inference_mode():
        found = attention_in_place(*arguments, kernel)
    assert found is arguments[0] and torch.equal(found, whole)


def test_what_it_can_t_take_is_refused_in_words() -> None:
    wide = torch.empty(1, 4, 1, 256, dtype=torch.float16, device=DEVICE)
    assert "at most 128 numbers, not 256" in kernels.find(NAME, wide)[1]
    assert "not float32" in kernels.find(NAME, torch.empty(1, 4, 1, 64, device=DEVICE))[1]
