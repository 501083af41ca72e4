"""A model with LoRAs gives what its weights would with them merged by hand, and its own weights stay as they are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from wanqwen.core import host, runtime
from wanqwen.core.ops import linear
from wanqwen.core.ops.change import LowRank
from wanqwen.core.ops.linear import Linear
from wanqwen.core.sampling.sample import SampleError
from wanqwen.core.types import Conditioning, Control, ModelHandle, SampleRequest
from wanqwen.core.weights.adapters import device_bytes, read_changes
from wanqwen.loading import load_model, with_lora
from wanqwen.wan.config import IMAGE_ROWS

from ... import loras
from ...nodes import tiny

PICTURES = replace(tiny.MODEL, in_dim=36, image_dim=24, image_positions=2 * IMAGE_ROWS)  # of a first and a last one
FAMILIES = {
    "wan": (tiny.write_model, tiny.TEXT.dim),
    "vace": (lambda path: tiny.write_model(path, tiny.VACE), tiny.TEXT.dim),
    "pictures": (lambda path: tiny.write_model(path, PICTURES), tiny.TEXT.dim),
    "qwen": (tiny.write_qwen_model, tiny.VL.hidden),
}
# Latents of so few tokens that a pair is cheaper beside the weight, and of so many that it is cheaper in it. A prompt
# of Wan has 512 rows anyway, and a time step one.
SIZES = {"beside": (1, 4, 4), "in the weight": (2, 8, 8)}
STRENGTH = 0.7
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loras")
    for name, (write, _) in FAMILIES.items():
        write(root / f"{name}.safetensors")
    return root


def request_of(family: str, size: str, steps: int = 1) -> SampleRequest:
    generator, width = torch.Generator().manual_seed(0), FAMILIES[family][1]
    positive, negative = (Conditioning(text=torch.randn(1, n, width, generator=generator)) for n in (5, 3))
    frames, height, width = SIZES[size]
    shape = (1, 16, 1, height, 2 * width) if family == "qwen" else (1, 16, frames, height, width)
    if family == "vace":
        context = torch.randn(1, tiny.VACE.vace_dim, *shape[2:], generator=generator)
        positive, negative = (replace(c, controls=(Control(context=context),)) for c in (positive, negative))
    if family == "pictures":
        image = torch.randn(1, PICTURES.image_rows, PICTURES.image_dim, generator=generator)
        extra = torch.randn(1, PICTURES.extra_dim, *shape[2:], generator=generator)
        positive, negative = (replace(c, image=image, extra=extra) for c in (positive, negative))
    return SampleRequest(
        latent=torch.zeros(shape), positive=positive, negative=negative, steps=steps, guidance=(2.0,), solver="euler",
        seed=3,
    )  # fmt: skip


def rewritten(source: Path, path: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
    """Write a model's file anew, each tensor as `change` has it."""
    tensors: dict[str, Tensor] = {}
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
        for name in opened.keys():  # noqa: SIM118  # not a mapping
            tensors |= change(name, opened.get_tensor(name))
    save_file(tensors, path, metadata)
    return path


def merged(folder: Path, family: str, state: dict[str, Tensor], name: str) -> ModelHandle:
    source = folder / f"{family}.safetensors"
    path = rewritten(source, folder / f"merged {name}.safetensors", lambda key, _: {key: state[key].float()})
    return load_model(path, torch.float32)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Which ways the layers of blocks took: whether beside the weight."""
    taken: set[bool] = set()
    original = linear.is_cheaper_beside

    def note(changes: tuple, shape: torch.Size, num_rows: int) -> bool:
        found = original(changes, shape, num_rows)
        if 1 < num_rows < 512:
            taken.add(found)
        return found

    monkeypatch.setattr(linear, "is_cheaper_beside", note)
    return taken


CASES = [("wan", name) for name in loras.WAN_WRITERS] + [("qwen", name) for name in loras.WRITERS]
CASES += [("vace", name) for name in ("official", "kohya", "diffusers", "kohya-diffusers", "lightx2v", "lokr")]
CASES += [("pictures", name) for name in ("official", "kohya", "diffusers", "kohya-diffusers", "lightx2v", "dora-rows")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_dialect_gives_what_merging_by_hand_does(
    folder: Path, family: str, name: str, tmp_path: Path, ways: set[bool]
) -> None:
    path = folder / f"{family}.safetensors"
    written = loras.WAN_WRITERS[name](loras.official(path))
    handle = load_model(path, torch.float32)
    lora, lines = with_lora(handle, loras.write(tmp_path / "lora.safetensors", written), STRENGTH)
    assert f"{len(written.tensors)} of {len(written.tensors)} tensors used" in lines[0] and len(lines) == 1
    wanted = merged(folder, family, written.merged(STRENGTH), f"{family} {name}")
    for size in SIZES:
        request = request_of(family, size)
        plain, expected = runtime.generate(handle, request), runtime.generate(wanted, request)
        assert distance(runtime.generate(lora, request), expected) <= CLOSE
        assert distance(plain, expected) > 100 * CLOSE
        assert torch.equal(runtime.generate(handle, request), plain)
    are_pairs = name not in ("loha", "lokr", "lokr-whole", "dora-rows", "dora-inputs", "convolution")
    assert ways == ({True, False} if are_pairs else set() if name == "convolution" else {False})


def _as(dtype: torch.dtype) -> Callable[[str, Tensor], dict[str, Tensor]]:
    return lambda name, tensor: {name: tensor.to(dtype)}


def _fp8(dtype: torch.dtype, scaled: str) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """Return the change to an fp8 file: plain, or scaled per tensor or per row."""

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not (name.endswith(".weight") and tensor.dim() == 2 and "blocks" in name):
            return {name: tensor.to(torch.bfloat16)}
        if not scaled:
            return {name: tensor.to(dtype)}
        most = tensor.abs().amax(1, keepdim=True) if scaled == "row" else tensor.abs().max()
        scale = most.float() / torch.finfo(dtype).max
        return {name: (tensor / scale).to(dtype), name.removesuffix("weight") + "scale_weight": scale}

    return change


FORMATS = {
    "fp32": _as(torch.float32),
    "bf16": _as(torch.bfloat16),
    "fp16": _as(torch.float16),
    "e4m3": _fp8(torch.float8_e4m3fn, ""),
    "e5m2": _fp8(torch.float8_e5m2, ""),
    "e4m3 scaled": _fp8(torch.float8_e4m3fn, "tensor"),
    "e4m3 scaled by row": _fp8(torch.float8_e4m3fn, "row"),
}


def _dequantised(path: Path) -> dict[str, Tensor]:
    """Return the weights of a file in float32, worked out from its bytes alone."""
    state = {}
    with safe_open(path, "pt") as opened:
        found = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118  # not a mapping
    for name, tensor in found.items():
        scale = found.get(name.removesuffix("weight") + "scale_weight")
        if not name.endswith("scale_weight"):
            state[name] = tensor if scale is None else tensor * scale
    return state


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_every_format_of_the_base_takes_loras(
    folder: Path, family: str, stored: str, size: str, tmp_path: Path
) -> None:
    path = rewritten(folder / f"{family}.safetensors", tmp_path / "base.safetensors", FORMATS[stored])
    state = _dequantised(path)
    written = loras.low_rank(state, loras.DIALECTS["kohya"])
    handle, request = load_model(path, torch.float32), request_of(family, size)
    lora, _ = with_lora(handle, loras.write(tmp_path / "lora.safetensors", written), STRENGTH)
    plain = runtime.generate(handle, request)
    expected = runtime.generate(merged(folder, family, written.merged(STRENGTH), f"{family} {stored}"), request)
    assert distance(runtime.generate(lora, request), expected) <= CLOSE
    assert torch.equal(runtime.generate(handle, request), plain)


@pytest.mark.parametrize("stored", FORMATS)
def test_in_bfloat16_a_weight_is_rounded_once(folder: Path, stored: str, tmp_path: Path) -> None:
    """Each ready weight is the bfloat16 of what it is without the LoRA plus the LoRA, not a sum of rounded parts."""
    path = rewritten(folder / "wan.safetensors", tmp_path / "base.safetensors", FORMATS[stored])
    written = loras.low_rank(loras.official(folder / "wan.safetensors"), loras.DIALECTS["official"])
    handle, _ = with_lora(load_model(path, torch.bfloat16), loras.write(tmp_path / "lora.safetensors", written))
    request = request_of("wan", "in the weight")
    scene = runtime.scene_of(handle, request, torch.bfloat16)
    with runtime.opened(handle, torch.device("cpu"), scene, print) as there:
        layer, dtype = there.module.blocks[0].ffn[0], torch.bfloat16
        inputs = torch.eye(layer.weight.shape[1], dtype=dtype)
        layer.bias = None  # which would round once more
        rest = layer.at(dtype)(inputs).double()
        there.adapters.turn_to(0, 1)
        [change] = layer.changes
        found, delta = layer.at(dtype)(inputs), change.difference.of(slice(None)).t().double()
        once, parts = (rest + delta).to(dtype), (rest + delta.to(dtype)).to(dtype)
        assert (found == once).double().mean() > 0.999 > 0.99 > (parts == once).double().mean()


def test_what_changes_norms_and_modulations_is_not_rounded(two: tuple[ModelHandle, Path, Path]) -> None:
    handle, first, _ = two
    [lora], stored = with_lora(handle, first)[0].loras, load_file(first)
    changes = read_changes(lora, torch.bfloat16, torch.device("cpu"))
    kept, held = {}, 0
    for name, change in changes.items():
        found = change.difference
        tensors = [found.down, found.up] if isinstance(found, LowRank) else [found.values]
        kept[name], held = {tensor.dtype for tensor in tensors}, held + sum(tensor.nbytes for tensor in tensors)
    assert kept["blocks.0.ffn.0.weight"] == kept["patch_embedding.weight"] == {torch.bfloat16}
    for name, ending in (("norm3.weight", "norm3.diff"), ("ffn.0.bias", "ffn.0.diff_b"), ("modulation", "diff_m")):
        found = changes[f"blocks.0.{name}"].difference.values
        assert torch.equal(found.flatten(), stored[f"diffusion_model.blocks.0.{ending}"].flatten()), name
    assert held == device_bytes(lora, torch.bfloat16)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_weights_are_never_written_to(folder: Path, stored: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = rewritten(folder / "wan.safetensors", tmp_path / "base.safetensors", FORMATS[stored])
    written = loras.differences(loras.official(folder / "wan.safetensors"))
    base = load_model(path, dtype)
    handle, _ = with_lora(base, loras.write(tmp_path / "lora.safetensors", written))
    module = runtime.loaded_of(base, dtype).in_ram()
    before = {name: (tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    for size in SIZES:
        runtime.generate(handle, request_of("wan", size))
    after = module.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    for name, (tensor, copy) in before.items():
        assert after[name] is tensor and torch.equal(*(t.flatten().view(torch.uint8) for t in (tensor, copy))), name
    assert not any(layer.changes for layer in module.modules() if isinstance(layer, Linear))


@pytest.fixture
def two(folder: Path, tmp_path: Path) -> tuple[ModelHandle, Path, Path]:
    """A model, and two LoRAs for it."""
    state = loras.official(folder / "wan.safetensors")
    first = loras.write(tmp_path / "first.safetensors", loras.differences(state))
    second = loras.write(tmp_path / "second.safetensors", loras.loha(state))
    return load_model(folder / "wan.safetensors", torch.float32), first, second


def test_two_branches_do_not_disturb_each_other(two: tuple[ModelHandle, Path, Path]) -> None:
    handle, first, second = two
    request = request_of("wan", "in the weight", steps=2)
    branches = [handle, with_lora(handle, first)[0], with_lora(handle, second, -0.5)[0]]
    assert all(branch.weights is handle.weights for branch in branches) and not handle.loras
    alone = [runtime.generate(replace(branch, weights=type(handle.weights)()), request) for branch in branches]
    assert not any(torch.equal(alone[i], alone[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    for i in (0, 1, 2, 1, 0, 2, 0):
        assert torch.equal(runtime.generate(branches[i], request), alone[i])


def test_loras_add_up(two: tuple[ModelHandle, Path, Path], folder: Path) -> None:
    handle, first, second = two
    state, request = loras.official(folder / "wan.safetensors"), request_of("wan", "beside")
    both = with_lora(with_lora(handle, first, 0.5)[0], second, -1.5)[0]
    one, other = loras.differences(state).merged(0.5), loras.loha(state).merged(-1.5)
    wanted = merged(folder, "wan", {name: one[name] + other[name] - state[name] for name in state}, "both")
    assert distance(runtime.generate(both, request), runtime.generate(wanted, request)) <= CLOSE


def test_strength_0_is_as_if_it_were_not_there(two: tuple[ModelHandle, Path, Path]) -> None:
    handle, first, _ = two
    request = request_of("wan", "beside")
    assert torch.equal(runtime.generate(with_lora(handle, first, 0.0)[0], request), runtime.generate(handle, request))


@pytest.mark.parametrize("size", SIZES)
def test_a_lora_works_in_its_steps_and_in_no_other(two: tuple[ModelHandle, Path, Path], size: str) -> None:
    """Equal to a run in parts, each with the model of its own."""
    handle, first, second = two
    request = request_of("wan", size, steps=4)
    ranged = with_lora(with_lora(handle, first, 1.0, 0.25, 0.75)[0], second, 1.0, 0.5, 1.0)[0]
    models = [handle, with_lora(handle, first)[0], with_lora(with_lora(handle, first)[0], second)[0],
              with_lora(handle, second)[0]]  # fmt: skip
    latent = request.latent
    for step, model in enumerate(models):
        part = replace(request, latent=latent, start_step=step, end_step=step + 1, add_noise=step == 0)
        latent = runtime.generate(model, part)
    assert distance(runtime.generate(ranged, request), latent) <= CLOSE
    part = replace(request, start_step=2, latent=latent, add_noise=False)
    assert not torch.equal(runtime.generate(ranged, part), runtime.generate(handle, part))


def test_a_range_without_a_step_is_told(two: tuple[ModelHandle, Path, Path]) -> None:
    handle, first, _ = two
    request = request_of("wan", "beside", steps=4)
    never = with_lora(handle, first, 1.0, 0.1, 0.2)[0]
    [notice] = runtime.prepared(never, request)[1]
    assert notice == "LoRA first.safetensors never works: there is no step between 0.1 and 0.2 of 4 steps."
    assert torch.equal(runtime.generate(never, request), runtime.generate(handle, request))


def test_a_run_that_broke_off_leaves_the_model_as_it_was(
    two: tuple[ModelHandle, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, first, _ = two
    request = request_of("wan", "in the weight", steps=2)
    plain, lora = runtime.generate(handle, request), with_lora(handle, first)[0]
    asked: list[int] = []

    def interrupt() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise InterruptedError

    monkeypatch.setattr(host, "check_interrupt", interrupt)
    with pytest.raises(InterruptedError):
        runtime.generate(lora, request)
    monkeypatch.undo()
    assert torch.equal(runtime.generate(handle, request), plain)


def test_a_pass_that_breaks_inside_a_block_leaves_the_model_as_it_was(
    two: tuple[ModelHandle, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out while a block has its changed copies, so that nothing after the block is called."""
    handle, first, _ = two
    request = request_of("wan", "in the weight", steps=2)
    plain, lora = runtime.generate(handle, request), with_lora(handle, first)[0]
    original = Linear.at

    def at(self: Linear, *arguments: object) -> Callable[[Tensor], Tensor]:
        if self is inner:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *arguments)

    inner = runtime.loaded_of(handle, torch.float32).in_ram().blocks[1].ffn[2]
    monkeypatch.setattr(Linear, "at", at)
    with pytest.raises(SampleError, match="out of memory"):
        runtime.generate(lora, request)
    monkeypatch.undo()
    assert torch.equal(runtime.generate(handle, request), plain)


def test_reading_stops_when_the_user_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(folder / "wan.safetensors", torch.float32)
    file = loras.write(
        tmp_path / "x.safetensors", loras.low_rank(loras.official(model.checkpoint.path), loras.DIALECTS["kohya"])
    )
    [lora] = with_lora(model, file)[0].loras
    asked: list[int] = []

    def interrupt() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(host, "check_interrupt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_changes(lora, torch.float32, torch.device("cpu"))
    assert len(asked) == 3 < len(lora.parts)
