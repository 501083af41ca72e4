"""Every kernel beside float64, on shapes that divide nothing: interpreted on the CPU, compiled where there is CUDA."""

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wanqwen import kernels
from wanqwen.core.memory.trace import LiveBytes
from wanqwen.core.ops import eight_bits
from wanqwen.core.ops.proof import PROBE
from wanqwen.core.ops.trials import TRIALS, Tokens, Trial, deviation
from wanqwen.core.storage import PACKINGS
from wanqwen.tests.kernels import references

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's; 1 / inf is right

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT32_NOISE = 2e-6  # of sums in float32, beside the number and its row
SHAPES = {
    "odd": Tokens(rows=7, heads=3, head_width=10, batch=2),
    "one row": Tokens(rows=1, heads=1, head_width=6),
    "wide": Tokens(rows=3, heads=9, head_width=82),
}


def _trials(*names: str) -> pytest.MarkDecorator:
    found = [pytest.param(name, trial, id=f"{name}-{i}") for name in names for i, trial in enumerate(TRIALS[name])]
    return pytest.mark.parametrize(("name", "trial"), found)


ROUNDED = {
    "rows_int8": torch.int8, "rows_float8": torch.float8_e4m3fn,
    "gelu_int8": torch.int8, "gelu_float8": torch.float8_e4m3fn,
}  # fmt: skip
BITS = ("unpack_blocks", "dequantise_rows")
ATTENTION = "attention_int8"  # see test_attention.py
each_trial = _trials(*TRIALS)
each_dtype = pytest.mark.parametrize("dtype", kernels.FLOATS, ids=str)


class Counted:
    """A Triton function that counts its launches."""

    def __init__(self, function: Any):
        self.function, self.launches = function, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.function[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Counted]:
    """The Triton functions of a kernel's file: what is not launched has not been tested."""
    module = sys.modules[kernels.KERNELS[name].load(name).__module__]
    found = [Counted(value) for key, value in vars(module).items() if key.endswith("_kernel")]
    for one in found:
        monkeypatch.setattr(module, one.function.__name__, one)
    return found


def run(name: str, trial: Trial, arguments: tuple, launches: list[Counted]) -> tuple[Tensor, ...]:
    """Return what the kernel makes, and no other."""
    kernel, reason = kernels.find(name, *trial.tensors(arguments))
    assert kernel is not None, reason
    results = trial.run(kernel, arguments)
    assert sum(one.launches for one in launches) == 1
    return results


@_trials(*(name for name in TRIALS if name not in (*ROUNDED, *BITS, ATTENTION)))
@each_dtype
@pytest.mark.parametrize("tokens", SHAPES.values(), ids=SHAPES)
def test_a_kernel_rounds_what_is_true_once(
    name: str, trial: Trial, dtype: torch.dtype, tokens: Tokens, launches: list[Counted]
) -> None:
    wanted = getattr(references, name)(*trial.arguments(tokens, dtype, DEVICE))
    results = run(name, trial, trial.arguments(tokens, dtype, DEVICE), launches)
    assert len(results) == len(wanted)
    for result, true in zip(results, wanted, strict=True):
        assert result.shape == true.shape
        within_half_a_step(result, true)


def within_half_a_step(result: Tensor, true: Tensor) -> None:
    """Hold that a result is the nearest number of its dtype, but for the noise of float32."""
    row = true.square().mean(-1, keepdim=True).sqrt()
    noise = FLOAT32_NOISE * (true.abs() + row)
    format_ = torch.finfo(result.dtype)
    half_step = (format_.eps / 2 * true.abs()).clamp_min(format_.smallest_normal * format_.eps / 2)
    excess = (result.double() - true).abs() - half_step - noise
    assert excess.max() <= 0, f"{float(excess.max()):.3g} too far, of numbers of {float(row.mean()):.3g}"


@_trials(*ROUNDED)
@each_dtype
@pytest.mark.parametrize("tokens", SHAPES.values(), ids=SHAPES)
def test_rows_in_8_bits_are_half_a_step_from_what_is_true(
    name: str, trial: Trial, dtype: torch.dtype, tokens: Tokens, launches: list[Counted]
) -> None:
    (x,) = trial.arguments(tokens, dtype, DEVICE)
    x[-1, -1] = 0  # a row of nothing
    true = F.gelu(x.double(), approximate="tanh") if name.startswith("gelu") else x.double()
    values, scale = run(name, trial, (x,), launches)
    largest = eight_bits.LARGEST[ROUNDED[name]]
    assert values.dtype == ROUNDED[name] and scale.shape == (*x.shape[:-1], 1)
    assert torch.allclose(scale.double(), (true.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-12), rtol=1e-5)
    half_step = (
        scale.double() / 2 if ROUNDED[name] == torch.int8 else float8_half_step(true / scale.double()) * scale.double()
    )
    excess = (values.double() * scale.double() - true).abs() - half_step * (1 + 1e-4) - 1e-5 * true.abs()
    assert excess.max() <= 0


def float8_half_step(x: Tensor) -> Tensor:
    """Return half the distance of numbers of float8 (e4m3) around x: three bits of mantissa, exponents from -6."""
    return torch.exp2(x.abs().clamp_min(2.0**-6).log2().floor() - 4)


@_trials(*BITS)
@each_dtype
def test_what_is_only_unpacked_has_the_bits_of_plain_pytorch(
    name: str, trial: Trial, dtype: torch.dtype, launches: list[Counted]
) -> None:
    tokens = Tokens(rows=37, heads=3, head_width=128)
    arguments = trial.arguments(tokens, dtype, DEVICE)
    (wanted,) = trial.run(trial.eager, arguments)
    (found,) = run(name, trial, arguments, launches)
    same_bits(found, wanted)


def same_bits(found: Tensor, wanted: Tensor) -> None:
    """Hold that two tensors are the same, zeros' signs included; what is not a number is none in both."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(found.isnan(), wanted.isnan())
    as_integers = {2: torch.int16, 4: torch.int32}[wanted.itemsize]
    assert torch.equal(*(x.nan_to_num(0, math.inf, -math.inf).view(as_integers) for x in (found, wanted)))


# Of all sizes: some make numbers below the normal ones, some infinite, some none.
SCALES = torch.tensor([1.0, 0.37, -2.5, 7e4, 3e38, 1e-7, 3e-39, 0.0, math.inf, math.nan], device=DEVICE)
# Rows that are longer than what one program takes, and begin with different codes.
CODES = torch.arange(len(SCALES) * 1029, device=DEVICE).to(torch.uint8).view(len(SCALES), -1)
LAID_OUT = {
    "odd start": F.pad(CODES.flatten(), (1, 0))[1:].view(CODES.shape),
    "columns": F.pad(CODES, (3, 5))[:, 3:-5],
    "every other": CODES.repeat_interleave(2, 1)[:, ::2],
    "transposed": CODES.t().contiguous().t(),
    "deep": CODES.view(len(CODES), 3, -1),
    "one number a row": CODES[:, 0],
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of numbers that are infinite or none
@pytest.mark.parametrize("name", ["dequantise_rows"])
@pytest.mark.parametrize("stored", kernels.BYTE_FORMATS, ids=str)
@each_dtype
def test_every_code_has_the_bits_of_plain_pytorch(
    name: str, stored: torch.dtype, dtype: torch.dtype, launches: list[Counted]
) -> None:
    weight, kernel = CODES.view(stored), kernels.KERNELS[name].load(name)
    scales = *SCALES, SCALES, SCALES[:, None], SCALES[:1], SCALES[:, None].bfloat16(), None
    for scale in scales:
        same_bits(kernel(weight, scale, dtype), eight_bits.dequantise_rows(weight, scale, dtype))
    assert [one.launches for one in launches] == [len(scales)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("stored", kernels.BYTE_FORMATS, ids=str)
@pytest.mark.parametrize("codes", LAID_OUT.values(), ids=LAID_OUT)
def test_codes_may_lie_anywhere(stored: torch.dtype, codes: Tensor) -> None:
    weight, kernel = codes.view(stored), kernels.KERNELS["dequantise_rows"].load("dequantise_rows")
    for scale in (SCALES, SCALES[1], None):
        wanted = eight_bits.dequantise_rows(weight, scale, torch.bfloat16)
        same_bits(kernel(weight, scale, torch.bfloat16), wanted)
    with pytest.raises(RuntimeError, match="expand"):
        kernel(weight, SCALES[:3], torch.bfloat16)
    assert kernel(weight[:0], SCALES[:0], torch.bfloat16).shape == (0, *weight.shape[1:])


def test_a_weight_in_8_bits_takes_no_memory_but_its_numbers() -> None:
    """On the meta device, where launchers allocate what they do elsewhere; plain PyTorch has parts in float32 too."""
    meta, kernel = torch.device("meta"), kernels.KERNELS["dequantise_rows"].load("dequantise_rows")
    weight, scale = (torch.empty(4096, 2048, dtype=stored, device=meta) for stored in (torch.int8, torch.float32))
    for laid_out in (weight, weight[:, 1:1025], weight.t()):
        peaks = []
        for call in (kernel, eight_bits.dequantise_rows):
            with LiveBytes(meta) as counted:
                call(laid_out, scale[: len(laid_out), :1], torch.bfloat16)
            peaks.append(counted.peak)
        assert peaks[0] == 2 * laid_out.numel() < peaks[1]


def test_the_formats_of_blocks_are_those_that_can_be_asked_for() -> None:
    launcher = kernels.KERNELS["unpack_blocks"].load("unpack_blocks")
    formats = sys.modules[launcher.__module__].FORMATS
    assert tuple(formats) == kernels.BLOCK_FORMATS
    for stored, (parts, length, num_bytes) in formats.items():
        packing = PACKINGS[stored]
        assert (packing.numbers, packing.num_bytes) == (parts * length, num_bytes)


@_trials(*(name for name in TRIALS if name not in BITS))
def test_a_kernel_passes_its_trial_at_the_size_that_runs_take(name: str, trial: Trial) -> None:
    """Plain PyTorch rounds on its way too, so that being exact is not enough."""
    arguments = trial.arguments(PROBE, torch.bfloat16, DEVICE)
    kernel, reason = kernels.find(name, *trial.tensors(arguments))
    assert kernel is not None, reason
    wanted = trial.run(trial.eager, arguments)
    results = trial.run(kernel, trial.arguments(PROBE, torch.bfloat16, DEVICE))
    assert all(deviation(*pair) <= trial.allowed for pair in zip(results, wanted, strict=True))


@each_trial
def test_a_kernel_has_the_same_bits_each_time(name: str, trial: Trial) -> None:
    tokens, kernel = SHAPES["odd"], kernels.KERNELS[name].load(name)
    runs = [trial.run(kernel, trial.arguments(tokens, torch.bfloat16, DEVICE)) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@each_trial
def test_on_the_meta_device_a_kernel_gives_shapes(name: str, trial: Trial) -> None:
    """By which the memory of a run is planned."""
    tokens, meta = SHAPES["odd"], torch.device("meta")
    wanted = trial.run(trial.eager, trial.arguments(tokens, torch.bfloat16, DEVICE))
    results = trial.run(kernels.KERNELS[name].load(name), trial.arguments(tokens, torch.bfloat16, meta))
    assert [(r.shape, r.dtype, r.device) for r in results] == [(w.shape, w.dtype, meta) for w in wanted]


def test_a_part_of_the_rows_is_added_to_where_it_lies() -> None:
    x, branch = torch.randn(2, 9, 30, device=DEVICE), torch.randn(2, 4, 30, device=DEVICE)
    wanted = x.clone()
    wanted[:, 3:7] += branch
    found = kernels.KERNELS["add_to_rows"].load("add_to_rows")(x, slice(3, 7), branch, None)
    assert found is x and torch.allclose(x, wanted, atol=1e-6)


def test_one_modulation_serves_all_batches() -> None:
    trial = TRIALS["layer_norm"][0]
    x, (weight, bias, eps), dtype = trial.arguments(SHAPES["odd"], torch.float32, DEVICE)
    shared = (weight[:1], bias[:1], eps)
    (found,) = trial.run(kernels.KERNELS["layer_norm"].load("layer_norm"), (x, shared, dtype))
    within_half_a_step(found, references.layer_norm(x, shared, dtype)[0])


def test_the_rotated_go_to_a_part_of_a_larger_tensor() -> None:
    """As both streams of a joint attention do, without being put together afterwards."""
    trial, tokens = TRIALS["norm_rotate"][1], SHAPES["odd"]
    x, constants, rope, whole = trial.arguments(tokens, torch.bfloat16, DEVICE)
    joint = torch.zeros(2, 12, *whole.shape[2:], dtype=whole.dtype, device=DEVICE)
    (true,) = references.norm_rotate(x, constants, rope, whole)
    kernels.KERNELS["norm_rotate"].load("norm_rotate")(x, constants, rope, joint[:, 5:])
    assert not joint[:, :5].any()
    within_half_a_step(joint[:, 5:], true)
    with pytest.raises(ValueError, match="side by side"):
        kernels.KERNELS["norm_rotate"].load("norm_rotate")(x, constants, rope, joint[:, 5:].transpose(1, 2))


def test_no_thread_holds_what_another_holds_too() -> None:
    from wanqwen.kernels.launch import options_for

    blocks = [1 << k for k in range(5, 16)]
    threads = [32 * options_for(block)["num_warps"] for block in blocks]
    assert all(block // 64 <= num <= block for block, num in zip(blocks, threads, strict=True))
