"""The doctor says of every kernel whether it works here, and why not."""

import pytest
import torch
from wanqwen import doctor, kernels
from wanqwen.__main__ import main
from wanqwen.core.ops import proof

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's

FLOATS_OR_BYTES = {torch.float32, torch.uint8}


def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the line of each kernel, and under "" all others."""
    proof.tried.cache_clear()
    monkeypatch.setattr(doctor.host, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(doctor, "TOKENS", doctor.Tokens(rows=4, heads=3, head_width=10))
    monkeypatch.setattr(doctor, "PROBE", doctor.TOKENS)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    proof.tried.cache_clear()
    named = {name: next(line for line in lines if line.startswith(f"{name} ")) for name in kernels.KERNELS}
    return named | {"": "\n".join(line for line in lines if line not in named.values())}


def test_where_no_kernel_runs_the_reason_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "is_interpreted", lambda: False)
    monkeypatch.setattr(kernels, "triton_version", lambda: None)
    said = report(monkeypatch, capsys)
    assert all(" off " in said[name] for name in kernels.KERNELS)
    assert said[""].count("off: Triton is not installed") == 1 and "no Triton" in said[""]
    assert "matrix products in int8: no layer has sides that are multiples of 16" in said[""]
    monkeypatch.setattr(doctor, "TOKENS", doctor.Tokens(rows=4, heads=3, head_width=16))
    assert any(line.startswith("matrix products in int8: work; rounding") for line in doctor.examine())


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_kernels_are_tried_and_a_broken_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    said = report(monkeypatch, capsys)
    halves = [name for name, kernel in kernels.KERNELS.items() if FLOATS_OR_BYTES.isdisjoint(kernel.dtypes)]
    assert [name for name in kernels.KERNELS if " off " in said[name]] == halves and "interpreted" in said[""]
    assert "off: takes bfloat16, float16, not float32" in said[""]
    found = kernels.find
    broken = (lambda *arguments: torch.full_like(arguments[0], torch.nan), "kernel layer_norm")
    monkeypatch.setattr(kernels, "find", lambda name, *t: broken if name == "layer_norm" else found(name, *t))
    said = report(monkeypatch, capsys)
    assert [name for name in kernels.KERNELS if " off " in said[name]] == ["layer_norm", *halves]
    assert "off: layer_norm: differs by nan" in said[""]
