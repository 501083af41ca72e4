"""Which matrix products a run takes in 8 bits: decided before it by the file, the card and a trial, and said."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from .. import host
from ..storage import WEIGHT_SCALES, companion
from ..types import AUTO_PRODUCTS, EXACT_PRODUCTS, FastPaths, TensorInfo
from .eight_bits import quantise_rows
from .formats import DTYPES
from .products import FLOAT8, FLOAT8_ROWS, INT8, Product
from .proof import NO_MEMORY, PROBE, spelling

log = logging.getLogger(__name__)

Shape = tuple[int, ...]

# In the order in which they are tried, with the oldest card (compute capability) that has units for them. Scales by row
# are missing in PyTorch's builds for Windows, and in some for Ada, which only a trial tells.
OLDEST_CARDS = {FLOAT8_ROWS: (8, 9), FLOAT8: (8, 9), INT8: (8, 0)}
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}  # users' names of what weights are stored in
SHAPES_TRIED = 4  # of a model's layers, the largest
OUTPUTS_COMPARED = 128
ALLOWED = 0.01  # of a product's size: one rounding to bfloat16, and sums in another order


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What a file has in one 8-bit dtype: the shapes of its weights, the largest first, and whether it has scales."""

    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    is_scaled: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What came of trying a product: why it can't be used, or None, and what rounding the rows costs of it."""

    refusal: str | None
    error: float = 0.0


def stored_in_8_bits(tensors: Mapping[str, TensorInfo]) -> tuple[Stored, ...]:
    """Return what of a file, its tensors by official names, might be multiplied in 8 bits."""
    is_scaled, found = any(name.endswith(WEIGHT_SCALES) for name in tensors), []
    for dtype in NAMES:
        shapes = {
            info.shape
            for name, info in tensors.items()
            if DTYPES.get(info.dtype) == dtype and len(info.shape) == 2 and companion(name) is None
        }
        if shapes:
            largest_first = tuple(sorted(shapes, key=lambda shape: -shape[0] * shape[1]))
            found.append(Stored(dtype=dtype, shapes=largest_first, is_scaled=is_scaled))
    return tuple(found)


def choose_products(
    fast: FastPaths, found: tuple[Stored, ...], is_whole: bool, device: torch.device
) -> tuple[tuple[Product, ...], list[str]]:
    """Return the products that a run takes in 8 bits, at most one for each dtype, and what there is to say of them.

    With `auto` those of scaled fp8 on CUDA, but not where the file asks for whole products (`is_whole`): there rounding
    the rows costs about what rounding the weights has cost. Rows in int8 have equal steps, so that one loud channel
    costs all others their precision: those, like products in 8 bits on a CPU, are for who asks for them.
    """
    taken, said = [], []
    for stored in found:
        name = NAMES[stored.dtype]
        if reason := _unwanted(fast.products, stored, is_whole, device):
            if device.type == "cuda":
                said.append(f"Weights in {name} become 16-bit before each product: {reason}.")
            continue
        for product in (product for product in OLDEST_CARDS if product.dtype == stored.dtype):
            if product is FLOAT8 and fast.products == AUTO_PRODUCTS:
                said.append(f"Weights in {name} become 16-bit before each product: products in fp8 whose scales come "
                            "afterwards save little, and are taken where Fast Paths asks for 8 bits.")  # fmt: skip
                break
            finding = try_product(product, stored.shapes, device)
            if finding.refusal is None:
                taken.append(_with_kernels(product, device) if fast.uses_kernels else product)
                said.append(f"Products in {product.name}, of weights in {name}: rounding the rows costs "
                            f"{finding.error:.1%} of a product of random numbers.")  # fmt: skip
                break
            said.append(f"No products in {product.name}: {finding.refusal}.")
    return tuple(taken), said


def _unwanted(mode: str, stored: Stored, is_whole: bool, device: torch.device) -> str | None:
    if mode == EXACT_PRODUCTS:
        return "products in 8 bits are switched off"
    if mode != AUTO_PRODUCTS:
        return None
    if device.type != "cuda":
        return "this is no CUDA card"
    if stored.dtype == torch.int8:
        return "products in int8 are faster and less exact, and taken where Fast Paths asks for 8 bits"
    if is_whole:
        return "the file asks for that"
    return None if stored.is_scaled else "the file has no scales, so it was not made for products in fp8"


def try_product(product: Product, shapes: tuple[Shape, ...], device: torch.device) -> Finding:
    """Try a product on weights of a model's shapes, beside float64: once in the life of the process.

    Memory that is missing says nothing of the product: it is tried again when it is asked for again.
    """
    try:
        return tried(product, shapes, device)
    except RuntimeError as trouble:
        if not host.is_out_of_memory(trouble):
            raise
    log.warning("Products in %s: %s. They are not used for now.", product.name, NO_MEMORY)
    return Finding(refusal=NO_MEMORY)


@cache
def tried(product: Product, shapes: tuple[Shape, ...], device: torch.device) -> Finding:
    """Return what `try_product` does, always the same. Raises what PyTorch does where memory runs out."""
    if reason := _unable(product, device):
        return Finding(refusal=reason)
    fitting = [shape for shape in shapes if not any(side % product.sides for side in shape)][:SHAPES_TRIED]
    if not fitting:
        return Finding(refusal=f"no layer has sides that are multiples of {product.sides}")
    worst = 0.0
    for shape in fitting:
        try:
            deviation, error = _compare(product, shape, device)
        except (RuntimeError, ValueError, TypeError) as trouble:
            if isinstance(trouble, RuntimeError) and host.is_out_of_memory(trouble):
                raise
            return _broken(product, f"failed with {type(trouble).__name__}: {_first_line(trouble)}")
        if not deviation <= ALLOWED:  # NaN is not
            return _broken(product, f"{shape} is wrong by {deviation:.3g} of its size, where {ALLOWED} is allowed")
        worst = max(worst, error)
    return Finding(refusal=None, error=worst)


def _unable(product: Product, device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return "they are built for NVIDIA cards and CPUs"
    oldest, found = OLDEST_CARDS[product], torch.cuda.get_device_capability(device)
    if found < oldest:
        card, wanted = torch.cuda.get_device_name(device), ".".join(map(str, oldest))
        return f"they need compute capability {wanted}; {card} has {'.'.join(map(str, found))}"
    return None


def _compare(product: Product, shape: Shape, device: torch.device) -> tuple[float, float]:
    """Return how far a product is from that of the same rounded rows, and from that of the rows before, in float64."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = shape
    rows = torch.randn(PROBE.rows, inputs, generator=generator).to(device)
    # Bytes of both signs that in float8 are no larger than 20, and not NaN.
    sizes, signs = (torch.randint(0, most, shape, generator=generator, dtype=torch.uint8) for most in (91, 2))
    weight = (sizes + 128 * signs).view(product.dtype).to(device)
    scale_1O = (torch.rand(1, outputs, generator=generator) + 0.5).to(device)
    rounded, scale = quantise_rows(rows, product.dtype)
    with torch.inference_mode():
        found = product.multiply(rounded, scale, weight, scale_1O)
    some = torch.linspace(0, outputs - 1, min(outputs, OUTPUTS_COMPARED)).long().to(device)
    whole = weight[some].double().t() * scale_1O[:, some].double()
    found, wanted = found[:, some].double(), (rounded.double() * scale.double()) @ whole
    return _distance(found, wanted), _distance(wanted, rows.double() @ whole)


def _distance(x: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((x - wanted).norm() / wanted.norm())


def _with_kernels(product: Product, device: torch.device) -> Product:
    """Return the product with the kernels that round rows and those of a GELU, on CUDA where they work."""
    rows, gelu = (spelling(operation, torch.bfloat16, device) for operation in (product.rows, product.gelu))
    return replace(product, rows=rows, gelu=gelu)


def _broken(product: Product, reason: str) -> Finding:
    log.warning("Products in %s: %s. They are not used.", product.name, reason)
    return Finding(refusal=reason)


def _first_line(trouble: Exception) -> str:
    return (str(trouble).strip() or "no message").splitlines()[0]
