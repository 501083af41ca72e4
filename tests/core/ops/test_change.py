"""Changes of a weight: both ways give one result, the cheaper one is taken, and the stored weight is not touched."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.ops import change as changes_
from wanqwen.core.ops.change import Change, Dense, Difference, Hadamard, Kronecker, LowRank, changed, is_cheaper_beside
from wanqwen.core.ops.linear import Linear

ROWS, WIDTH, RANK = 24, 18, 2


@pytest.fixture
def make() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.fixture
def layer(make: Callable[..., Tensor]) -> Linear:
    layer = Linear(WIDTH, ROWS).requires_grad_(False)
    layer.weight.copy_(make(ROWS, WIDTH))
    layer.bias.copy_(make(ROWS))
    return layer


def pair(make: Callable[..., Tensor], scale: float = 1.0, strength: float = 1.0) -> Change:
    return Change(difference=LowRank(make(RANK, WIDTH), make(ROWS, RANK)), scale=scale, strength=strength)


def test_both_ways_give_what_the_changed_weight_does(layer: Linear, make: Callable[..., Tensor]) -> None:
    layer.changes = (pair(make, 0.5, 2.0), pair(make, -3.0, 0.25))
    first, second = (c.difference for c in layer.changes)
    weight = layer.weight + 1.0 * (first.up @ first.down) - 0.75 * (second.up @ second.down)
    x = make(2, 5, WIDTH)
    expected, stored = x @ weight.t() + layer.bias, layer.weight.clone()
    for num_rows in (1, 1000):
        assert torch.allclose(layer.at(torch.float32, num_rows)(x), expected, atol=1e-4)
    assert torch.allclose(layer(x), expected, atol=1e-4)
    assert torch.equal(layer.weight, stored)
    layer.changes = ()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, stored, layer.bias))


def test_the_way_with_fewer_multiplications_is_taken(make: Callable[..., Tensor]) -> None:
    """Break-even where rows * (in + out) = in * out."""
    changes, even = (pair(make),), ROWS * WIDTH / (ROWS + WIDTH)
    for num_rows in (1, int(even), int(even) + 1, 1000):
        assert is_cheaper_beside(changes, (ROWS, WIDTH), num_rows) == (num_rows <= even)
    assert [rows for rows in (2559, 2560, 2561) if is_cheaper_beside(changes, (5120, 5120), rows)] == [2559, 2560]
    others = (
        Change(difference=Dense(make(ROWS, WIDTH))),
        Change(difference=changes[0].difference, magnitude=make(ROWS, 1)),
    )
    assert not any(is_cheaper_beside((*changes, other), (ROWS, WIDTH), 1) for other in others)


def test_what_is_folded_changes_a_weight_alike_and_has_no_numbers_of_its_own(make: Callable[..., Tensor]) -> None:
    weight, one, other = make(ROWS, WIDTH), pair(make).difference, pair(make).difference
    inner = LowRank(make(RANK, 6), make(6, RANK))
    differences = one, Hadamard(one, other), Kronecker(Dense(make(4, 3)), inner), Dense(make(ROWS, WIDTH))
    for change in (Change(difference=difference, scale=0.5, strength=-0.7) for difference in differences):
        assert (change.folded.scale, change.folded.strength) == (1, 1)
        wanted, found = (changed(weight, [c], torch.empty_like(weight)) for c in (change, change.folded))
        assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found, weight, atol=0.1)
    dora = Change(difference=one, scale=0.5, strength=0.7, magnitude=make(ROWS, 1).abs())
    assert (dora.folded.scale, dora.folded.strength) == (1, 0.7)
    wanted, found = (changed(weight, [c], torch.empty_like(weight)) for c in (dora, dora.folded))
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 5 * WIDTH, 1 << 22])
@pytest.mark.parametrize("kind", ["low rank", "hadamard", "kronecker", "dense", "magnitude of rows", "of inputs"])
def test_parts_of_the_rows_make_the_whole(
    make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, at_once: int, kind: str
) -> None:
    weight, one, other = make(ROWS, WIDTH), pair(make).difference, pair(make).difference
    outer, inner = make(4, 3), LowRank(make(RANK, 6), make(6, RANK))
    change, expected = {
        "low rank": (Change(difference=one, scale=0.3), weight + 0.3 * (one.up @ one.down)),
        "hadamard": (
            Change(difference=Hadamard(one, other), strength=2),
            weight + 2 * (one.up @ one.down) * (other.up @ other.down),
        ),
        "kronecker": (
            Change(difference=Kronecker(Dense(outer), inner)),
            weight + torch.kron(outer, inner.up @ inner.down),
        ),
        "dense": (Change(difference=Dense(outer.repeat(6, 6)), strength=-1), weight - outer.repeat(6, 6)),
        "magnitude of rows": _with_magnitude(weight, one, make(ROWS, 1).abs(), dim=1),
        "of inputs": _with_magnitude(weight, one, make(1, WIDTH).abs(), dim=0),
    }[kind]
    monkeypatch.setattr(changes_, "ELEMENTS_AT_ONCE", at_once)
    kept = weight.clone()
    assert torch.allclose(changed(weight, (change,), torch.empty_like(weight)), expected, atol=1e-5)
    assert torch.equal(weight, kept)
    in_place = changed(weight, (change,), weight)
    assert in_place is weight and torch.allclose(weight, expected, atol=1e-5)


def _with_magnitude(weight: Tensor, pair: LowRank, magnitude: Tensor, dim: int) -> tuple[Change, Tensor]:
    whole = weight + 0.4 * (pair.up @ pair.down)
    whole = magnitude * whole / whole.norm(dim=dim, keepdim=True)
    return Change(difference=pair, scale=0.4, strength=0.5, magnitude=magnitude), weight + 0.5 * (whole - weight)


def test_what_a_changed_weight_takes_is_small_beside_it() -> None:
    """In 16 bits: the changed weight itself; what is no pair also takes parts of ELEMENTS_AT_ONCE in float32."""
    rows, width = 8192, 4096
    with torch.device("meta"):
        weight = torch.empty(rows, width, dtype=torch.bfloat16)
        pair = LowRank(torch.empty(16, width, dtype=weight.dtype), torch.empty(rows, 16, dtype=weight.dtype))

    def taken(difference: Difference) -> int:
        return peak_bytes(lambda: changed(weight, (Change(difference=difference),), torch.empty_like(weight)))

    assert taken(pair) == weight.nbytes
    assert weight.nbytes < taken(Hadamard(pair, pair)) <= weight.nbytes + 4 * 4 * changes_.ELEMENTS_AT_ONCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3])
def test_a_16_bit_weight_is_rounded_once(make: Callable[..., Tensor], dtype: torch.dtype, count: int) -> None:
    weight = make(96, 80).to(dtype)
    pairs = [LowRank(make(64, 80).to(dtype), make(96, 64).to(dtype)) for _ in range(count)]
    changes = [Change(difference=pair, strength=2.0**-k / 32) for k, pair in enumerate(pairs)]
    exact = weight.double() + sum(c.factor * (c.difference.up.double() @ c.difference.down.double()) for c in changes)
    found = changed(weight, changes, torch.empty_like(weight)).double()
    half_a_step = torch.finfo(dtype).eps / 2
    assert ((found - exact).abs() <= 1.01 * half_a_step * exact.abs().clamp_min(2.0**-6)).all()
