import sys
from collections.abc import Mapping

import gguf
import pytest
import torch
from torch import Tensor
from wanqwen.core.ops.formats import dequantise, layout
from wanqwen.core.ops.gguf_blocks import UNPACK
from wanqwen.core.storage import PACKINGS
from wanqwen.core.weights.targets import TARGETS, Layer, Stored

E4M3_MAX = 448.0


def layer(weight: Tensor, scale: Tensor | None = None, kind: str = "F32") -> Layer:
    return Layer("some.layer.weight", tuple(weight.shape), [Stored(weight, scale, kind)])


def packed(target: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a layer `x`, which are held against what was planned for its shape."""
    row = TARGETS[target]
    made = dict(row.pack({"x": layer(weight)}))
    plan: Mapping = row.planes({"x": tuple(weight.shape)})
    assert list(made) == list(plan)
    for name, info in plan.items():
        assert layout(info) == (made[name].dtype, tuple(made[name].shape))
    return made


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(70, 96, generator=generator) * torch.logspace(-9, 4, 70)[:, None]
    rows[3], rows[5] = 0, 1e-44  # no scale is that small
    return rows


def test_fp8_rows_are_the_formula(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanqwen.core.weights.targets.ELEMENTS_AT_ONCE", 7 * 96)  # pieces that don't divide the rows
    made = packed("fp8_scaled", weight)
    peak = weight.abs().amax(1, keepdim=True)
    scale = torch.where(peak > 0, (peak / E4M3_MAX).clamp_min(2.0**-126), 1.0)
    assert torch.equal(made["x.scale_weight"], scale)
    wanted = (weight / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    assert torch.equal(made["x.weight"].view(torch.uint8), wanted.view(torch.uint8))
    found = dequantise(made["x.weight"], made["x.scale_weight"], torch.float32)
    # Three bits of mantissa: half a step is 1/16 of a number; below 2^-6 steps are 2^-9 of the scale.
    assert ((found - weight).abs() <= torch.maximum(weight.abs() / 16, scale * 2.0**-10) * (1 + 1e-6)).all()
    assert not found[3].any()


def test_fp8_with_one_scale_is_the_formula(weight: Tensor) -> None:
    made = packed("fp8_scaled_tensor", weight)
    scale = weight.abs().max() / E4M3_MAX
    assert torch.equal(made["x.scale_weight"], scale)
    wanted = (weight / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    assert torch.equal(made["x.weight"].view(torch.uint8), wanted.view(torch.uint8))
    assert packed("fp8_scaled_tensor", torch.zeros(4, 4))["x.scale_weight"] == 1


def test_rows_of_different_size_lose_less_with_a_scale_each(weight: Tensor) -> None:
    def error(target: str) -> Tensor:
        made = packed(target, weight)
        found = dequantise(made["x.weight"], made["x.scale_weight"], torch.float32)
        return ((found - weight).abs() / weight.abs().clamp_min(1e-30))[6:].mean()

    assert error("fp8_scaled") < error("fp8_scaled_tensor") / 3


def test_int8_rows_are_the_formula(weight: Tensor) -> None:
    made = packed("int8", weight)
    peak = weight.abs().amax(1, keepdim=True)
    scale = torch.where(peak > 0, (peak / 127).clamp_min(2.0**-126), 1.0)
    assert torch.equal(made["x.weight_scale"], scale)
    assert torch.equal(made["x.weight"], (weight / scale).round().clamp(-127, 127).to(torch.int8))
    assert bytes(made["x.comfy_quant"].tolist()).strip() == b'{"format": "int8_tensorwise"}'


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_blocks_are_those_of_the_package(kind: str, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanqwen.core.weights.targets.ELEMENTS_AT_ONCE", 7 * 96)
    made = packed(f"gguf_{kind.lower()}", weight)["x.weight"]
    wanted = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(made, torch.from_numpy(wanted))
    found = UNPACK[kind](made.view(-1, PACKINGS[kind].num_bytes)).view(weight.shape)
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(wanted, gguf.GGMLQuantizationType[kind])))


@pytest.mark.parametrize(("target", "kind"), [("gguf_bf16", "BF16"), ("gguf_fp16", "F16")])
def test_16_bit_gguf_is_that_of_the_package(target: str, kind: str, weight: Tensor) -> None:
    made = packed(target, weight[:40])["x.weight"].view(torch.uint8)
    wanted = gguf.quantize(weight[:40].numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(made.flatten(), torch.from_numpy(wanted).contiguous().view(torch.uint8).flatten())


@pytest.mark.parametrize("target", ["fp8_scaled", "fp8_scaled_tensor", "int8", "gguf_q8_0"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_numbers_without_a_scale_are_named(target: str, bad: float, weight: Tensor) -> None:
    weight[40, 9] = bad
    with pytest.raises(ValueError, match=r"some\.layer\.weight holds infinite numbers or NaN.*--keep some\.layer"):
        packed(target, weight)


def test_too_large_for_fp16_is_named() -> None:
    weight = torch.tensor([[65504.0, -65519.9]])
    assert layer(weight).at(torch.float16).isfinite().all()
    with pytest.raises(ValueError, match=r"some\.layer\.weight has numbers beyond 65504"):
        layer(weight * 2).at(torch.float16)
    stored = torch.tensor([[float("inf")]], dtype=torch.float16)
    assert layer(stored, kind="F16").at(torch.float16) is not None  # as it was


def test_quantised_weights_are_made_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(64, 1, generator=generator)
    found = layer(weight, scale, "F8_E4M3").at(torch.bfloat16)
    assert torch.equal(found, (weight.float() * scale).bfloat16())
    twice = weight.bfloat16() * scale.bfloat16()
    assert not torch.equal(found, twice)


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch, weight: Tensor) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"package gguf, .*pip install gguf, or choose"):
        TARGETS["gguf_q8_0"].check()
    TARGETS["gguf_bf16"].check()
    TARGETS["fp8_scaled"].check()
