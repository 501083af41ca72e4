"""What a step asks of CUDA: copies as the plan says, and nothing that makes the card or the CPU wait."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from wanqwen.core import runtime
from wanqwen.core.types import Conditioning, FastPaths, MemoryOptions, SampleRequest
from wanqwen.loading import DEMO_FOLDER, load_model
from wanqwen.tests.card.card import CardInRam

COUNTS = ("mallocs", "frees", "copied_bytes", "host_waits", "events")


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("source", ["pinned", "staged", "disk"])
@pytest.mark.parametrize("name", ["wan_dit", "qwen_dit"])
def test_steps_after_the_first_ask_for_no_memory_and_for_each_slab_once(
    card: CardInRam, name: str, source: str, interleave: bool
) -> None:
    handle = load_model(DEMO_FOLDER / f"{name}.safetensors")
    options = MemoryOptions(swapped=4, slots=2, source=source, interleave=interleave)
    handle = replace(handle, memory=options, fast=FastPaths(kernels="exact"))
    width = handle.identity.config.text_dim
    positive, negative = (Conditioning(text=torch.randn(1, n, width)) for n in (7, 4))
    request = SampleRequest(
        latent=torch.zeros(1, 16, 1, 8, 8), positive=positive, negative=negative, steps=5, guidance=(3.0,)
    )
    seen: list[dict[str, int]] = []

    class Progress:
        def update(self, done: int, total: int, x0: torch.Tensor) -> None:
            seen.append({name: card.count(name) for name in COUNTS})

    runtime.generate(handle, request, Progress())
    loaded = runtime.loaded_of(handle, runtime.compute_dtype(handle, torch.device("cuda")))
    slabs = sum(layout.nbytes for layout in loaded.layouts()[:-1])
    walks = 1 if interleave else 2
    gate = walks * len(loaded.blocks)  # which lets the CPU be two blocks ahead, and not more
    slabs_wait = 0 if source == "pinned" else walks * len(loaded.blocks)  # by the thread that fills staging buffers
    for before, after in pairwise(seen[1:]):  # the first step brings what stays
        step = {name: after[name] - before[name] for name in COUNTS}
        assert step["mallocs"] == step["frees"] == step["events"] == 0, step
        assert walks * slabs <= step["copied_bytes"] < walks * slabs + 200_000, (step, slabs)
        assert step["host_waits"] <= gate + slabs_wait + 1, step  # one more to ask whether the numbers are finite
