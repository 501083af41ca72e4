"""What kernels are tried on: arguments as models give them, the eager twin, and how far the two may differ."""
# B batch, L tokens, E width, N heads, D head width

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...kernels import BLOCK_FORMATS, BYTE_FORMATS
from ..dfloat11 import PLANES
from ..storage import PACKINGS
from . import dfloat11, eight_bits, gguf_blocks, norm, rope, rows
from .attention import attention, attention_int8
from .dfloat11_encoder import encode

FLOAT32_STEP = 4e-6
LOUD = 60.0  # how much larger than the others some channels of trained models are
EPS = 1e-6
RARE = 120  # weights of a trial of DFloat11 that are of unusual sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The shape of a trial: tokens in a batch, and the heads that their width divides into."""

    rows: int
    heads: int
    head_width: int
    batch: int = 1

    @property
    def width(self) -> int:
        return self.heads * self.head_width


Arguments = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One operation: its eager spelling, and arguments for tokens, a dtype of activations and a device.

    The arguments are new each time, and the same. `results` are the tensors that a call with these arguments leaves,
    `allowed` how far a kernel's may be from the eager ones, see `deviation`; `fills` is the place of an argument that
    is written and never read. `replaces` is what the kernel takes the place of, where that is not its eager twin.
    """

    eager: Callable[..., Any]
    arguments: Callable[[Tokens, torch.dtype, torch.device], Arguments]
    results: Callable[[Any, Arguments], tuple[Tensor, ...]] = lambda returned, arguments: (returned,)
    allowed: float = 1.0
    fills: int | None = None
    replaces: Callable[..., Any] | None = None

    @property
    def plain(self) -> Callable[..., Any]:
        """What a run calls where there is no kernel."""
        return self.replaces or self.eager

    def run(self, operation: Callable[..., Any], arguments: Arguments) -> tuple[Tensor, ...]:
        """Return what an operation, eager or not, makes of arguments, which it may change."""
        with torch.inference_mode():
            return self.results(operation(*arguments), arguments)

    def tensors(self, arguments: Arguments) -> list[Tensor]:
        """Return the tensors among arguments, which decide whether a kernel can do it."""
        parts = [part for given in arguments for part in (given if isinstance(given, tuple) else (given,))]
        return [part for part in parts if isinstance(part, Tensor)]

    def moved_bytes(self, arguments: Arguments, results: tuple[Tensor, ...]) -> int:
        """Return the bytes that must be read and written at the least."""
        filled = None if self.fills is None else arguments[self.fills].data_ptr()
        read = {part.data_ptr(): part.nbytes for part in self.tensors(arguments) if part.data_ptr() != filled}
        return sum(read.values()) + sum(result.nbytes for result in results)


def deviation(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, in steps of the result's dtype at the size of the number, or of its row's mean.

    A step of float32 is some parts in a million, by which sums in another order may differ. NaN if there is any, and
    infinite if the two have other shapes.
    """
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    step = max(torch.finfo(wanted.dtype).eps, FLOAT32_STEP) if wanted.is_floating_point() else 1.0
    found, wanted = found.double(), wanted.double()
    scale = wanted.abs() + wanted.square().mean(-1, keepdim=True).sqrt() if step < 1 else 1.0
    return float(((found - wanted).abs() / (step * scale + 1e-30)).max())


def _random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return numbers as activations of trained models are: a few channels far louder than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    loudness = torch.rand(shape[-1], generator=generator).pow(16) * (LOUD - 1) + 1
    return (x * loudness + 0.1 * loudness).to(device, dtype)


def _stream(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _random(tokens.batch, tokens.rows, tokens.width, device=device, dtype=dtype)


def _modulation(tokens: Tokens, device: torch.device) -> norm.LayerConstants:
    """Return weight and bias as views of six vectors, which is how blocks have them."""
    vectors = _random(tokens.batch, 6, tokens.width, device=device, seed=1)
    shift, scale = vectors.split(1, dim=1)[:2]
    return norm.modulated_by(shift, scale, EPS)


def _layer_norm(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Arguments:
    return _stream(tokens, torch.float32, device), _modulation(tokens, device), dtype


def _add_to_rows(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Arguments:
    gate = _random(tokens.batch, 6, tokens.width, device=device, seed=2)[:, 2:3]
    branch = _random(tokens.batch, tokens.rows, tokens.width, device=device, dtype=dtype, seed=3)
    return _stream(tokens, torch.float32, device), slice(0, tokens.rows), branch, gate


def _add_norm(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Arguments:
    return *_add_to_rows(tokens, dtype, device), _modulation(tokens, device), dtype


def _rms_norm(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Arguments:
    weight = _random(tokens.width, device=device, seed=4)
    return _stream(tokens, dtype, device), (weight, EPS), dtype


def _norm_rotate(tokens: Tokens, dtype: torch.dtype, device: torch.device, per_head: bool = False) -> Arguments:
    """The result is written over what it is made of."""
    x = _stream(tokens, dtype, device)
    angles = torch.rand(2, tokens.rows, tokens.head_width // 2, generator=torch.Generator().manual_seed(5)) * 6.3
    weight = _random(tokens.head_width if per_head else tokens.width, device=device, seed=4)
    out = x.view(tokens.batch, tokens.rows, tokens.heads, tokens.head_width)
    return x, (weight, EPS), (angles[0].cos().to(device), angles[0].sin().to(device)), out


def _dfloat11(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Arguments:
    """Weights as models have them, and a few of every size that there is: their codes take all four tables."""
    generator = torch.Generator().manual_seed(6)
    weights = torch.randn(tokens.batch * tokens.rows * tokens.width, generator=generator) * 0.02
    rare = torch.linspace(-126, 112, min(len(weights), RARE)).exp2()
    weights[: len(rare)] = rare
    planes = encode([weights.bfloat16()], threads=1)
    out = torch.zeros(len(weights), dtype=torch.bfloat16, device=device)
    return *(planes[name].to(device) for name in PLANES), out


def _rows(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Arguments:
    return (_stream(tokens, dtype, device),)


def _gelu(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Arguments:
    return (_random(tokens.batch, tokens.rows, 3 * tokens.width, device=device, dtype=dtype),)


def _blocks(tokens: Tokens, dtype: torch.dtype, device: torch.device, stored: str) -> Arguments:
    """Random bytes, but the two that begin or end a block as finite halves: scales of real blocks are small."""
    packing = PACKINGS[stored]
    num = tokens.rows * max(1, tokens.width // packing.numbers)
    generator = torch.Generator().manual_seed(6)
    blocks = torch.randint(0, 256, (num, packing.num_bytes), dtype=torch.uint8, generator=generator)
    scales = (torch.randn(num, 2, generator=generator) * 0.01).half().view(torch.uint8)
    for at, scale in ((0, scales[:, :2]), (2, scales[:, 2:]), (packing.num_bytes - 2, scales[:, :2])):
        if stored != "Q8_0" or at == 0:
            blocks[:, at : at + 2] = scale
    return blocks.view(tokens.rows, -1).to(device), stored, dtype


def _codes(
    tokens: Tokens, dtype: torch.dtype, device: torch.device, stored: torch.dtype, scales: tuple[int, ...] | None
) -> Arguments:
    """All codes of a format that are finite numbers, and scales of this shape, in which -1 stands for the rows."""
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 256, (tokens.rows, tokens.width), dtype=torch.uint8, generator=generator)
    codes[~codes.view(stored).float().isfinite()] = 0
    weight = codes.view(stored).to(device)
    if scales is None:
        return weight, None, dtype
    shape = [tokens.rows if side < 0 else side for side in scales]
    return weight, (torch.rand(shape, generator=generator) * 0.01).to(device), dtype


def _frames(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Arguments:
    """Frames with the VAE's channels, channels last in memory, and the end of a convolution's window to write to."""
    shape = tokens.batch, 3 * tokens.head_width, 2, tokens.rows, 3
    frames = _random(*shape[:1], *shape[2:], shape[1], device=device, dtype=dtype).movedim(-1, 1)
    window = torch.zeros((shape[0], 4, *shape[3:], shape[1]), device=device, dtype=dtype).movedim(-1, 1)
    weight = _random(shape[1], device=device, dtype=dtype, seed=4).view(-1, 1, 1, 1)
    return frames, weight, window[:, :, 2:]


def attention_arguments(
    queries: int, keys: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, is_biased: bool
) -> Arguments:
    """Return q [1, L, N, D], k and v [1, S, N, D] and a bias of keys or None: keys share a large part, as real ones do.

    With a bias the last third of the keys is hidden, as padding is, and the first counts more.
    """
    generator = torch.Generator().manual_seed(7)
    q, k = (torch.randn(1, length, heads, width, generator=generator) for length in (queries, keys))
    k += 3 * torch.randn(1, 1, heads, width, generator=generator)
    v = _random(1, keys, heads, width, device=device, dtype=dtype, seed=8)
    bias = torch.zeros(1, keys)
    bias[:, :1], bias[:, keys - keys // 3 :] = 2.0, float("-inf")
    return q.to(device, dtype), k.to(device, dtype), v, bias.to(device, dtype) if is_biased else None


def _attention(tokens: Tokens, dtype: torch.dtype, device: torch.device, is_biased: bool) -> Arguments:
    """With more keys than queries, of a number that no tile divides."""
    shape = tokens.rows, 2 * tokens.rows + 5, tokens.heads, tokens.head_width
    return attention_arguments(*shape, dtype, device, is_biased)


def _rotated(_: None, arguments: Arguments) -> tuple[Tensor, ...]:
    return (arguments[-1],)


# By the names of `kernels.KERNELS`; a kernel has to pass all of its own.
TRIALS: dict[str, tuple[Trial, ...]] = {
    "layer_norm": (Trial(eager=norm.layer_norm, arguments=_layer_norm),),
    "add_norm": (Trial(eager=rows.add_norm, arguments=_add_norm, results=lambda returned, _: returned),),
    "add_to_rows": (Trial(eager=rows.add_to_rows, arguments=_add_to_rows),),
    "rms_norm": (Trial(eager=norm.rms_norm, arguments=_rms_norm),),
    "dfloat11_decode": (Trial(eager=dfloat11.decode, arguments=_dfloat11, allowed=0.0, fills=5),),
    "rows_int8": (Trial(eager=eight_bits.rows_int8, arguments=_rows, results=lambda returned, _: returned),),
    "rows_float8": (Trial(eager=eight_bits.rows_float8, arguments=_rows, results=lambda returned, _: returned),),
    "gelu_int8": (Trial(eager=eight_bits.gelu_int8, arguments=_gelu, results=lambda returned, _: returned),),
    "gelu_float8": (Trial(eager=eight_bits.gelu_float8, arguments=_gelu, results=lambda returned, _: returned),),
    "unpack_blocks": tuple(
        Trial(eager=gguf_blocks.unpack_blocks, arguments=partial(_blocks, stored=stored), allowed=0.0)
        for stored in BLOCK_FORMATS
    ),
    "dequantise_rows": tuple(
        Trial(eager=eight_bits.dequantise_rows, arguments=partial(_codes, stored=stored, scales=scales), allowed=0.0)
        for stored, scales in product(BYTE_FORMATS, ((-1, 1), (), None))
    ),
    # What multiplies v is rounded to 16 bits before all keys are known, and so in other places.
    "attention_int8": tuple(
        Trial(
            eager=attention_int8,
            arguments=partial(_attention, is_biased=is_biased),
            allowed=4.0,
            replaces=attention,
        )
        for is_biased in (False, True)
    ),
    # In 16 bits plain PyTorch rounds four times on the way, the numbers of a position to steps of its loudest.
    "norm_silu_into": (
        Trial(
            eager=norm.norm_silu_into,
            arguments=_frames,
            results=lambda returned, _: (returned.movedim(1, -1),),
            allowed=4.0,
            fills=2,
        ),
    ),
    "norm_rotate": (
        Trial(eager=rope.norm_rotate, arguments=_norm_rotate, results=_rotated),
        Trial(eager=rope.norm_rotate, arguments=partial(_norm_rotate, per_head=True), results=_rotated),
    ),
}
