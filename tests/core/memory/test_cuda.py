"""The same promises on a real CUDA device; skipped where there is none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend
from wanqwen.core import host, planning, runtime
from wanqwen.core.memory.block_swap import BlockSwap
from wanqwen.core.memory.link import CudaLink
from wanqwen.core.memory.supply import Source, Supply
from wanqwen.core.ops import attention
from wanqwen.core.sampling.solvers import SOLVERS
from wanqwen.core.types import Conditioning, MemoryOptions, SampleRequest
from wanqwen.loading import DEMO_FOLDER, load_model
from wanqwen.tests.core.memory.toy import DEPTH, forward, from_file, inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

CUDA = torch.device("cuda")


@pytest.mark.parametrize("kind", Source)
def test_streamed_blocks_have_the_bits_of_resident_ones(path: Path, kind: Source) -> None:
    loaded = from_file(path)
    layouts = loaded.layouts()[:-1]
    size = max(layout.nbytes for layout in layouts)

    def run(num_streaming: int) -> list[torch.Tensor]:
        own = {i: torch.empty(size, dtype=torch.uint8, device=CUDA) for i in range(DEPTH) if i >= num_streaming}
        ring = [torch.empty(size, dtype=torch.uint8, device=CUDA) for _ in range(2)]
        link = CudaLink(CUDA, len(own) + len(ring))
        swap = BlockSwap(own, ring, Supply(loaded, layouts, dict.fromkeys(range(num_streaming), kind), link, CUDA))
        swap.start()
        try:
            return [forward(loaded.blocks, x.to(CUDA), [swap]).cpu() for x in inputs(20)]
        finally:
            swap.close()

    wanted = run(0)
    for num_streaming in (3, DEPTH):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(run(num_streaming), wanted, strict=True))


@pytest.mark.parametrize("name", ["wan_dit", "qwen_dit"])
@pytest.mark.parametrize("source", ["pinned", "staged", "disk"])
def test_streamed_runs_have_the_bits_of_resident_ones(name: str, source: str) -> None:
    handle = load_model(DEMO_FOLDER / f"{name}.safetensors")
    width = handle.identity.config.text_dim
    prompts = [Conditioning(text=torch.randn(1, n, width)) for n in (7, 4)]
    request = SampleRequest(
        latent=torch.zeros(1, 16, 1, 8, 8), positive=prompts[0], negative=prompts[1], steps=3, guidance=(3.0,)
    )
    wanted = runtime.generate(replace(handle, memory=MemoryOptions(swapped=0)), request)
    for interleave in (False, True):
        options = MemoryOptions(swapped=4, source=source, interleave=interleave)
        assert torch.equal(runtime.generate(replace(handle, memory=options), request), wanted)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_allocator_backend() != "native", reason="others count in other ways"
)
def test_a_run_takes_no_more_than_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """How near the plan is `test_planning` shows, on models of the published widths."""
    handle = load_model(DEMO_FOLDER / "wan_dit.safetensors")
    width = handle.identity.config.text_dim
    prompts = [Conditioning(text=torch.randn(1, n, width)) for n in (7, 4)]
    request = SampleRequest(
        latent=torch.zeros(1, 16, 3, 30, 52), positive=prompts[0], negative=prompts[1], steps=2, guidance=(3.0,)
    )
    runtime.generate(handle, request)  # in which the link is measured
    plans, original = [], planning.make_plan
    monkeypatch.setattr(planning, "make_plan", lambda *a: plans.append(original(*a)) or plans[-1])
    for solver in SOLVERS:
        host.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runtime.generate(handle, replace(request, solver=solver))
        assert torch.cuda.max_memory_allocated() - before <= plans[-1].peak, solver


def test_without_flash_attention_cudnn_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    asked: list[int] = []

    def attend(q: torch.Tensor, *others: torch.Tensor, **options: object) -> torch.Tensor:
        asked.extend(torch._C._get_sdp_priority_order()[:2])
        return q

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)
    q = torch.randn(1, 40, 2, 64, device=CUDA, dtype=torch.bfloat16)
    attention.attention(q, q, q)
    assert asked == [int(SDPBackend.CUDNN_ATTENTION), int(SDPBackend.EFFICIENT_ATTENTION)]
    assert torch._C._get_sdp_priority_order()[:2] != asked
