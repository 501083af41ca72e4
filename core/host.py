"""The only seam to ComfyUI below nodes/: device, free memory, progress, previews, interruption.

Inside ComfyUI its own functions answer; outside, plain ones do. Which of the two is decided by whether ComfyUI's modules
are loaded, never by importing them: this file is safe to import anywhere.
"""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The user stopped the run (outside ComfyUI; inside, ComfyUI raises its own)."""


class Progress(Protocol):
    """Told of every finished step; `preview` is an image [H, W, 3] in [0, 1] or None."""

    def update(self, done: int, total: int, preview: Tensor | None) -> None: ...


def _comfy(name: str) -> Any | None:
    return sys.modules.get(f"comfy.{name}")


def device() -> torch.device:
    """Return the device to compute on: ComfyUI's choice, else the first accelerator, else the CPU."""
    if management := _comfy("model_management"):
        return management.get_torch_device()
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def free_memory(where: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if management := _comfy("model_management"):
        return int(management.get_free_memory(where))
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        return free + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return available_ram()


def available_ram() -> int:
    """Return the bytes of RAM that can be used without swapping, 8 GiB where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration):
        return 8 << 30


def make_room(nbytes: int, where: torch.device) -> None:
    """Ask ComfyUI to unload other models until `nbytes` are free on the device."""
    if management := _comfy("model_management"):
        management.free_memory(nbytes, where)


def check_interrupt() -> None:
    """Raise if the user asked to stop."""
    if management := _comfy("model_management"):
        management.throw_exception_if_processing_interrupted()


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError)


def empty_cache() -> None:
    """Give memory that PyTorch keeps for itself back to the device."""
    if management := _comfy("model_management"):
        management.soft_empty_cache()
    elif torch.cuda.is_available():
        torch.cuda.empty_cache()


def progress(total: int, label: str) -> Progress:
    """Return where to report steps: ComfyUI's progress bar, else the log with the time left."""
    if utils := _comfy("utils"):
        return _ComfyProgress(utils.ProgressBar(total))
    return LogProgress(label)


class _ComfyProgress:
    def __init__(self, bar: Any):
        self.bar = bar

    def update(self, done: int, total: int, preview: Tensor | None) -> None:
        image = None
        if preview is not None:
            from PIL import Image

            image = ("JPEG", Image.fromarray((preview.clamp(0, 1) * 255).byte().cpu().numpy()), 512)
        self.bar.update_absolute(done, total, image)


class LogProgress:
    """Report to the log, or to `write` (a terminal), the steps done and the seconds left."""

    def __init__(self, label: str, write: Callable[[str], None] | None = None):
        self.label, self.write = label, write or log.info
        self.started = time.monotonic()

    def update(self, done: int, total: int, preview: Tensor | None) -> None:
        elapsed = time.monotonic() - self.started
        left = elapsed / done * (total - done)
        self.write(f"{self.label} {done}/{total}, {elapsed:.1f} s gone, {left:.1f} s left")
