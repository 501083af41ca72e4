"""Models in every format that is read give what the model of their dequantised weights gives."""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from wanqwen.core import planning, runtime, storage
from wanqwen.core.blocks import Run
from wanqwen.core.ops.linear import Linear
from wanqwen.core.storage import PACKINGS
from wanqwen.core.types import Conditioning, Family, SampleRequest
from wanqwen.core.weights.assemble import prepare
from wanqwen.loading import load_model, with_lora
from wanqwen.qwen_image.config import QwenImageConfig
from wanqwen.qwen_image.family import FAMILY as QWEN_IMAGE
from wanqwen.tests.gguf_files import FLOATS, Blocks, meaning, random_blocks, write
from wanqwen.wan.config import WanConfig
from wanqwen.wan.family import FAMILY as WAN

from ... import loras

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dataclass(frozen=True, kw_only=True)
class Model:
    """A small model of a family whose matrices have rows of whole blocks."""

    family: Family
    config: WanConfig | QwenImageConfig
    blocks: str


MODELS = {
    "wan": Model(
        family=WAN,
        config=WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, freq_dim=32, text_dim=256),
        blocks="blocks.",
    ),
    "qwen_image": Model(
        family=QWEN_IMAGE,
        config=QwenImageConfig(num_layers=2, num_heads=2, dim=256, ffn_dim=512, text_dim=256, freq_dim=32),
        blocks="transformer_blocks.",
    ),
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def state_of(model: Model) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = model.family.build(model.config).state_dict()
    return {
        name: torch.randn(tensor.shape) / math.sqrt(tensor.shape[-1]) if tensor.dim() > 1 else torch.randn(tensor.shape)
        for name, tensor in shapes.items()
    }


def is_matrix(model: Model, name: str, tensor: Tensor) -> bool:
    return name.startswith(model.blocks) and tensor.dim() == 2


def in_formats(model: Model, kinds: Sequence[str]) -> tuple[dict[str, Tensor | Blocks], dict[str, Tensor]]:
    """Return what a file holds, and what it means: matrices of blocks in the formats in turn, others in BF16 or F32."""
    stored: dict[str, Tensor | Blocks] = {}
    for i, (name, tensor) in enumerate(state_of(model).items()):
        kind = kinds[i % len(kinds)]
        if not is_matrix(model, name, tensor):
            stored[name] = tensor.bfloat16() if tensor.dim() > 1 else tensor
        elif kind in PACKINGS:
            stored[name] = random_blocks(kind, *tensor.shape, size=1 / math.sqrt(tensor.shape[1]), seed=i)
        else:
            [dtype] = [dtype for dtype, known in FLOATS.items() if known == kind]
            stored[name] = tensor.to(dtype)
    return stored, {n: meaning(t) if isinstance(t, tuple) else t.float() for n, t in stored.items()}


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata))
    return path


def opened(path: Path, dtype: torch.dtype) -> nn.Module:
    """Return the model of a file, as a run would have it, filled both ways."""
    handle = load_model(path, dtype)
    weights = prepare(
        lambda: handle.family.build(handle.identity.config),
        handle.identity.names,
        handle.checkpoint,
        float32=handle.family.float32,
        dtype=dtype,
        ignored=handle.identity.ignored,
    )
    filled = {name: torch.empty_like(tensor, device="cpu") for name, tensor in weights.module.state_dict().items()}
    weights.fill(filled)
    module = weights.materialise()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), filled[name].view(-1).view(torch.uint8)), name
    # A copy, since products with memory mapped from a file round otherwise where its alignment differs.
    return copy.deepcopy(module)


def velocity(model: Model, module: nn.Module, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 1, 6, 4, generator=generator)
    text = Conditioning(text=torch.randn(1, 5, model.config.text_dim, generator=generator))
    with torch.no_grad():
        denoise = model.family.denoiser(module, Run(dtype=dtype), [text], CPU)
        [found] = denoise(x, torch.tensor([500.0]), (0,))
    assert found.isfinite().all() and found.std() > 1e-3
    return found


@DTYPES
@pytest.mark.parametrize("kind", [*PACKINGS, *FLOATS.values()])
@each_model
def test_a_model_in_gguf_gives_what_its_weights_mean(
    tmp_path: Path, model: Model, kind: str, dtype: torch.dtype
) -> None:
    stored, meant = in_formats(model, [kind])
    module = opened(write(tmp_path / "m.gguf", stored), dtype)
    plain = opened(save(tmp_path / "m.safetensors", meant, {}), dtype)
    assert torch.equal(velocity(model, module, dtype), velocity(model, plain, dtype))
    packed = [part for part in module.modules() if isinstance(part, Linear) and part.stored]
    matrices = sum(is_matrix(model, name, tensor) for name, tensor in meant.items())
    assert len(packed) == (matrices if kind in PACKINGS else 0)
    assert all(part.weight.dtype == torch.uint8 for part in packed), "they are kept as blocks"


@DTYPES
@each_model
def test_formats_may_differ_from_layer_to_layer(tmp_path: Path, model: Model, dtype: torch.dtype) -> None:
    stored, meant = in_formats(model, [*PACKINGS, *FLOATS.values()])
    module = opened(write(tmp_path / "m.gguf", stored), dtype)
    plain = opened(save(tmp_path / "m.safetensors", meant, {}), dtype)
    assert len({part.stored for part in module.modules() if isinstance(part, Linear)}) > 6
    assert torch.equal(velocity(model, module, dtype), velocity(model, plain, dtype))


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_parameters_that_are_kept_in_float32_are_unpacked_when_they_are_read(tmp_path: Path, kind: str) -> None:
    """The published tools leave these alone; others need not."""
    model = MODELS["wan"]
    stored, meant = in_formats(model, ["F32"])
    for name in ("head.head.weight", "text_embedding.0.weight", "time_projection.1.weight"):
        stored[name] = random_blocks(kind, *meant[name].shape)
        meant[name] = meaning(stored[name])
    module = opened(write(tmp_path / "m.gguf", stored), torch.bfloat16)
    assert torch.equal(module.head.head.weight, meant["head.head.weight"])
    assert module.text_embedding[0].stored == kind and module.time_projection[1].stored is None
    plain = opened(save(tmp_path / "m.safetensors", meant, {}), torch.bfloat16)
    assert torch.equal(velocity(model, module, torch.bfloat16), velocity(model, plain, torch.bfloat16))


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_leading_ones_may_be_left_out(tmp_path: Path, suffix: str) -> None:
    model = MODELS["wan"]
    state = state_of(model)
    short = {name: tensor[0] if name.endswith("modulation") else tensor for name, tensor in state.items()}
    assert short["blocks.0.modulation"].shape == (6, 256)
    path = tmp_path / f"short.{suffix}"
    path = write(path, short) if suffix == "gguf" else save(path, short, {})
    found = opened(path, torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@each_model
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_does_not_fit_is_named(tmp_path: Path, model: Model, prefix: str) -> None:
    stored, _ = in_formats(model, ["Q4_K"])
    names = [name for name in stored if name.startswith(model.blocks)]
    packed, bias = (next(n for n in names if "1." in n and n.endswith(leaf)) for leaf in ("2.weight", "2.bias"))
    wide = random_blocks("Q4_K", stored[packed][1].shape[0], 1024)

    def load(changed: Mapping[str, Tensor | Blocks]) -> nn.Module:
        names = sorted(changed, key=hash)  # in another order each time
        return opened(write(tmp_path / "m.gguf", {prefix + name: changed[name] for name in names}), torch.bfloat16)

    load(stored)
    with pytest.raises(ValueError, match=rf"lacks 1 tensors \({bias}\)"):
        load({name: tensor for name, tensor in stored.items() if name != bias})
    with pytest.raises(ValueError, match=rf"holds, beside it, 1 tensors \({prefix}{model.blocks}0\.extra\.weight\)"):
        load(stored | {f"{model.blocks}0.extra.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=rf"1 of another shape: {packed} is \[256, 1024\] instead of \[256, 512\]"):
        load(stored | {packed: wide})


def test_a_format_that_is_not_read_is_named_at_once(tmp_path: Path) -> None:
    model = MODELS["wan"]
    stored, _ = in_formats(model, ["Q8_0"])
    stored["blocks.1.ffn.0.weight"] = ("IQ2_XXS", torch.zeros(512, 66, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"can't be read: IQ2_XXS; use a file of this model in 16 bits, fp8, or GGUF"):
        load_model(write(tmp_path / "m.gguf", stored))


def comfy_record(**values: object) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


# The second LoRA beside a pair, and latent frames: pairs go beside weights for few tokens, else into a copy of these.
WAYS = {"beside": ("official", 1), "in a copy": ("official", 33), "no pair": ("loha", 1)}
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "mixed"])
@each_way
@each_model
def test_loras_change_what_blocks_mean(tmp_path: Path, model: Model, way: str, kind: str) -> None:
    stored, meant = in_formats(model, [*PACKINGS, *FLOATS.values()] if kind == "mixed" else [kind])
    check_loras(tmp_path, model, write(tmp_path / "m.gguf", stored), meant, *WAYS[way])


@pytest.mark.parametrize("rows", [False, True])
@each_way
def test_loras_change_what_int8_means(tmp_path: Path, way: str, rows: bool) -> None:
    stored, meant, layers = in_int8(MODELS["wan"], rows)
    stored |= {f"{layer}.comfy_quant": comfy_record(format="int8_tensorwise") for layer in layers}
    check_loras(tmp_path, MODELS["wan"], save(tmp_path / "int8.safetensors", stored, {}), meant, *WAYS[way])


def check_loras(
    tmp_path: Path, model: Model, path: Path, meant: Mapping[str, Tensor], second: str, frames: int
) -> None:
    """Check that two LoRAs on a file give what its weights in float32 do with both merged by hand."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(1, 5, model.config.text_dim, generator=generator)
    shape = (1, 16, frames, 6, 4) if model.family is WAN else (1, 16, 1, 6, 4 * frames)
    request = SampleRequest(latent=torch.zeros(shape), positive=Conditioning(text=rows), steps=1, solver="euler")
    plain = {name: tensor.double() for name, tensor in meant.items()}
    changed, merged = load_model(path, torch.float32), plain
    for writer, strength in ((second, 0.4), ("kohya", -0.6)):
        written = loras.WRITERS[writer]({name: tensor.float() for name, tensor in meant.items()})
        file = loras.write(tmp_path / f"{strength}.safetensors", written)
        changed, lines = with_lora(changed, file, strength)
        assert len(lines) == 1, "all of it is used"
        by_hand = written.merged(strength)
        merged = {name: tensor + by_hand[name] - plain[name] for name, tensor in merged.items()}
    state = {name: tensor.float() for name, tensor in merged.items()}
    wanted = runtime.generate(load_model(save(tmp_path / "merged.safetensors", state, {}), torch.float32), request)
    base = replace(changed, loras=())
    without, found = (runtime.generate(handle, request) for handle in (base, changed))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max() < 1e-2 * (without - wanted).abs().max()
    assert torch.equal(runtime.generate(base, request), without)


def in_int8(model: Model, rows: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Return what a file of int8 holds, what it means, and its layers: all matrices of blocks but those of q."""
    stored, meant, layers = {}, state_of(model), []
    for name, tensor in list(meant.items()):
        stored[name] = tensor
        if is_matrix(model, name, tensor) and ".q." not in name:
            scale = (tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().amax()) / 127
            stored[name] = (tensor / scale).round().to(torch.int8)
            layers.append(name.removesuffix(".weight"))
            stored[f"{layers[-1]}.weight_scale"] = scale
            meant[name] = stored[name].float() * scale
    return stored, meant, layers


@DTYPES
@pytest.mark.parametrize("where", ["beside", "metadata"])
@pytest.mark.parametrize("rows", [False, True])
def test_int8_gives_what_its_weights_mean(tmp_path: Path, rows: bool, where: str, dtype: torch.dtype) -> None:
    model = MODELS["wan"]
    record = {"format": "int8_tensorwise"}
    stored, meant, layers = in_int8(model, rows)
    if where == "beside":
        stored |= {f"{layer}.comfy_quant": comfy_record(**record) for layer in layers}
    prefix = "model.diffusion_model."
    said = {"layers": {prefix + layer: record for layer in layers}} if where == "metadata" else {}
    stored = {prefix + name: tensor for name, tensor in stored.items()}
    path = save(tmp_path / "int8.safetensors", stored, {storage.METADATA_RECORD: json.dumps(said)})
    assert load_model(path).identity.weight_format == "int8_scaled"
    module = opened(path, dtype)
    assert module.blocks[0].ffn[0].weight.dtype == torch.int8
    plain = opened(save(tmp_path / "plain.safetensors", meant, {}), dtype)
    assert torch.equal(velocity(model, module, dtype), velocity(model, plain, dtype))


REFUSED: dict[str, tuple[dict[str, object], Callable[[Tensor], dict[str, Tensor]], str]] = {
    "int8 without a record": ({}, lambda w: {"weight": w.char(), "weight_scale": torch.ones(())}, "can't be read: I8"),
    "int8 without a scale": (
        {"format": "int8_tensorwise"},
        lambda w: {"weight": w.char()},
        "can't be read: I8",
    ),
    "rotated int8": (
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
        lambda w: {"weight": w.char(), "weight_scale": torch.ones(len(w), 1)},
        "quantised as 'int8_tensorwise with convrot'",
    ),
    "nvfp4": (
        {"format": "nvfp4"},
        lambda w: {
            "weight": torch.zeros(len(w), w.shape[1] // 2, dtype=torch.uint8),
            "weight_scale": torch.zeros(len(w), w.shape[1] // 16).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.ones(()),
        },
        "quantised as 'nvfp4'",
    ),
    "mxfp8": (
        {"format": "mxfp8"},
        lambda w: {
            "weight": w.to(torch.float8_e4m3fn),
            "weight_scale": torch.zeros(len(w), w.shape[1] // 32, dtype=torch.uint8),
        },
        "quantised as 'mxfp8'",
    ),
    "an fp8 with smoothing": (
        {"format": "svdquant_w4a4"},
        lambda w: {"weight": w.char(), "pre_quant_scale": torch.ones(w.shape[1])},
        "quantised as 'svdquant_w4a4'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_records_of_other_formats_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    record, make, said = REFUSED[kind]
    state, layer = state_of(MODELS["wan"]), "blocks.1.ffn.0"
    state |= {f"{layer}.{leaf}": tensor for leaf, tensor in make(state[f"{layer}.weight"]).items()}
    if record:
        state[f"{layer}.comfy_quant"] = comfy_record(**record)
    with pytest.raises(ValueError, match=rf"m\.safetensors .*{said}.*use a file of this model in 16 bits, fp8, or GG"):
        load_model(save(tmp_path / "m.safetensors", state, {}))


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_NL"])
def test_a_plan_counts_blocks_as_they_lie_and_what_they_become(tmp_path: Path, kind: str) -> None:
    model, shape = MODELS["wan"], (1, 16, 1, 6, 4)
    stored, meant = in_formats(model, [kind])
    plain = {name: tensor.bfloat16() for name, tensor in meant.items()}
    jobs = []
    for path in (write(tmp_path / "m.gguf", stored), save(tmp_path / "m.safetensors", plain, {})):
        handle = load_model(path, torch.bfloat16)
        scene = planning.Scene(
            family=handle.family,
            config=handle.identity.config,
            latent_shape=shape,
            conditionings=planning.conditionings_of(handle.family, handle.identity.config, shape, (5,)),
            dtype=torch.bfloat16,
        )
        jobs.append(planning.job_of(runtime.loaded_of(handle, torch.bfloat16), scene, None))
    matrices = [name for name in meant if name.startswith("blocks.0.") and is_matrix(model, name, meant[name])]
    saved = sum(plain[name].nbytes - stored[name][1].nbytes for name in matrices)
    assert jobs[1].blocks[0] - jobs[0].blocks[0] == saved > 0
    # Both matrices of the feed-forward are made ready before it begins.
    assert jobs[0].working >= jobs[1].working + 2 * plain["blocks.0.ffn.0.weight"].nbytes
