"""Products in 8 bits: beside the formula in float64, beside LoRAs, and never one that does not work."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wanqwen.core.ops import product_choice
from wanqwen.core.ops.change import Change, LowRank
from wanqwen.core.ops.eight_bits import LARGEST, quantise_rows
from wanqwen.core.ops.linear import Linear, feed_forward
from wanqwen.core.ops.product_choice import Stored, choose_products, stored_in_8_bits, try_product
from wanqwen.core.ops.products import FLOAT8, FLOAT8_ROWS, INT8, InEightBits, Product, round_once
from wanqwen.core.types import FastPaths, TensorInfo

CPU, CARD = torch.device("cpu"), torch.device("cuda")
# Of a product's largest number: its own rounding (fp8 by rows gives bfloat16), and sums in float32.
TOLERANCE = {INT8: 1e-6, FLOAT8: 1e-5, FLOAT8_ROWS: 4e-3}
each_product = pytest.mark.parametrize("product", TOLERANCE, ids=lambda product: product.name)
SHAPES = ((80, 48), (48, 48))


@pytest.fixture(autouse=True)
def as_in_use() -> Iterator[None]:
    product_choice.tried.cache_clear()
    with torch.inference_mode():
        yield
    product_choice.tried.cache_clear()


def layer_in(dtype: torch.dtype, outputs: int, inputs: int, seed: int = 0) -> Linear:
    """Return a layer with a weight in 8 bits and a scale for each row."""
    generator, layer = torch.Generator().manual_seed(seed), Linear(inputs, outputs)
    weight, layer.weight_scale = quantise_rows(torch.randn(outputs, inputs, generator=generator), dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias.copy_(torch.randn(outputs, generator=generator))
    return layer


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 5, shape[-1])


def whole(layer: Linear) -> Tensor:
    return layer.weight.double() * layer.weight_scale.double()


@each_product
@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 33, 7), (2, 37, 50), (3, 64, 96)])
@pytest.mark.parametrize("outputs", [1, 9, 80])
def test_the_product_is_that_of_the_rounded_rows(product: Product, shape: tuple[int, ...], outputs: int) -> None:
    layer, x = layer_in(product.dtype, outputs, shape[-1]), rows(*shape)
    found = InEightBits(product, layer.weight, layer.weight_scale, layer.bias, torch.float32)(x)
    rounded, scale = quantise_rows(x, product.dtype)
    wanted = F.linear(rounded.double() * scale.double(), whole(layer), layer.bias.double())
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert (found.double() - wanted).abs().max() <= TOLERANCE[product] * wanted.abs().max()
    # Rows are away by half a step at most: 1/254 of the row's largest number, or 1/16 of the number itself.
    steps = scale.double().expand(x.shape) / 2
    if product.dtype != torch.int8:
        steps = torch.maximum(x.abs().double() / 16, scale.double() * 2.0**-10)
    allowed = F.linear(steps, whole(layer).abs()) + TOLERANCE[product] * wanted.abs().max()
    exact = F.linear(x.double(), whole(layer), layer.bias.double())
    assert ((found.double() - exact).abs() <= allowed).all()


@each_product
@pytest.mark.parametrize("scale", [None, torch.tensor(0.01), torch.full((80,), 0.01), torch.full((80, 1), 0.01)])
def test_scales_of_any_shape_and_none(product: Product, scale: Tensor | None) -> None:
    layer, x = layer_in(product.dtype, 80, 48), rows(1, 40, 48)
    layer.weight_scale = scale
    found, plain = layer.at(x.dtype, 40, (product,))(x), layer.at(x.dtype, 40)(x)
    assert not torch.equal(found, plain)
    assert (found - plain).norm() < 0.05 * plain.norm()


def test_few_rows_odd_sides_and_other_weights_are_multiplied_in_16_bits() -> None:
    layer, x = layer_in(torch.int8, 80, 48), rows(1, 40, 48)
    plain = layer.at(x.dtype)(x)
    assert torch.equal(layer(x), plain)
    assert torch.equal(layer.at(x.dtype, 31, (INT8,))(x), plain)
    assert torch.equal(layer.at(x.dtype, 40, (FLOAT8,))(x), plain)
    assert isinstance(layer.at(x.dtype, 40, (FLOAT8, INT8)), InEightBits)
    assert not isinstance(layer_in(torch.int8, 81, 48).at(x.dtype, 40, (INT8,)), InEightBits)
    assert not isinstance(layer_in(torch.int8, 80, 40).at(x.dtype, 40, (INT8,)), InEightBits)


@each_product
def test_a_lora_goes_beside_with_rows_that_are_not_rounded(product: Product) -> None:
    layer, x = layer_in(product.dtype, 80, 48), rows(2, 33, 48)
    without = layer.at(x.dtype, 66, (product,))(x)
    down, up = rows(2, 48), rows(80, 2)
    layer.changes = (Change(difference=LowRank(down, up), scale=0.5, strength=2.0),)
    found = layer.at(x.dtype, 66, (product,))(x)
    assert torch.allclose(found, without + x @ down.T @ up.T, rtol=1e-5, atol=1e-3)

    magnitude = torch.ones(80, 1)
    for change in (
        Change(difference=LowRank(rows(40, 48), rows(80, 40))),
        Change(difference=LowRank(down, up), magnitude=magnitude),
    ):
        layer.changes = (change,)
        assert torch.equal(layer.at(x.dtype, 66, (product,))(x), layer.at(x.dtype, 66)(x)), "its weight is another"


@each_product
def test_between_two_layers_the_gelu_is_rounded(product: Product) -> None:
    first, second = layer_in(product.dtype, 96, 48), layer_in(product.dtype, 48, 96, seed=1)
    x, asked = rows(2, 33, 48), []
    spied = replace(product, gelu=lambda x: asked.append(x) or product.gelu(x))
    found = feed_forward(first, second, x.dtype, 66, (spied,))(x)
    hidden = first.at(x.dtype, 66, (product,))(x)
    assert torch.allclose(found, second.at(x.dtype, 66, (product,))(F.gelu(hidden, approximate="tanh")), atol=1e-4)
    assert len(asked) == 1


@each_product
def test_rows_that_several_layers_take_are_rounded_once(product: Product) -> None:
    x, asked = rows(2, 33, 48), []
    spied = replace(product, rows=lambda x: asked.append(x) or product.rows(x))
    layers = [layer_in(product.dtype, 80, 48, seed=seed) for seed in range(3)]
    layers[1].changes = (Change(difference=LowRank(rows(2, 48), rows(80, 2))),)
    apart = [layer.at(x.dtype, 66, (product,))(x) for layer in layers]
    ready = [layer.at(x.dtype, 66, (spied,)) for layer in layers]
    given = round_once(x, *ready)
    assert all(torch.equal(*pair) for pair in zip([call(given) for call in ready], apart, strict=True))
    assert len(asked) == 1
    assert round_once(x, *ready, layers[0].at(x.dtype)) is x, "one of them takes it as it is"


def stored(dtype: torch.dtype, is_scaled: bool = True) -> tuple[Stored, ...]:
    return (Stored(dtype=dtype, shapes=SHAPES, is_scaled=is_scaled),)


def test_a_file_tells_what_it_has_in_8_bits() -> None:
    tensors = {
        "a.weight": TensorInfo(dtype="F8_E4M3", shape=(32, 16)),
        "a.weight_scale": TensorInfo(dtype="F32", shape=()),
        "b.weight": TensorInfo(dtype="F8_E4M3", shape=(64, 16)),
        "c.weight": TensorInfo(dtype="BF16", shape=(32, 16)),
        "d.bias": TensorInfo(dtype="F8_E4M3", shape=(32,)),
        "e.weight": TensorInfo(dtype="F8_E5M2", shape=(32, 16)),
    }
    [found] = stored_in_8_bits(tensors)
    assert found == Stored(dtype=torch.float8_e4m3fn, shapes=((64, 16), (32, 16)), is_scaled=True)
    del tensors["a.weight_scale"]
    assert not stored_in_8_bits(tensors)[0].is_scaled
    assert stored_in_8_bits({"c.weight": tensors["c.weight"]}) == ()


def test_without_being_asked_a_cpu_multiplies_in_16_bits() -> None:
    for dtype in LARGEST:
        assert choose_products(FastPaths(products="auto"), stored(dtype), False, CPU) == ((), [])
        assert choose_products(FastPaths(products="exact"), stored(dtype), False, CPU) == ((), [])


@pytest.mark.parametrize(("dtype", "product"), [(torch.int8, INT8), (torch.float8_e4m3fn, FLOAT8_ROWS)])
def test_what_is_asked_for_is_tried_taken_and_said(dtype: torch.dtype, product: Product) -> None:
    taken, [said] = choose_products(FastPaths(products="8bit"), stored(dtype), True, CPU)
    assert taken == (product,)
    assert said.startswith(f"Products in {product.name}, of weights in ") and "%" in said
    assert 0.001 < try_product(product, SHAPES, CPU).error < 0.04


def test_on_a_card_auto_is_fp8_where_file_and_card_are_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8, tried = torch.float8_e4m3fn, []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(product_choice, "_compare", lambda product, shape, device: tried.append(shape) or (0.0, 0.02))
    monkeypatch.setattr(product_choice, "_with_kernels", lambda product, device: product)
    taken, [said] = choose_products(FastPaths(products="auto"), stored(fp8), False, CARD)
    assert taken == (FLOAT8_ROWS,) and "2.0%" in said
    assert tried == list(SHAPES), "on the model's own shapes"
    for words, (mode, *given) in {
        "asks for that": ("auto", stored(fp8), True),
        "no scales": ("auto", stored(fp8, is_scaled=False), False),
        "less exact": ("auto", stored(torch.int8), False),
        "switched off": ("exact", stored(fp8), False),
    }.items():
        taken, [said] = choose_products(FastPaths(products=mode), *given, CARD)
        assert taken == () and words in said and "16-bit" in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    product_choice.tried.cache_clear()
    taken, said = choose_products(FastPaths(products="auto"), stored(fp8), False, CARD)
    assert taken == () and "need compute capability 8.9; a card has 8.6" in said[0]
    assert choose_products(FastPaths(products="8bit"), stored(torch.int8), False, CARD)[0] == (INT8,)


def _raises(*tensors: Tensor) -> Tensor:
    raise RuntimeError("not in this build\nat all")


BROKEN = {
    "raises": (_raises, "failed with RuntimeError: not in this build"),
    "NaN": (lambda rows, scale, weight, scales: torch.full((len(rows), len(weight)), torch.nan), "wrong by nan"),
    "wrong": (lambda *tensors: INT8.multiply(*tensors) * 1.02, "wrong by 0.02"),
}


@pytest.mark.parametrize(("multiply", "complaint"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_work_is_not_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, multiply, complaint: str
) -> None:
    broken = replace(INT8, multiply=multiply)
    monkeypatch.setattr(product_choice, "OLDEST_CARDS", {broken: (8, 0)})
    with caplog.at_level(logging.WARNING):
        taken, [said] = choose_products(FastPaths(products="8bit"), stored(torch.int8), False, CPU)
    assert taken == () and complaint in said and complaint in caplog.text


def test_where_scales_by_row_are_not_built_one_for_all_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(FLOAT8_ROWS, multiply=_raises)
    monkeypatch.setattr(product_choice, "OLDEST_CARDS", {missing: (8, 9), FLOAT8: (8, 9)})
    taken, said = choose_products(FastPaths(products="8bit"), stored(torch.float8_e4m3fn), False, CPU)
    assert taken == (FLOAT8,)
    assert said[0].startswith("No products in fp8 by rows: failed") and said[1].startswith("Products in fp8, of")
    monkeypatch.setattr(product_choice, "_unwanted", lambda *arguments: None)  # as on a card
    taken, said = choose_products(FastPaths(products="auto"), stored(torch.float8_e4m3fn), False, CPU)
    assert taken == () and "16-bit" in said[-1] and "save little" in said[-1]


def test_layers_of_odd_sides_alone_are_left() -> None:
    odd = (Stored(dtype=torch.int8, shapes=((9, 7),), is_scaled=True),)
    assert choose_products(FastPaths(products="8bit"), odd, False, CPU) == (
        (),
        ["No products in int8: no layer has sides that are multiples of 16."],
    )


def test_exact_kernels_mean_exact_products_too_unless_others_are_asked_for() -> None:
    assert FastPaths(kernels="exact").products == "exact"
    assert FastPaths(kernels="exact", products="8bit").products == "8bit"


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="products is 'fast': choose auto, exact, 8bit"):
        FastPaths(products="fast")


def test_a_full_card_is_no_verdict() -> None:
    troubles = [torch.OutOfMemoryError("full")]

    def crowded(*tensors: Tensor) -> Tensor:
        if troubles:
            raise troubles.pop()
        return INT8.multiply(*tensors)

    crowd = replace(INT8, multiply=crowded)
    assert "no memory" in try_product(crowd, SHAPES, CPU).refusal
    assert try_product(crowd, SHAPES, CPU).refusal is None
