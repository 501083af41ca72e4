"""DFloat11 models give the bits of the bf16 models that they were made of: resident, streamed, with LoRAs, encoded."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wanqwen.core import runtime, text
from wanqwen.core.memory import resident, unpack
from wanqwen.core.memory.placement import Plan
from wanqwen.core.memory.supply import Source
from wanqwen.core.memory.unpack import Unpack
from wanqwen.core.ops.dfloat11 import decode
from wanqwen.core.ops.dfloat11_encoder import encode
from wanqwen.core.ops.linear import Linear
from wanqwen.core.ops.packed import Packed
from wanqwen.core.text import Placement
from wanqwen.core.types import Conditioning, Control, ModelHandle, SampleRequest, TensorInfo
from wanqwen.loading import load_model, load_text_encoder, with_lora
from wanqwen.tests.dfloat11_files import write_pair

from ... import loras
from ...nodes import tiny
from .late_link import LateLink
from .test_streamed_models import stream

pytestmark = pytest.mark.usefixtures("cuda_runtime")

WIDTHS = {"wan_dit": 96, "qwen_dit": 128, "vace": tiny.TEXT.dim}  # of text rows
WAYS = {
    "resident": (),
    "all streamed": ((0, 1, 2, 3), 2, Source.PINNED, True),
    "some streamed": ((1, 3), 3, Source.DISK, False),
}


@pytest.fixture(scope="module", params=WIDTHS)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    source = tiny.write_model(folder / "vace.safetensors", tiny.VACE) if name == "vace" else name
    plain, compressed = write_pair(source, folder)
    return plain, compressed, name


@pytest.fixture
def request_of(twins: tuple[Path, Path, str]) -> SampleRequest:
    generator, name = torch.Generator().manual_seed(0), twins[2]
    positive, negative = (Conditioning(text=torch.randn(1, n, WIDTHS[name], generator=generator)) for n in (7, 4))
    if name == "vace":
        context = torch.randn(1, tiny.VACE.vace_dim, 1, 8, 8, generator=generator)
        positive, negative = (replace(c, controls=(Control(context=context),)) for c in (positive, negative))
    latent = torch.zeros(1, 16, 1, 8, 8)
    return SampleRequest(latent=latent, positive=positive, negative=negative, steps=2, guidance=(3.0,), seed=5)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of weights that were decoded, one for each time."""
    found = []

    def counted(*planes_and_out: Tensor) -> Tensor:
        if not planes_and_out[-1].is_meta:  # where runs are planned
            found.append(len(planes_and_out[-1]))
        return decode(*planes_and_out)

    monkeypatch.setattr(unpack, "decode", counted)
    return found


def packed(handle: ModelHandle, dtype: torch.dtype) -> Iterator[Packed]:
    return (part for part in runtime.loaded_of(handle, dtype).module.modules() if isinstance(part, Packed))


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        (WAYS["resident"], torch.float32),
        (WAYS["all streamed"], torch.bfloat16),
        (WAYS["some streamed"], torch.float32),
    ],
    ids=WAYS,
)
def test_a_dfloat11_model_gives_the_bits_of_its_bf16_twin(
    twins: tuple[Path, Path, str],
    request_of: SampleRequest,
    monkeypatch: pytest.MonkeyPatch,
    decoded: list[int],
    way: tuple,
    dtype: torch.dtype,
) -> None:
    plain, compressed = (replace(load_model(path), dtype=dtype) for path in twins[:2])
    wanted = runtime.generate(plain, request_of)
    assert not decoded
    if way:
        stream(monkeypatch, *way)
    for _ in range(2):
        assert torch.equal(runtime.generate(compressed, request_of), wanted)
    groups = list(packed(compressed, dtype))
    is_interleaved = bool(way) and way[3]
    passes = 1 if is_interleaved else 2
    assert len(decoded) == 2 * 2 * passes * len(groups), "once for each visit, for both passes of one"
    layers = [layer for group in groups for layer in group._owners]
    assert len(layers) >= 40 and all(layer.weight is None for layer in layers), "nothing stays decoded"


@pytest.mark.parametrize(("way", "dtype"), [(WAYS["resident"], torch.bfloat16), (WAYS["all streamed"], torch.float32)])
def test_loras_change_a_dfloat11_model_as_its_bf16_twin(
    twins: tuple[Path, Path, str],
    request_of: SampleRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: tuple,
    dtype: torch.dtype,
) -> None:
    handles = []
    for path in twins[:2]:
        handle = replace(load_model(path), dtype=dtype)
        shapes = handle.family.files.parameters(handle.identity.config)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        for name, writer, start in (("all", loras.differences, 0.0), ("late", loras.loha, 0.5)):
            file = tmp_path / f"{name}_{path.stem}.safetensors"
            handle, _ = with_lora(handle, loras.write(file, writer(state)), 0.3, start)
        handles.append(handle)
    wanted = runtime.generate(handles[0], request_of)
    assert not torch.equal(wanted, runtime.generate(replace(handles[0], loras=()), request_of))
    if way:
        stream(monkeypatch, *way)
    for _ in range(2):
        assert torch.equal(runtime.generate(handles[1], request_of), wanted)


def test_a_block_that_ran_out_of_memory_leaves_no_weights_and_the_run_goes_on(
    twins: tuple[Path, Path, str], request_of: SampleRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compressed = map(load_model, twins[:2])
    wanted, at, broken = runtime.generate(plain, request_of), Linear.at, []
    stream(monkeypatch, (), 0)

    def ready(self: Linear, *arguments: object) -> object:
        if self is last and not broken:
            broken.append(self.weight)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return at(self, *arguments)

    block = runtime.loaded_of(compressed, runtime.compute_dtype(compressed, torch.device("cpu"))).blocks[1]
    *_, last = (part for part in block.modules() if isinstance(part, Linear))
    monkeypatch.setattr(Linear, "at", ready)
    assert torch.equal(runtime.generate(compressed, request_of), wanted)
    assert broken[0] is not None and last.weight is None


def test_weights_of_layers_that_are_not_ours_come_in_their_dtype() -> None:
    root = torch.nn.Module()
    root.foreign, root.own = torch.nn.Linear(4, 6, bias=False), Linear(4, 2, bias=False)
    weights = [torch.randn(6, 4).bfloat16(), torch.randn(2, 4).bfloat16()]
    planes = encode(weights)
    layers = {"foreign": (6, 4), "own": (2, 4)}
    group = Packed(root, layers, {name: TensorInfo("U8", tuple(t.shape)) for name, t in planes.items()})
    for name, plane in planes.items():
        setattr(group, name, plane)
    root.add_module("group", group)
    hook = Unpack([root], torch.device("cpu"), torch.float16)
    assert hook.nbytes > 32 * 2 + 24 * 2
    for _ in range(2):
        hook.before(0)
        assert torch.equal(root.foreign.weight, weights[0].half()) and torch.equal(root.own.weight, weights[1])
        assert [name for name, _ in root.named_parameters()] == ["foreign.weight", "own.weight"]
        hook.after(0)
        assert root.foreign.weight is None and root.own.weight is None
    hook.before(0)
    hook.close()
    assert not list(root.parameters())


@pytest.mark.parametrize("write", [tiny.write_text_encoder, tiny.write_qwen_text_encoder], ids=["umt5", "qwen-vl"])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_text_encoders_give_the_rows_of_their_bf16_twins(
    tmp_path: Path,
    write: Callable[[Path], Path],
    is_streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
    decoded: list[int],
) -> None:
    plain, compressed = write_pair(write(tmp_path / "text.safetensors"), tmp_path)
    encoders = [load_text_encoder(path, dtype=torch.bfloat16, device="cpu") for path in (plain, compressed)]
    if is_streamed:
        plan = Plan(streaming=(0, 1), num_slots=1, sources=dict.fromkeys((0, 1), Source.DISK))
        monkeypatch.setattr(resident, "computes_in_ram", lambda device: False)
        monkeypatch.setattr(resident, "link_to", lambda where, slots: LateLink())
        monkeypatch.setattr(text, "make_plan", lambda *asked: plan)
        monkeypatch.setattr(Placement, "limit", lambda self, wanted: wanted)
    rows = [encoder.encode(["a red star moving left"])[0].text for encoder in encoders]
    assert torch.equal(*rows) and rows[0].abs().max() > 0
    assert len(decoded) == 2, "both layers, of the second encoder only"
