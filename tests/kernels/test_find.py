"""A kernel that can't serve says why, in words, and before it is called."""

import pytest
import torch
from wanqwen import kernels

X = torch.empty(2, 8)


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors of the CPU pass for those of a card of Ada's generation, which Triton compiles for."""
    monkeypatch.setattr(kernels, "triton_version", lambda: "3.3.1")
    monkeypatch.setattr(kernels, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(kernels, "_device_type", lambda device: "cuda")


def reason(*tensors: torch.Tensor, name: str = "layer_norm") -> str:
    found, why = kernels.find(name, *tensors)
    assert found is None
    return why


@pytest.mark.usefixtures("on_a_card")
def test_each_refusal_says_what_was_found_and_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no kernel of the name 'fold'" in reason(X, name="fold")
    assert reason(X.double()) == "takes bfloat16, float16, float32, not float64"
    assert "at most 16384 numbers, not 20000" in reason(torch.empty(1, 20000))
    assert reason(X, torch.empty(2, device="meta")) == "the tensors are on cpu and meta"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert reason(X) == "needs compute capability 8.0; a card has 7.5"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in reason(X)
    monkeypatch.setattr(kernels, "_device_type", lambda device: "mps")
    assert reason(X) == "runs on CUDA cards, not on mps"
    monkeypatch.setattr(kernels, "triton_version", lambda: "3.2.0")
    assert "Triton is 3.2.0, and 3.3 or newer" in reason(X)
    monkeypatch.setattr(kernels, "triton_version", lambda: None)
    assert "Triton is not installed" in reason(X)


@pytest.mark.usefixtures("on_a_card")
def test_a_kernel_that_can_serve_is_found() -> None:
    pytest.importorskip("triton")
    found, why = kernels.find("layer_norm", X, X.bfloat16())
    assert found.__name__ == why.removeprefix("kernel ") == "layer_norm"


def test_a_cpu_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_interpreted", lambda: False)
    monkeypatch.setattr(kernels, "triton_version", lambda: "3.9.0")
    assert reason(X) == "runs on CUDA cards, not on cpu"
