"""DFloat11: what is encoded comes back bit for bit, by our decoder, by one from the format's description, by Triton."""

import os
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from wanqwen import kernels
from wanqwen.core.dfloat11 import PLANES, check_sizes
from wanqwen.core.ops import huffman
from wanqwen.core.ops.dfloat11 import decode
from wanqwen.core.ops.dfloat11_encoder import MOST_OF_SECTION, encode, refusal
from wanqwen.tests import dfloat11_reference

LEAST_CHUNK = 1 << 17  # weights that one thread packs at a time


def bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.int16)


def decoded(planes: Mapping[str, Tensor], run=decode) -> Tensor:
    out = torch.full((len(planes["sign_mantissa"]),), torch.nan, dtype=torch.bfloat16)
    return run(*(planes[name] for name in PLANES), out)


def random_group(seed: int) -> list[Tensor]:
    """Return the weights of a group, of a kind that the seed chooses; all kinds come up."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def of(kind: int, count: int) -> Tensor:
        normal = torch.randn(count, generator=generator)
        sizes = torch.rand(count, generator=generator, dtype=torch.float64)
        exponents = torch.randint(0, 240, (count,), generator=generator)
        geometric = torch.rand(count, generator=generator).log2().neg().floor().clamp(max=30)
        return [
            normal * 0.02,
            torch.full((count,), float(normal[0])),  # constant
            torch.zeros(count),
            torch.where(normal > draw(-2, 3), 0.5, -3e-5),  # two values
            normal * 1e-39,  # denormal in float32 and bf16
            torch.exp((sizes * 2 - 1) * 69).float() * normal.sign(),  # 1e-30 to 1e30
            (sizes * 226 - 126).exp2().float(),
            (exponents.int() << 23).view(torch.float32),  # every exponent that can be
            (2.0**-geometric) * normal.sign(),  # codes as long as can be
            torch.where(sizes < 1e-3, 2.0**100, normal * 1e-3).float(),  # nearly all alike, and a few far away
        ][kind]

    kind = seed % 10
    count = 1 if seed % 41 == 0 else draw(1, 3000)
    parts = of(kind, count).bfloat16().split(draw(1, count + 1))
    return [part.view(1, -1) for part in parts]


def test_five_hundred_groups_come_back_bit_for_bit() -> None:
    kinds = set()
    for seed in range(500):
        weights = random_group(seed)
        planes = encode(weights, threads=1)
        check_sizes({name: plane.shape for name, plane in planes.items()}, "here")
        assert torch.equal(bits(decoded(planes)), torch.cat([bits(weight) for weight in weights])), seed
        kinds.add(len(planes["luts"]))
    assert kinds >= {2, 3, 4, 5, 6}, "groups of one table to groups of many"


@pytest.mark.parametrize("seed", range(40))
def test_a_decoder_made_of_the_description_alone_finds_the_same(seed: int) -> None:
    weights = random_group(seed)
    planes = encode(weights, threads=1)
    wanted = torch.cat([bits(weight) for weight in weights])
    assert torch.equal(bits(dfloat11_reference.decode(planes)), wanted)
    for rubbish in (0x00, 0xFF, 0x5A):
        assert torch.equal(bits(dfloat11_reference.decode_as_official(planes, rubbish)), wanted)


def test_groups_of_many_chunks_and_sections_come_back() -> None:
    """Ten million weights: packed in many pieces, whose ends fall anywhere in a window."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(10_000_001, generator=generator).mul_(0.03).bfloat16()]
    one, two = (encode(weights, threads=n) for n in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in PLANES)
    assert torch.equal(bits(decoded(one)), bits(weights[0]))
    assert len(weights[0]) > 70 * LEAST_CHUNK and sum(plane.nbytes for plane in one.values()) < 0.68 * weights[0].nbytes


@pytest.mark.parametrize("count", [LEAST_CHUNK - 1, LEAST_CHUNK, LEAST_CHUNK + 1, 2 * LEAST_CHUNK + 1])
def test_chunks_meet_without_a_seam(count: int) -> None:
    weights = [torch.randn(count, generator=torch.Generator().manual_seed(count)).bfloat16()]
    planes = {name: plane.numpy() for name, plane in encode(weights, threads=2).items()}
    found = dfloat11_reference.codes(planes)
    dfloat11_reference.check_places(planes, [at for at, _, _ in found], found[-1][0] + found[-1][2])
    assert torch.equal(bits(decoded(encode(weights))), bits(weights[0]))


def test_groups_that_compress_too_well_for_the_official_decoder_get_longer_codes() -> None:
    for weight in (torch.zeros(200_000), torch.where(torch.arange(200_000) % 1000 == 0, 1.0, 0.0)):
        planes = encode([weight.bfloat16()])
        positions = torch.from_numpy(planes["output_positions"].numpy().view(np.int32))
        assert int(positions.diff().max()) <= MOST_OF_SECTION
        assert torch.equal(bits(decoded(planes)), bits(weight.bfloat16()))


@pytest.mark.parametrize(
    ("value", "said"),
    [(torch.inf, "infinite"), (-torch.inf, "infinite"), (torch.nan, "NaN"), (2.0**113, r"2 \*\* 113 or more")],
)
def test_what_the_format_can_not_hold_is_refused(value: float, said: str) -> None:
    weight = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert refusal(weight) is None
    weight[1, 2] = value
    with pytest.raises(ValueError, match=rf"a weight \[3, 5\] can't be compressed as DFloat11: .*{said}"):
        encode([torch.ones(2, dtype=torch.bfloat16), weight])
    assert "fp16" not in refusal(weight) and "float16" in refusal(weight.half())
    assert refusal(weight[:0]) == "it is empty"


def test_the_largest_number_that_fits_does() -> None:
    weight = torch.tensor([2.0**113 * (1 - 2**-8), -(2.0**-133), 0.0, -0.0]).bfloat16()
    assert torch.equal(bits(decoded(encode([weight]))), bits(weight))


def test_streams_that_end_too_early_are_told() -> None:
    weight = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    planes = encode([weight])
    assert len(planes["encoded_exponent"]) > 4096
    short = {"gaps": planes["gaps"][:320], "output_positions": planes["output_positions"][[*range(4), *range(-4, 0)]]}
    with pytest.raises(ValueError, match="has codes for fewer: download it again"):
        decoded(planes | short | {"encoded_exponent": planes["encoded_exponent"][:4096]})
    with pytest.raises(ValueError, match="says that it ends at 0"):
        decoded(planes | {"output_positions": torch.zeros_like(planes["output_positions"])})


def test_damaged_planes_end_in_an_error_or_in_wrong_weights_and_never_hang() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5_000, generator=generator).bfloat16()
    for _ in range(40):
        planes = {name: plane.clone() for name, plane in encode([weight], threads=1).items()}
        for name in ("encoded_exponent", "luts", "gaps"):
            plane = planes[name].view(-1)
            where = torch.randint(0, len(plane), (20,), generator=generator)
            plane[where] = torch.randint(0, 256, (20,), generator=generator).to(torch.uint8)
        try:
            assert len(decoded(planes)) == len(weight)
        except ValueError as error:
            assert "download it again" in str(error)


def test_sizes_that_do_not_belong_together_are_told() -> None:
    shapes = {name: tuple(plane.shape) for name, plane in encode([torch.ones(9).bfloat16()]).items()}
    for name, other in (("gaps", (321,)), ("output_positions", (12,)), ("luts", (1, 256)), ("sign_mantissa", (0,))):
        with pytest.raises(ValueError, match=rf"here: .*don't belong together .*{name} \[{other[0]}"):
            check_sizes(shapes | {name: other}, "here")
    del shapes["gaps"]
    with pytest.raises(ValueError, match="without gaps"):
        check_sizes(shapes, "here")


def test_codes_that_need_too_many_tables_are_made_flatter() -> None:
    """Fibonacci numbers make the longest codes that there are; many symbols of each length need many tables."""
    counts, a, b = {}, 1, 1
    for symbol in range(60):
        counts[symbol] = a
        a, b = b, a + b
    code, tables = huffman.make_code(counts)
    assert max(length for length, _ in code.values()) <= 32 and len(tables) <= 18
    many = {symbol: 1 + (symbol % 8) ** 9 for symbol in range(240)}
    many |= {symbol: 10 ** (3 + symbol // 16) for symbol in range(0, 240, 2)}
    code, tables = huffman.make_code(many)
    assert len(tables) <= 18
    weight = sum(2.0**-length for length, _ in code.values())
    assert weight <= 1 and {s for s in code if s != huffman.END} == set(many)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel runs on a card here, if at all")
@pytest.mark.parametrize("seed", [0, 1, 6, 8])
def test_the_kernel_gives_the_same_bits(seed: int) -> None:
    pytest.importorskip("triton")
    weights = random_group(seed)
    planes = encode(weights, threads=1)
    out = torch.empty(len(planes["sign_mantissa"]), dtype=torch.bfloat16)
    kernel, reason = kernels.find("dfloat11_decode", *planes.values(), out)
    assert kernel is not None, reason
    assert torch.equal(bits(decoded(planes, kernel)), torch.cat([bits(weight) for weight in weights]))
