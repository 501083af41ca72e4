"""The Block Swap node: what is fixed by hand reaches the model's options and the plan, and nothing else changes."""

from dataclasses import replace

import pytest
import torch
from wanqwen import plans
from wanqwen.core import host, planning
from wanqwen.core.memory.placement import Machine
from wanqwen.core.types import FastPaths, MemoryOptions

GIB = 1 << 30
AUTO = {
    "blocks_to_swap": -1,
    "slots": 0,
    "source": "auto",
    "interleave": "auto",
    "chunk_rows": 0,
    "headroom_gb": -1.0,
    "max_vram_gb": 0.0,
    "max_pinned_gb": -1.0,
}


def test_nothing_is_fixed_by_default(nodes, model) -> None:
    out = nodes.BlockSwap.execute(model, **AUTO)
    assert out.values[0].memory == MemoryOptions() == model.memory
    assert out.values[0].weights is model.weights


def test_every_field_can_be_fixed(nodes, model) -> None:
    chosen = AUTO | {"blocks_to_swap": 0, "slots": 3, "source": "disk", "interleave": "off", "chunk_rows": 7}
    chosen |= {"headroom_gb": 1.5, "max_vram_gb": 8.0, "max_pinned_gb": 0.0}
    out = nodes.BlockSwap.execute(model, **chosen)
    assert out.values[0].memory == MemoryOptions(
        swapped=0, slots=3, source="disk", interleave=False, chunk_rows=7, headroom=3 * GIB // 2, vram=8 * GIB, pinned=0
    )
    assert model.memory == MemoryOptions()


def test_with_a_latent_the_plan_is_shown(nodes, model, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = {"samples": torch.zeros(1, 16, 1, 8, 8)}
    out = nodes.BlockSwap.execute(model, **AUTO, latent=latent)
    assert out.ui == {"text": ["This machine computes on its cpu: the weights stay in RAM, nothing has to stream."]}
    monkeypatch.setattr(plans, "computes_in_ram", lambda device: False)
    machine = Machine(vram=1 << 20, ram=1 << 34, total_ram=1 << 35)
    monkeypatch.setattr(plans, "machine_of", lambda device: machine)
    monkeypatch.setattr(plans.host, "total_memory", lambda device: (1 << 30) + plans.SYSTEM_VRAM)
    monkeypatch.setattr(plans, "card_of", lambda device: planning.CARDS["RTX 3090"])
    lines = nodes.BlockSwap.execute(model, **AUTO | {"blocks_to_swap": 2}, latent=latent).ui["text"]
    assert lines[0].startswith("0 of 2 blocks stay on the device, 2 stream through 1 slots: 2 from pinned RAM;")
    assert lines[1].startswith("VRAM at most 0.01 GB") and len(lines) == 3
    [line] = nodes.BlockSwap.execute(model, **AUTO | {"blocks_to_swap": 3}, latent=latent).ui["text"]
    assert line.startswith("Block Swap: 3 blocks are to be swapped, and the model has 2: give 0 to 2")


def test_what_makes_no_sense_is_refused(nodes, model) -> None:
    with pytest.raises(ValueError, match=r"Block Swap: headroom is -\d+: give 0 or more"):
        nodes.BlockSwap.execute(model, **AUTO | {"headroom_gb": -0.5})


@pytest.mark.parametrize(
    ("change", "message"), [({"source": "tape"}, "source is 'tape'"), ({"interleave": "both"}, "interleave is 'both'")]
)
def test_other_choices_are_refused(nodes, change: dict, message: str) -> None:
    chosen = {"source": "auto", "interleave": "on"} | change
    assert message in nodes.BlockSwap.validate_inputs(**chosen)
    assert nodes.BlockSwap.validate_inputs("pinned", None) is True


def test_the_vae_s_way_can_be_fixed(nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = nodes.LoadWanVAE.execute("tiny.safetensors", "auto").values[0]
    latent = {"samples": torch.randn(1, 16, 2, 4, 4)}
    asked, original = [], type(vae).decode
    monkeypatch.setattr(
        type(vae), "decode", lambda self, x, mode=None: asked.append(mode) or original(self, x, mode=mode)
    )
    pictures = [
        nodes.VAEDecode.execute(latent, vae, "auto", 256, 64, *memory).values[0]
        for memory in ((), ("auto",), ("smallest",), ("whole",))
    ]
    assert [mode and mode.name for mode in asked] == [None, None, "smallest", "whole"]
    assert all(torch.allclose(picture, pictures[0], atol=1e-5) for picture in pictures)
    assert "memory is 'none'" in nodes.VAEDecode.validate_inputs("auto", "none")


def test_fast_paths_are_chosen_and_said(nodes, model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.fast == FastPaths(kernels="auto")
    out = nodes.ChooseFastPaths.execute(model, kernels="exact")
    assert out.values[0].fast == FastPaths(kernels="exact") and out.values[0].weights is model.weights
    assert out.ui == {"text": ["This machine computes on its cpu, with plain PyTorch."]}
    monkeypatch.setattr(host, "device", lambda: torch.device("cuda"))
    out = nodes.ChooseFastPaths.execute(replace(model, dtype=torch.bfloat16), kernels="exact")
    assert out.ui == {"text": ["Fused kernels are off: what lies between the products has the bits of plain PyTorch."]}
    assert "choose" in nodes.ChooseFastPaths.validate_inputs(kernels="fast")


def test_products_in_8_bits_are_chosen(nodes, model) -> None:
    out = nodes.ChooseFastPaths.execute(model, kernels="auto", products="8bit")
    assert out.values[0].fast == FastPaths(products="8bit") and model.fast == FastPaths()
    said = {"text": ["This machine computes on its cpu, with plain PyTorch."]}
    assert out.ui == said, "the model has nothing in 8 bits"
    assert nodes.ChooseFastPaths.validate_inputs(kernels="auto") is True
    assert "products is 'fp4': choose one of auto" in nodes.ChooseFastPaths.validate_inputs("auto", "fp4")
