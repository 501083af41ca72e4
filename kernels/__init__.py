"""Faster spellings of functions whose plain PyTorch version lives in core. Ask `find`; never import a kernel file.

A kernel takes the arguments of its eager function. Its file imports Triton on top, so it is imported on first use only.
"""

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

OLDEST_TRITON = (3, 3)  # comes with the oldest PyTorch of the pack
OLDEST_CARD = (8, 0)  # compute capability; Ampere's has the first matrix units for bfloat16
FP8_CARD = (8, 9)  # the first with conversions to float8
WIDEST_ROW = 16384  # numbers that one program holds in registers

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_FORMATS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")  # of GGUF
BYTE_FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)  # of weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One kernel: where it is, and what it can do.

    `dtypes` are those of the tensors that it is given, `widest` the most numbers in a row of the first of them, and
    `capability` the oldest card.
    """

    file: str
    does: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    widest: int | None = WIDEST_ROW
    capability: tuple[int, int] = OLDEST_CARD

    def refuse(self, *tensors: Tensor) -> str | None:
        """Return why the kernel can't serve these tensors, in words, or None if it can."""
        reason = _no_triton() or _wrong_device([tensor.device for tensor in tensors], self.capability)
        if reason:
            return reason
        found = {tensor.dtype for tensor in tensors}
        if unknown := found - set(self.dtypes):
            return f"takes {_names(self.dtypes)}, not {_names(unknown)}"
        if self.widest is not None and tensors[0].shape[-1] > self.widest:
            return f"takes rows of at most {self.widest} numbers, not {tensors[0].shape[-1]}"
        return None

    def load(self, name: str) -> Callable[..., Any]:
        """Return the kernel's launcher, importing its file."""
        return getattr(import_module(f".{self.file}", __name__), name)


KERNELS: Mapping[str, Kernel] = {
    "layer_norm": Kernel(file="layer_norm", does="LayerNorm, modulated"),
    "add_norm": Kernel(file="layer_norm", does="gated residual, and the LayerNorm that follows"),
    "add_to_rows": Kernel(file="layer_norm", does="gated residual"),
    "rms_norm": Kernel(file="rms_norm", does="RMSNorm"),
    "dfloat11_decode": Kernel(
        file="dfloat11", does="DFloat11 to bf16", dtypes=(torch.uint8, torch.bfloat16), widest=None
    ),
    "norm_rotate": Kernel(file="rms_norm", does="RMSNorm of q or k and their rotation, into the attention's tensor"),
    "rows_int8": Kernel(file="quantise", does="rows to int8 with a scale for each"),
    "rows_float8": Kernel(file="quantise", does="rows to float8 with a scale for each", capability=FP8_CARD),
    "gelu_int8": Kernel(file="quantise", does="GELU, then int8 with a scale for each row"),
    "gelu_float8": Kernel(file="quantise", does="GELU, then float8 with a scale for each row", capability=FP8_CARD),
    "unpack_blocks": Kernel(
        file="gguf", does=f"GGUF's {', '.join(BLOCK_FORMATS)}, bit for bit", dtypes=(torch.uint8,), widest=None
    ),
    "dequantise_rows": Kernel(
        file="dequantise", does="fp8 and int8 weights, bit for bit", dtypes=(*BYTE_FORMATS, torch.float32), widest=None
    ),
    "attention_int8": Kernel(
        file="attention", does="attention with q and k in int8", dtypes=(torch.bfloat16, torch.float16), widest=128
    ),
    "norm_silu_into": Kernel(
        file="channel_norm", does="the VAE's norm and SiLU, into a convolution's window", widest=None
    ),
}


def find(name: str, *tensors: Tensor) -> tuple[Callable[..., Any] | None, str]:
    """Return the kernel of that name for these tensors and a word on it, or None and the reason why there is none.

    The tensors are those among its arguments, its rows first; of them only dtype, device and width count.
    """
    kernel = KERNELS.get(name)
    if kernel is None:
        return None, f"no kernel of the name {name!r} is built in"
    reason = kernel.refuse(*tensors)
    return (None, reason) if reason else (kernel.load(name), f"kernel {name}")


def errors() -> tuple[type[Exception], ...]:
    """Return what building or launching a kernel may raise."""
    own = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError, AssertionError)
    own += (ImportError, OSError, subprocess.SubprocessError)
    try:
        from triton.errors import TritonError
    except ImportError:  # a Triton that is not whole
        return own
    return TritonError, *own


@cache
def triton_version() -> str | None:
    """Return the version of Triton, None where there is none."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


@cache
def is_interpreted() -> bool:
    """Say whether Triton was told, by its own TRITON_INTERPRET, to run kernels step by step on the CPU, for tests."""
    if triton_version() is None:
        return False
    from .launch import IS_INTERPRETED

    return IS_INTERPRETED


def _no_triton() -> str | None:
    version = triton_version()
    if version is None:
        return "Triton is not installed: it comes with PyTorch for CUDA on Linux; on Windows install triton-windows"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton is {version}, and {'.'.join(map(str, OLDEST_TRITON))} or newer is needed: update PyTorch"
    return None


def _wrong_device(devices: list[torch.device], capability: tuple[int, int]) -> str | None:
    device = devices[0]
    if any(other != device for other in devices):
        return f"the tensors are on {' and '.join(sorted({str(other) for other in devices}))}"
    if is_interpreted():
        return None if _device_type(device) == "cpu" else "Triton runs in its interpreter (TRITON_INTERPRET is set)"
    if _device_type(device) != "cuda":
        return f"runs on CUDA cards, not on {_device_type(device)}"
    if torch.version.hip:
        return "is built for NVIDIA cards; on AMD's it has not been tried"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        card, wanted = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"needs compute capability {wanted}; {card} has {'.'.join(map(str, found))}"
    return None


def _device_type(device: torch.device) -> str:
    return device.type


def _names(dtypes: "set[torch.dtype] | tuple[torch.dtype, ...]") -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
