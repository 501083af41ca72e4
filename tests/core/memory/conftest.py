"""A stand-in for the part of CUDA that pins memory."""

from pathlib import Path

import pytest
import torch
from wanqwen.core.memory import pinned
from wanqwen.core.memory.pinned import PAGE

from .toy import write


class Runtime:
    """CUDA's, which remembers what is registered and has pages for so many. A refusal is left behind as an error."""

    def __init__(self, limit: int):
        self.limit, self.registered, self.refusals, self.error = limit, {}, 0, False

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert pointer % PAGE == size % PAGE == 0
        assert all(pointer + size <= start or start + old <= pointer for start, old in self.registered.items())
        if len(self.registered) >= self.limit:
            self.refusals, self.error = self.refusals + 1, True
            return 2
        self.registered[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0

    def clear(self, device: torch.device) -> None:
        self.error = False


@pytest.fixture
def cuda_runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """CUDA's runtime, which pins whatever it is asked to."""
    runtime = Runtime(1000)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinned, "_clear_error", runtime.clear)
    return runtime


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of the small model."""
    return write(tmp_path / "toy.safetensors")
