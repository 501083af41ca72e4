"""The operations against their definitions, written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from wanqwen.bench.measure import peak_bytes
from wanqwen.core.memory.trace import peak_bytes as traced_bytes
from wanqwen.core.ops import formats, gguf_blocks
from wanqwen.core.ops.attention import attention
from wanqwen.core.ops.conv import conv3d
from wanqwen.core.ops.embed import timestep_embedding
from wanqwen.core.ops.linear import Linear
from wanqwen.core.ops.norm import LayerNorm, RMSNorm, gated_add, modulate
from wanqwen.core.ops.rope import grid_rope, rotate

torch.manual_seed(0)


def test_attention_is_softmax_over_keys_with_their_bias() -> None:
    q, k, v = torch.randn(2, 9, 3, 8), torch.randn(1, 7, 3, 8), torch.randn(1, 7, 3, 8)
    bias = torch.randn(1, 7)
    logits = torch.einsum("blnd,bsnd->bnls", q.double(), k.double().expand(2, -1, -1, -1)) / math.sqrt(8)
    weights = (logits + bias[:, None, None]).softmax(dim=-1)
    expected = torch.einsum("bnls,bsnd->blnd", weights, v.double().expand(2, -1, -1, -1))
    assert torch.allclose(attention(q, k, v, bias).double(), expected, atol=1e-6)


def test_rope_rotates_adjacent_pairs_by_position_over_each_axis() -> None:
    grid, widths = (2, 3, 5), (8, 4, 4)
    x = torch.randn(1, 30, 2, 16)
    out = rotate(x, grid_rope([(torch.arange(n), w) for n, w in zip(grid, widths, strict=True)], torch.device("cpu")))
    token, position = 1 * 15 + 2 * 5 + 4, (1, 2, 4)
    start = 0
    for p, width in zip(position, widths, strict=True):
        for j in range(width // 2):
            angle = p * 10000 ** (-2 * j / width)
            pair = torch.view_as_complex(x[0, token, :, start : start + 2].double().contiguous())
            turned = torch.view_as_real(pair * complex(math.cos(angle), math.sin(angle)))
            assert torch.allclose(out[0, token, :, start : start + 2].double(), turned, atol=1e-6)
            start += 2


def test_rope_rotates_slices_of_any_layout() -> None:
    rope = grid_rope([(torch.arange(5), 8)], torch.device("cpu"))
    wide = torch.randn(1, 3, 5, 9)
    for x in (wide.transpose(1, 2)[..., :8], wide.transpose(1, 2)[..., 1:], wide.permute(0, 2, 3, 1)[:, :, 1:, :2]):
        tables = rope if x.shape[-1] == 8 else (rope[0][:, :1], rope[1][:, :1])
        assert torch.equal(rotate(x, tables), rotate(x.contiguous(), tables))


def test_timestep_embedding_has_its_cosines_first() -> None:
    out = timestep_embedding(torch.tensor([0.0, 999.0, 3.25]), 8)
    assert torch.equal(out[0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    angles = [999 * 10000 ** (-j / 4) for j in range(4)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert torch.allclose(out[1].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-7)
    assert out.dtype == torch.float32


def test_norms_compute_in_float32() -> None:
    x = torch.randn(2, 5, 16).bfloat16()
    rms = RMSNorm(16, 1e-6).bfloat16()
    rms.weight.data = torch.randn(16).bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * rms.weight.double()
    assert rms(x).dtype == torch.float32 and torch.allclose(rms(x).double(), expected, atol=1e-5)
    layer = LayerNorm(16, 1e-6)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert layer(x).dtype == torch.float32 and torch.allclose(layer(x).double(), normed, atol=1e-5)
    shift, scale, gate = torch.randn(3, 2, 1, 16)
    assert torch.allclose(modulate(x, shift, scale, 1e-6).double(), normed * (1 + scale) + shift, atol=1e-5)
    one = modulate(x, shift[:1], scale[:1], 1e-6)
    expected = normed * (1 + scale[:1]) + shift[:1]
    assert one.dtype == torch.float32 and torch.allclose(one.double(), expected, atol=1e-5)
    branch = torch.randn(2, 5, 16).bfloat16()
    out = gated_add(x, branch, gate)
    assert out.dtype == torch.float32 and torch.allclose(out.double(), wide + branch.double() * gate, atol=1e-5)


def test_linear_computes_in_the_dtype_of_its_input() -> None:
    linear = Linear(8, 4)
    linear.weight.data, linear.bias.data = torch.randn(4, 8).bfloat16(), torch.randn(4)
    x = torch.randn(3, 8)
    expected = x @ linear.weight.float().T + linear.bias
    assert linear(x).dtype == torch.float32 and torch.allclose(linear(x), expected, atol=1e-6)
    assert linear(x.bfloat16()).dtype == torch.bfloat16


def test_linear_applies_the_scale_of_an_fp8_weight() -> None:
    linear = Linear(8, 4, bias=False)
    weight = torch.randn(4, 8).to(torch.float8_e4m3fn)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = torch.randn(3, 8)
    for scale in (torch.tensor(0.25), torch.rand(4), torch.rand(4, 1)):
        linear.weight_scale = scale
        expected = x @ (weight.float() * scale.reshape(-1, 1)).T
        assert torch.allclose(linear(x), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [torch.tensor(0.37), torch.rand(2000), torch.rand(2000, 1)])
def test_scaled_weights_are_decoded_a_part_at_a_time(scale: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(2000, 50).to(torch.float8_e4m3fn)
    expected = (weight.float() * scale.reshape(-1, 1)).bfloat16()
    monkeypatch.setattr(gguf_blocks, "ELEMENTS_AT_ONCE", 333 * 50)
    assert torch.equal(formats.dequantise(weight, scale, torch.bfloat16), expected)
    peak = traced_bytes(lambda: formats.dequantise(weight, scale, torch.bfloat16))
    assert peak < expected.nbytes + 3 * 333 * 50 * 4


@pytest.mark.parametrize("options", [{}, {"padding": (0, 1, 1)}, {"stride": (2, 1, 1)}])
@pytest.mark.parametrize("is_small", [True, False])
def test_conv3d_gives_the_numbers_of_pytorch(options: dict[str, tuple[int, int, int]], is_small: bool) -> None:
    side = 5 if is_small else 48
    x, weight, bias = torch.randn(1, 9, 5, side, side), torch.randn(7, 9, 3, 3, 3), torch.randn(7)
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        x, weight = x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)
        expected = F.conv3d(x.double(), weight.double(), bias.double(), **options)
        with torch.no_grad():
            out = conv3d(x, weight, bias, **options)
        assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.allclose(conv3d(x.requires_grad_(), weight, bias, **options), out, atol=1e-4), "with gradients"
        x = x.detach()


def test_conv3d_does_not_unfold_small_inputs() -> None:
    x, weight, bias = torch.randn(1, 32, 6, 16, 16), torch.randn(32, 32, 3, 3, 3), torch.randn(32)
    with torch.no_grad():
        peak = peak_bytes(lambda: conv3d(x, weight, bias, padding=(0, 1, 1)), x.device)
    assert peak < 4 * x.nbytes + weight.nbytes * 2, "27 copies of the input would be more"
