"""Which spelling a run takes: chosen before it, said, and never a kernel that does not work."""

import logging

import pytest
import torch
from wanqwen import kernels
from wanqwen.core.ops import formats, proof
from wanqwen.core.ops.choice import EXACT, FUSED, Ops, choose, norm_silu_on, proven
from wanqwen.core.ops.eight_bits import dequantise_rows
from wanqwen.core.ops.gguf_blocks import unpack_blocks
from wanqwen.core.ops.norm import norm_silu_into
from wanqwen.core.ops.products import FLOAT8, INT8
from wanqwen.core.ops.trials import TRIALS
from wanqwen.core.types import FastPaths

HEADS, CPU = (3, 10), torch.device("cpu")


@pytest.fixture(autouse=True)
def forget() -> None:
    proof.tried.cache_clear()
    yield
    proof.tried.cache_clear()


def offer(monkeypatch: pytest.MonkeyPatch, name: str, kernel) -> None:
    """Let a function be found as a kernel; there are no others."""
    found = {name: (kernel, f"kernel {name}")}
    monkeypatch.setattr(kernels, "find", lambda asked, *tensors: found.get(asked, (None, "there is none")))


def test_every_operation_has_an_eager_spelling_a_kernel_and_trials() -> None:
    for name in FUSED:
        assert name in kernels.KERNELS
        assert all(trial.eager is getattr(EXACT, name) for trial in TRIALS[name])
    assert set(TRIALS) == set(kernels.KERNELS)


def test_a_cpu_and_who_asks_for_it_get_the_bits_of_plain_pytorch() -> None:
    assert choose("auto", HEADS, torch.float32, CPU) == (EXACT, [])
    assert norm_silu_on(CPU, torch.float32) is norm_silu_into
    ops, said = choose("exact", HEADS, torch.float32, torch.device("cuda"))
    assert ops == EXACT and "bits of plain PyTorch" in said[0]


def test_what_works_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(*arguments):
        return EXACT.add_to_rows(*arguments)

    offer(monkeypatch, "add_to_rows", twin)
    ops, said = proven(HEADS, torch.float32, CPU)
    assert ops == Ops(add_to_rows=twin)
    others = ", ".join(name for name in FUSED if name != "add_to_rows")
    assert said == ["Fused kernels: add_to_rows.", f"Plain PyTorch in place of {others}: there is none."]


def test_one_reason_for_all_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "none", None)
    assert proven(HEADS, torch.float32, CPU) == (EXACT, ["Plain PyTorch in place of any kernel: there is none."])


def _raises(x, constants, dtype):
    raise RuntimeError("no compiler\nat all")


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (_raises, "failed with RuntimeError: no compiler"),
        (lambda x, constants, dtype: torch.full_like(x, float("nan")), "differs by nan"),
        (lambda x, constants, dtype: EXACT.layer_norm(x, constants, dtype) * 1.01, "differs by"),
        (lambda x, constants, dtype: EXACT.layer_norm(x, constants, dtype)[:, :1], "differs by inf"),
    ],
    ids=["raises", "NaN", "wrong", "shape"],
)
def test_what_does_not_work_is_not_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernel, complaint: str
) -> None:
    pytest.importorskip("triton")
    offer(monkeypatch, "layer_norm", kernel)
    with caplog.at_level(logging.WARNING):
        ops, said = proven(HEADS, torch.float32, CPU)
    assert ops == EXACT and any(complaint in line for line in said)
    assert f"Kernel layer_norm {complaint}" in caplog.text and "takes its place" in caplog.text


def test_each_result_of_a_kernel_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_right(*arguments):
        x, normed = EXACT.add_norm(*arguments)
        return x, normed * float("nan")

    offer(monkeypatch, "add_norm", half_right)
    ops, said = proven(HEADS, torch.float32, CPU)
    assert ops == EXACT and any("add_norm: differs by nan" in line for line in said)


def test_a_kernel_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*arguments):
        calls.append(1)
        return EXACT.add_to_rows(*arguments)

    offer(monkeypatch, "add_to_rows", counting)
    assert proven(HEADS, torch.float32, CPU) == proven(HEADS, torch.float32, CPU)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "trouble", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_a_full_card_is_no_verdict(monkeypatch: pytest.MonkeyPatch, trouble: RuntimeError) -> None:
    troubles = [trouble]

    def crowded(*arguments):
        if troubles:
            raise troubles.pop()
        return EXACT.add_to_rows(*arguments)

    offer(monkeypatch, "add_to_rows", crowded)
    ops, said = proven(HEADS, torch.float32, CPU)
    assert ops == EXACT and any("add_to_rows: the card had no memory left" in line for line in said)
    assert proven(HEADS, torch.float32, CPU)[0] == Ops(add_to_rows=crowded)


def test_a_kernel_that_can_not_even_be_imported_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name, *tensors):
        raise ImportError("a DLL is missing")

    monkeypatch.setattr(kernels, "find", broken)
    ops, said = proven(HEADS, torch.float32, CPU)
    assert ops == EXACT and said == ["Plain PyTorch in place of any kernel: failed with ImportError: a DLL is missing."]


SPELLED = (unpack_blocks, dequantise_rows, INT8.rows, INT8.gelu, FLOAT8.rows, FLOAT8.gelu)


@pytest.mark.parametrize("operation", SPELLED, ids=lambda operation: operation.__name__)
def test_a_kernel_of_an_operation_s_name_takes_its_place_on_cards(monkeypatch: pytest.MonkeyPatch, operation) -> None:
    name, cuda = operation.__name__, torch.device("cuda")
    assert all(trial.eager is operation for trial in TRIALS[name])
    found = {name: proof.Verdict(kernel=len, reason="works")}
    monkeypatch.setattr(proof, "verdict", lambda asked, *_: found[asked])
    assert proof.spelling(operation, torch.bfloat16, cuda) is len
    assert proof.spelling(operation, torch.bfloat16, CPU) is operation
    with monkeypatch.context() as compiler:
        compiler.setattr(torch.compiler, "is_compiling", lambda: True)
        assert proof.spelling(operation, torch.bfloat16, cuda) is operation
    found[name] = proof.Verdict(kernel=None, reason="fails")
    assert proof.spelling(operation, torch.bfloat16, cuda) is operation


@pytest.mark.parametrize(
    ("dtype", "stored", "wanted"),
    [
        (torch.float8_e4m3fn, None, dequantise_rows),
        (torch.float8_e5m2, "F8_E5M2", dequantise_rows),
        (torch.int8, "I8", dequantise_rows),
        (torch.uint8, "Q4_K", unpack_blocks),
        (torch.uint8, "Q4_0", None),
        (torch.float16, "F16", None),
    ],
)
def test_a_kernel_is_asked_for_where_there_is_one_for_the_format(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stored: str | None, wanted
) -> None:
    def kernel(weight, how, dtype):
        return "made by a kernel"

    asked = []
    monkeypatch.setattr(formats, "spelling", lambda operation, *_: asked.append(operation) or kernel)
    made = formats.dequantise(torch.zeros(2, 144, dtype=torch.uint8).view(dtype), None, torch.float32, stored)
    assert asked == ([] if wanted is None else [wanted])
    assert (made == "made by a kernel") if wanted else made.dtype == torch.float32


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="kernels is 'fast': choose auto or exact"):
        FastPaths(kernels="fast")
