"""What only a real CUDA device shows; skipped where there is none."""

from dataclasses import replace

import pytest
import torch
from wanqwen import kernels
from wanqwen.core import runtime
from wanqwen.core.ops.choice import EXACT, FUSED, choose
from wanqwen.core.ops.proof import verdict
from wanqwen.core.ops.trials import TRIALS, Tokens
from wanqwen.core.types import AUTO_KERNELS, EXACT_KERNELS, Conditioning, FastPaths, SampleRequest
from wanqwen.loading import DEMO_FOLDER, load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

CUDA = torch.device("cuda")
WIDE = Tokens(rows=300, heads=40, head_width=128, batch=2)  # as Wan-14B's rows; GELU's are 15,360 wide


@pytest.mark.parametrize("dtype", kernels.FLOATS, ids=str)
@pytest.mark.parametrize("name", TRIALS)
def test_kernels_pass_their_trials_at_full_width(name: str, dtype: torch.dtype) -> None:
    found = verdict(name, WIDE, dtype, CUDA)
    if not _given(name, dtype) <= set(kernels.KERNELS[name].dtypes):
        assert found.kernel is None and found.reason.startswith("takes ")
    elif torch.cuda.get_device_capability() < kernels.KERNELS[name].capability:
        assert found.kernel is None and "compute capability" in found.reason
    else:
        assert found.kernel is not None, found.reason


def _given(name: str, dtype: torch.dtype) -> set[torch.dtype]:
    """Return the dtypes of what a kernel is tried on: stored weights have their own, whatever activations have."""
    small, cpu = Tokens(rows=2, heads=1, head_width=32), torch.device("cpu")
    arguments = [trial.tensors(trial.arguments(small, dtype, cpu)) for trial in TRIALS[name]]
    return {tensor.dtype for tensors in arguments for tensor in tensors}


@pytest.mark.parametrize("name", ["wan_dit", "qwen_dit"])
def test_a_run_takes_kernels_and_stays_near_the_exact_one(name: str) -> None:
    handle = load_model(DEMO_FOLDER / f"{name}.safetensors")
    ops, said = choose(AUTO_KERNELS, handle.family.heads(handle.identity.config), torch.bfloat16, CUDA)
    assert all(getattr(ops, name) is not getattr(EXACT, name) for name in FUSED), said
    text = torch.randn(1, 7, handle.identity.config.text_dim)
    request = SampleRequest(latent=torch.zeros(1, 16, 1, 8, 8), positive=Conditioning(text=text), steps=4)
    fused = runtime.generate(handle, request)
    assert torch.equal(fused, runtime.generate(handle, request))
    exact = runtime.generate(replace(handle, fast=FastPaths(kernels=EXACT_KERNELS)), request)
    assert (fused - exact).norm() < 0.05 * exact.norm()
