"""Two hundred runs that break anywhere in CUDA, in a file or by the user; each leaves all as it was before."""

import ctypes
import gc
import os
import random
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
import torch
from wanqwen.core import host, runtime
from wanqwen.core.sampling.sample import SampleError
from wanqwen.core.types import Conditioning, FastPaths, MemoryOptions, SampleRequest
from wanqwen.loading import DEMO_FOLDER, load_model
from wanqwen.tests.card.card import CardInRam

RUNS = 200
OUT_OF_MEMORY, UNKNOWN = 2, 999  # cudaErrorMemoryAllocation, cudaErrorUnknown
# A function of CUDA's, what it fails with, and among how many calls the one that fails is chosen.
FUNCTIONS = {
    "cudaMalloc": (OUT_OF_MEMORY, 8),
    "cudaMemcpyAsync": (UNKNOWN, 40),
    "cudaEventRecord": (UNKNOWN, 40),
    "cudaEventSynchronize": (UNKNOWN, 20),
    "cudaEventCreateWithFlags": (UNKNOWN, 15),
    "cudaStreamWaitEvent": (UNKNOWN, 20),
    "cudaStreamSynchronize": (UNKNOWN, 10),
    "cudaHostRegister": (OUT_OF_MEMORY, 4),
    "cudaLaunchKernel": (UNKNOWN, 300),
}
OTHERS = ("full", "reader", "truncated", "cancel")
# PyTorch asks again for memory once it has given back what it keeps, and we do without memory that can't be pinned.
SURVIVED = ("cudaMalloc", "cudaHostRegister")
CARD, TAKEN = int(os.environ.get("CARD_BYTES", 24 << 30)), 512 << 20  # bytes, and how many others have
COUNTS = ("used", "registered", "registered_bytes", "host_allocated_bytes", "events")


def left(card: CardInRam) -> dict[str, int]:
    """Return what there is of everything that a run might leave behind."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    files = [file.path for file in psutil.Process().open_files()]
    return {name: card.count(name) for name in COUNTS} | {
        "allocated": torch.cuda.memory_allocated(),
        "threads": len([thread for thread in threading.enumerate() if thread.name.startswith("slabs")]),
        "files": len(files),
    }


def test_faults_leave_nothing_behind(card: CardInRam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copy(DEMO_FOLDER / "wan_dit.safetensors", tmp_path))
    whole, rng = path.read_bytes(), random.Random(0)
    handle = replace(load_model(path), fast=FastPaths(kernels="exact"))
    width = handle.identity.config.text_dim
    texts = [torch.randn(1, n, width, generator=torch.Generator().manual_seed(n)) for n in (7, 4)]
    positive, negative = (Conditioning(text=text) for text in texts)
    request = SampleRequest(
        latent=torch.zeros(1, 16, 1, 8, 8), positive=positive, negative=negative, steps=2, guidance=(3.0,)
    )
    loaded = runtime.loaded_of(handle, runtime.compute_dtype(handle, torch.device("cuda")))
    wanted = runtime.generate(replace(handle, memory=MemoryOptions(swapped=0)), request)
    # What PyTorch takes once: streams, workspaces of cuBLAS, events that it keeps for itself.
    for source in ("pinned", "staged", "disk"):
        handle = replace(handle, memory=MemoryOptions(swapped=4, source=source))
        assert torch.equal(runtime.generate(handle, request), wanted)
    loaded.let_go()
    before, broke, survived = left(card), dict.fromkeys((*FUNCTIONS, *OTHERS), 0), 0
    fill = type(loaded.weights).fill

    @dataclass
    class Filling:
        """Take the rest of the card after the first step, to the last page, if that is what is to happen."""

        is_meant: bool
        taken: list[torch.Tensor] = field(default_factory=list)

        def update(self, done: int, total: int, x0: torch.Tensor) -> None:
            if self.is_meant and done == 1:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                card.card.card_size(ctypes.c_size_t(card.count("used") + TAKEN))
                for size in (2 << 20, 1 << 19, 1 << 12, 512):
                    with suppress(torch.OutOfMemoryError):
                        while True:
                            self.taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

    for number in range(RUNS):
        kind = list(broke)[number % len(broke)]
        options = MemoryOptions(swapped=rng.randint(1, 4), source=rng.choice(("pinned", "staged", "disk")))
        with monkeypatch.context() as patch:
            if kind in FUNCTIONS:
                error, most = FUNCTIONS[kind]
                card.fails(kind, rng.randint(1, most), error)
            elif kind == "truncated":
                os.truncate(path, rng.randint(0, path.stat().st_size - 1))
            elif kind != "full":
                ticks = iter(range(rng.randint(1, 8)))

                def tick(ticks=ticks, kind=kind):
                    if next(ticks, None) is None:
                        raise OSError(5, "Input/output error") if kind == "reader" else KeyboardInterrupt

                if kind == "reader":
                    patch.setattr(type(loaded.weights), "fill", lambda *a, tick=tick: (tick(), fill(*a)))
                else:
                    patch.setattr(host, "check_interrupt", tick)
            try:
                made = runtime.generate(replace(handle, memory=options), request, Filling(kind == "full"))
                assert torch.equal(made, wanted), f"run {number} went on after {kind}, and made something else"
                survived += 1
            except (RuntimeError, OSError, ValueError, KeyboardInterrupt, SampleError):
                broke[kind] += 1
            card.fails("", 0, 0)
            card.card.card_size(ctypes.c_size_t(CARD))
        path.write_bytes(whole)
        loaded.let_go()
        after = left(card)
        assert after == before, (number, kind, options)
    print(f"broke off: {broke}; went on: {survived}")
    assert all(broke[kind] for kind in broke if kind not in SURVIVED), broke
    assert survived > RUNS // len(broke)
    assert torch.equal(runtime.generate(replace(handle, memory=MemoryOptions(swapped=4)), request), wanted)
