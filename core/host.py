"""The only seam to ComfyUI below nodes/: device, free memory, progress, previews, interruption.

Inside ComfyUI its own functions answer; outside, plain ones do. Which of the two is decided by whether modules of
ComfyUI are loaded, never by importing them: this file is safe to import anywhere.
"""

import logging
import math
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .tiny_decoder import open_tiny_decoder
from .types import LatentFormat

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")  # of a container, as it sees itself
MIN_RAM = 2 << 30  # bytes that stay for everything else
# What PyTorch, cuBLAS and cuDNN write where memory ran out. cuDNN tries one way after another to convolve, and in the
# end says only that none is left; cuBLAS that it could not begin.
OUT_OF_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
READ_HELPERS = 3  # threads beside the one that reads a file, which alone keeps neither a fast disk nor RAM busy
MAX_PREVIEW_PIXELS = 512  # on the longer side, as ComfyUI's own samplers send


class Progress(Protocol):
    """Told of every finished step; `x0` is what the picture would be, normalised latents [B, C, T, h, w]."""

    def update(self, done: int, total: int, x0: Tensor) -> None: ...


def _comfy(name: str) -> Any | None:
    return sys.modules.get(f"comfy.{name}")


def comfy_folder(relative: str) -> Path | None:
    """Return a folder of ComfyUI's own, seen from its package `comfy`; None outside ComfyUI or where it has none."""
    file = getattr(_comfy("model_management"), "__file__", None)
    folder = Path(file).parent / relative if file else None
    return folder if folder and folder.is_dir() else None


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
    """Return the bytes of RAM that can be used without swapping."""
    import psutil  # comes with accelerate, and with ComfyUI

    limit = _container_ram()
    available = psutil.virtual_memory().available
    return available if limit is None else min(available, limit[1])


def _container_ram() -> tuple[int, int] | None:
    """Return the RAM that a container may have and what of it is left, caches not counted; None without a limit."""
    try:
        most = CGROUP.joinpath("memory.max").read_text().strip()
        used = int(CGROUP.joinpath("memory.current").read_text())
        facts = dict(line.split() for line in CGROUP.joinpath("memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdecimal():
        return None
    return int(most), max(0, int(most) - used + int(facts.get("file", 0)))


def total_ram() -> int:
    """Return the bytes of RAM that this machine, or the container around us, has."""
    import psutil

    limit = _container_ram()
    total = psutil.virtual_memory().total
    return total if limit is None else min(total, limit[0])


def driver_spills() -> bool:
    """Say whether the driver moves a full card's memory to RAM instead of failing: on Windows, and in its Linux."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def driver_free(where: torch.device) -> int:
    """Return the bytes that the driver of a device has free; what PyTorch keeps for itself is not among them."""
    return torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else free_memory(where)


def total_memory(where: torch.device) -> int:
    """Return the bytes of memory that a device has."""
    return torch.cuda.mem_get_info(where)[1] if where.type == "cuda" else total_ram()


def forget_peak(where: torch.device) -> None:
    """Begin to watch how full a device gets."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)


def peak(where: torch.device) -> int | None:
    """Return the most bytes that PyTorch took of a device since then; None where nobody counts them."""
    return torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether an error means that a device has no memory left, by whichever of PyTorch's ways to say it."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


@contextmanager
def whole_float32(where: torch.device) -> Iterator[None]:
    """Let convolutions in float32 keep all its digits: by default PyTorch has CUDA cards drop 13 of 23 bits (TF32)."""
    if where.type != "cuda":
        yield
        return
    holder, name, whole = torch.backends.cudnn, "allow_tf32", False
    try:
        before = getattr(holder, name)
    except RuntimeError:  # newer versions have another setting, and refuse to say the older one where that was used
        holder, name, whole = torch.backends.cudnn.conv, "fp32_precision", "ieee"
        before = getattr(holder, name)
    setattr(holder, name, whole)
    try:
        yield
    finally:
        setattr(holder, name, before)


def shares_ram(where: torch.device) -> bool:
    """Say whether a device's memory is RAM."""
    return where.type in ("cpu", "mps")


def make_room(nbytes: int, where: torch.device) -> None:
    """Ask ComfyUI to unload other models until `nbytes` are free on the device."""
    if management := _comfy("model_management"):
        listed = getattr(management, "current_loaded_models", ())
        ours = [entry for entry in listed if getattr(entry.model, "is_needed_by_wanqwen", False)]
        management.free_memory(nbytes, where, keep_loaded=ours)


def show_kept(nbytes: Callable[[], int], let_go: Callable[[float], int]) -> None:
    """List what is kept in RAM between runs among ComfyUI's loaded models, as long as it is anything.

    `let_go` is called with how many bytes to give back, and says how many it gave: all when a user unloads models, else
    as far as there is not the RAM for what ComfyUI takes off the device, or for what it wants to keep in RAM itself.
    """
    management, patcher = _comfy("model_management"), _comfy("model_patcher")
    if not management or not patcher or not nbytes():
        return
    of_comfy = getattr(patcher, "CoreModelPatcher", patcher.ModelPatcher)  # with dynamic VRAM it is another one
    kept = _kept_entry(of_comfy, management.LoadedModel, nbytes, let_go)
    if not any(model is kept.model for model in management.loaded_models()):
        kept.model_load()
        management.current_loaded_models.insert(0, kept)  # its own way to list would first make room on the device


@lru_cache(maxsize=1)
def _kept_entry(patcher: type, entry: type, nbytes: Callable[[], int], let_go: Callable[[float], int]) -> Any:
    """Return what stands for our RAM in ComfyUI's list; it holds nothing itself, and there is one of it."""

    class WanQwenWeightsInRam(torch.nn.Module):
        """The name that ComfyUI's log shows."""

    class Kept(patcher):
        is_needed_by_wanqwen = True  # to our own runs, which count on it

        def model_size(self) -> int:
            return nbytes()

        def loaded_size(self) -> int:
            return 0  # on the device

        def current_loaded_device(self) -> torch.device:
            return self.load_device

        def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
            return 0

        def partially_unload(self, device_to: Any, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
            return 0

        def partially_unload_ram(self, ram_to_unload: float, subsets: Sequence[str] = ("weights",)) -> int:
            """Dynamic VRAM's way to ask for RAM; where it is short of it, `weights` is the first it asks for."""
            return let_go(ram_to_unload) if "weights" in subsets else 0

        def unpin_all_weights(self) -> None:
            pass  # asked for when Python ends; nothing is pinned for ComfyUI

        def detach(self, unpatch_all: bool = True) -> Any:
            if unpatch_all:
                let_go(math.inf)
            return self.model

    class Listed(entry):
        def model_unload(self, memory_to_free: float | None = None, unpatch_weights: bool = True) -> bool:
            """Make way for so many bytes that leave the device, as far as RAM has no room for them."""
            if memory_to_free is not None:
                spare = 0 if shares_ram(self.device) else available_ram() - MIN_RAM
                let_go(memory_to_free - spare)
                if nbytes():
                    return False
            return super().model_unload(None, unpatch_weights)

    made = Kept(WanQwenWeightsInRam(), load_device=device(), offload_device=torch.device("cpu"))
    listed = Listed(made)
    listed.holds = made  # ComfyUI's entry has but a weak reference
    return listed


def prefers_bfloat16(where: torch.device) -> bool:
    """Say whether a device computes bfloat16 natively and well: a GPU of Ampere's generation or newer."""
    if where.type == "cpu":
        return False
    if management := _comfy("model_management"):
        return management.should_use_bf16(where)
    return where.type != "cuda" or torch.cuda.get_device_capability(where)[0] >= 8


def block_gate(where: torch.device) -> Callable[[], None]:
    """Return what to call before every block: it raises if the user asked to stop.

    A GPU is given its work ahead of time; so that a stop takes effect within a block or two, the gate waits until the
    block before the last one given is done. The device never idles for it.
    """
    if where.type != "cuda":
        return check_interrupt
    given: deque[torch.cuda.Event] = deque()

    def gate() -> None:
        check_interrupt()
        event = torch.cuda.Event(blocking=True)  # who waits for it should not keep a core busy
        event.record(torch.cuda.current_stream(where))
        given.append(event)
        if len(given) > 2:
            given.popleft().synchronize()

    return gate


def check_interrupt() -> None:
    """Raise if the user asked to stop."""
    if management := _comfy("model_management"):
        management.throw_exception_if_processing_interrupted()


def empty_cache() -> None:
    """Give memory that PyTorch keeps for itself back to the device, and pinned memory back to the system."""
    release = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)  # newer than the oldest PyTorch
    if release and torch.cuda.is_available():
        release()
    if management := _comfy("model_management"):
        management.soft_empty_cache()
    elif torch.cuda.is_available():
        torch.cuda.empty_cache()


def progress(
    total: int, label: str, latent_format: LatentFormat, status: Callable[[str], None] = lambda line: None
) -> Progress:
    """Return where to report steps: the log, with the time left, and in ComfyUI its progress bar, with previews.

    `status` hears what the log does.
    """

    def write(line: str) -> None:
        log.info(line)
        status(line)

    console = LogProgress(label, write)
    if utils := _comfy("utils"):
        return _ComfyProgress(utils.ProgressBar(total), _previewer(latent_format), console)
    return console


def meter(total: int) -> Callable[[int], None]:
    """Return what to tell how much of `total` is done: in ComfyUI its progress bar, elsewhere nothing listens."""
    if utils := _comfy("utils"):
        bar = utils.ProgressBar(total)
        return lambda done: bar.update_absolute(done, total)
    return lambda done: None


class _ComfyProgress:
    def __init__(self, bar: Any, preview: Callable[[Tensor], Any] | None, console: "LogProgress"):
        self.bar, self.preview, self.console = bar, preview, console

    def update(self, done: int, total: int, x0: Tensor) -> None:
        self.console.update(done, total, x0)
        image = self._shown(x0)
        self.bar.update_absolute(done, total, image and ("JPEG", image, MAX_PREVIEW_PIXELS))

    def _shown(self, x0: Tensor) -> Any | None:
        """Return a picture of the middle of the first clip; a card that has no memory for it gets on without."""
        try:
            return self.preview(x0[:1, :, : x0.shape[2] // 2 + 1]) if self.preview else None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        log.warning("There is no memory for previews: the run goes on without them.")
        self.preview = None
        return None


def _previewer(latent_format: LatentFormat) -> Callable[[Tensor], Any] | None:
    """Return what makes a picture of the last frame of latents, or None if the user wants none or nothing can."""
    arguments, latent_preview = _comfy("cli_args"), sys.modules.get("latent_preview")
    if not arguments or arguments.args.preview_method == arguments.LatentPreviewMethod.NoPreviews:
        return None
    if latent_format.rgb:
        return lambda latents: _picture(colours(latent_format, latents[:, :, -1:]))
    wants_decoder = arguments.args.preview_method == arguments.LatentPreviewMethod.TAESD
    if wants_decoder and (path := _tiny_decoder_file(latent_format)):
        try:
            decoder = open_tiny_decoder(path, device(), latent_format.channels)
            return lambda latents: _picture(decoder.show(latents))
        except (ValueError, OSError) as error:
            log.warning("Previews are made without the tiny decoder: %s", error)
    known = getattr(_comfy("latent_formats"), latent_format.comfy_name, None)
    previewer = latent_preview.get_previewer(device(), known()) if known and latent_preview else None
    return previewer and (lambda latents: previewer.decode_latent_to_preview(latents[:, :, -1:]))


def _tiny_decoder_file(latent_format: LatentFormat) -> Path | None:
    """Return the file of a tiny decoder that a user has put into models/vae_approx, None if there is none."""
    folders = sys.modules.get("folder_paths")
    names = folders.get_filename_list("vae_approx") if folders else []
    for wanted in latent_format.tiny_decoders:
        for name in names:
            if Path(name).name.startswith(wanted) and name.endswith(".safetensors"):
                return Path(folders.get_full_path("vae_approx", name))
    return None


def _picture(image_HWC: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image_HWC * 255).byte().numpy())


def colours(latent_format: LatentFormat, frame_BCThw: Tensor) -> Tensor:
    """Return an image [h, w, 3] in [0, 1] on the CPU of the first frame of normalised latents."""
    rgb, bias = (torch.tensor(row, dtype=torch.float32) for row in (latent_format.rgb, latent_format.rgb_bias))
    image = torch.einsum("chw,cr->hwr", frame_BCThw[0, :, 0].float().cpu(), rgb) + bias
    return ((image + 1) / 2).clamp(0, 1)


class LogProgress:
    """Report to the log, or to `write` (a terminal), the steps done and the seconds left."""

    def __init__(self, label: str, write: Callable[[str], None] | None = None):
        self.label, self.write = label, write or log.info
        self.started = time.monotonic()

    def update(self, done: int, total: int, x0: Tensor) -> None:
        elapsed = time.monotonic() - self.started
        left = elapsed / done * (total - done)
        self.write(f"{self.label} {done}/{total}, {elapsed:.1f} s gone, {left:.1f} s left")
