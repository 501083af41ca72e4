"""LoRA files in the dialects of the tools that people train with, and what each adds to a model, worked out by hand."""
# O rows of a weight (its outputs), I its inputs, R rank

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wanqwen.core.weights.keymap import Renamer
from wanqwen.wan.keymap import DIFFUSION_MODEL_SPELLINGS

State = dict[str, Tensor]
RANK = 3


@dataclass(frozen=True)
class Written:
    """A file's tensors and metadata, and the model's weights with it at some strength, in float64."""

    tensors: State
    metadata: dict[str, str]
    merged: Callable[[float], State]


@dataclass(frozen=True)
class Dialect:
    """How a tool writes. `module` turns an official path into its own; endings of the two factors; alpha, if any."""

    module: Callable[[str], str]
    down: str = "lora_down.weight"
    up: str = "lora_up.weight"
    alpha: float | None = None
    alpha_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32


def _dots(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path


def _underscores(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path.replace(".", "_")


def _diffusers(path: str) -> str:
    return Renamer(DIFFUSION_MODEL_SPELLINGS[1].table)(path)


PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
NAMED = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
DOTTED = {"down": "lora.down.weight", "up": "lora.up.weight"}
DIALECTS = {
    "official": Dialect(_dots("diffusion_model."), **PEFT),
    "bare": Dialect(_dots(""), **NAMED),
    "bare-alpha": Dialect(_dots(""), alpha=8, alpha_dtype=torch.bfloat16, dtype=torch.bfloat16),
    "alpha-int64": Dialect(_dots(""), alpha=2, alpha_dtype=torch.int64),
    "transformer": Dialect(_dots("transformer."), **PEFT),
    "pipe": Dialect(_dots("pipe.dit."), **NAMED),
    "peft": Dialect(_dots("base_model.model."), **PEFT),
    "peft-transformer": Dialect(_dots("base_model.model.transformer."), **PEFT),
    "comfyui": Dialect(_dots("model.diffusion_model."), alpha=1),
    "old-diffusers": Dialect(_dots("transformer."), **DOTTED),
    "float16": Dialect(_dots("diffusion_model."), **PEFT, dtype=torch.float16),
    "kohya": Dialect(_underscores("lora_unet_"), alpha=1),
    "wan-fun": Dialect(_underscores("lora_unet__"), alpha=4),
    "lycoris": Dialect(_underscores("lycoris_"), alpha=2),
}
DIFFUSERS = {  # of Wan; the official names of Qwen-Image are diffusers'
    "diffusers": Dialect(lambda path: f"transformer.{_diffusers(path)}", **PEFT),
    "kohya-diffusers": Dialect(lambda path: f"lora_unet_{_diffusers(path).replace('.', '_')}", alpha=2),
}


def layers(state: State) -> Iterator[tuple[str, Tensor]]:
    """Yield the paths of a model's linear layers, and their weights."""
    for name, tensor in state.items():
        if name.endswith(".weight") and tensor.dim() == 2 and "addition_t" not in name:
            yield name.removesuffix(".weight"), tensor


def low_rank(state: State, dialect: Dialect) -> Written:
    """Return a LoRA of every linear layer."""
    make, tensors, deltas = _random(), {}, {}
    for path, weight in layers(state):
        down, up = make(RANK, weight.shape[1], dtype=dialect.dtype), make(weight.shape[0], RANK, dtype=dialect.dtype)
        tensors |= {f"{dialect.module(path)}.{dialect.down}": down, f"{dialect.module(path)}.{dialect.up}": up}
        scale = 1.0
        if dialect.alpha is not None:
            scale = dialect.alpha / RANK
            tensors[f"{dialect.module(path)}.alpha"] = torch.tensor(dialect.alpha, dtype=dialect.alpha_dtype)
        deltas[f"{path}.weight"] = scale * (up.double() @ down.double())
    return Written(tensors, {}, lambda strength: _sum(state, deltas, strength))


def differences(state: State) -> Written:
    """Return a distillation as LightX2V writes it: pairs, and plain differences of all that is no linear weight."""
    written, make = low_rank(state, DIALECTS["official"]), _random(1)
    tensors, deltas = dict(written.tensors), {}
    pairs = {f"{path}.weight" for path, _ in layers(state)}
    for name in state.keys() - pairs:
        delta = make(*state[name].shape)
        path, _, leaf = name.rpartition(".")
        ending = {"weight": ".diff", "bias": ".diff_b", "modulation": ".diff_m", "emb_pos": ".emb_pos.diff"}[leaf]
        tensors[f"diffusion_model.{path}{ending}"], deltas[name] = delta, delta.double()
    return Written(tensors, {}, lambda strength: _sum(state, deltas, strength) | {
        name: tensor for name, tensor in written.merged(strength).items() if name in pairs})  # fmt: skip


def convolution(state: State) -> Written:
    """Return a pair for the patch embedding alone, whose factors have the axes of a kernel, and a bare parameter."""
    make, weight = _random(), state["patch_embedding.weight"]
    down, up = make(RANK, *weight.shape[1:]), make(weight.shape[0], RANK, 1, 1, 1)
    modulation = make(*state["blocks.0.modulation"].shape)
    tensors = {
        "diffusion_model.patch_embedding.lora_A.weight": down,
        "diffusion_model.patch_embedding.lora_B.weight": up,
        "diffusion_model.blocks.0.modulation.diff": modulation,
    }
    delta = (up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape)
    deltas = {"patch_embedding.weight": delta, "blocks.0.modulation": modulation.double()}
    return Written(tensors, {}, lambda strength: _sum(state, deltas, strength))


def loha(state: State) -> Written:
    """Return a LoHa of every linear layer, with alpha."""
    make, tensors, deltas = _random(), {}, {}
    for path, weight in layers(state):
        factors = {name: make(weight.shape[0], RANK) if name[-1] == "a" else make(RANK, weight.shape[1])
                   for name in ("w1_a", "w1_b", "w2_a", "w2_b")}  # fmt: skip
        module = _underscores("lycoris_")(path)
        tensors |= {f"{module}.hada_{name}": factor for name, factor in factors.items()}
        tensors[f"{module}.alpha"] = torch.tensor(6.0)
        w1_a, w1_b, w2_a, w2_b = (factor.double() for factor in factors.values())
        deltas[f"{path}.weight"] = 6.0 / RANK * (w1_a @ w1_b) * (w2_a @ w2_b)
    return Written(tensors, {}, lambda strength: _sum(state, deltas, strength))


def lokr(state: State, inner_is_whole: bool) -> Written:
    """Return a LoKr of every linear layer; alpha counts only where a matrix has factors."""
    make, tensors, deltas = _random(), {}, {}
    for path, weight in layers(state):
        rows, width = weight.shape
        module = _underscores("lora_unet_")(path)
        w1, inner = make(4, 2), (rows // 4, width // 2)
        tensors |= {f"{module}.lokr_w1": w1, f"{module}.alpha": torch.tensor(6.0)}
        if inner_is_whole:
            w2, scale = make(*inner), 1.0
            tensors[f"{module}.lokr_w2"] = w2
        else:
            up, down, scale = make(inner[0], RANK), make(RANK, inner[1]), 6.0 / RANK
            tensors |= {f"{module}.lokr_w2_a": up, f"{module}.lokr_w2_b": down}
            w2 = up.double() @ down.double()
        deltas[f"{path}.weight"] = scale * torch.kron(w1.double(), w2.double())
    return Written(tensors, {}, lambda strength: _sum(state, deltas, strength))


def dora(state: State, per_row: bool) -> Written:
    """Return a DoRA of every linear layer, as PEFT writes it (a length per row) or LyCORIS (per input)."""
    dialect = DIALECTS["official"] if per_row else DIALECTS["kohya"]
    written, make, magnitudes = low_rank(state, dialect), _random(2), {}
    tensors = dict(written.tensors)
    for path, weight in layers(state):
        if per_row:
            magnitudes[path] = make(weight.shape[0]).abs() + 0.1
            tensors[f"{dialect.module(path)}.lora_magnitude_vector"] = magnitudes[path]
        else:
            magnitudes[path] = make(1, weight.shape[1]).abs() + 0.1
            tensors[f"{dialect.module(path)}.dora_scale"] = magnitudes[path]

    def merged(strength: float) -> State:
        state64, whole = {name: tensor.double() for name, tensor in state.items()}, written.merged(1.0)
        for path, magnitude in magnitudes.items():
            weight = whole[f"{path}.weight"]
            length = (weight**2).sum(1 if per_row else 0, keepdim=True).sqrt()
            directed = (magnitude[:, None] if per_row else magnitude).double() * weight / length
            before = state64[f"{path}.weight"]
            state64[f"{path}.weight"] = before + strength * (directed - before)
        return state64

    return Written(tensors, {}, merged)


def configured(state: State) -> Written:
    """Return a LoRA as diffusers saves it, whose alpha is in the metadata."""
    config = {"transformer.r": RANK, "transformer.lora_alpha": 12, "transformer.alpha_pattern": {"blocks.0.ffn.0": 3}}
    written = low_rank(state, DIALECTS["transformer"])
    deltas = {name: tensor - state[name].double() for name, tensor in written.merged(1.0).items()}
    scaled = {name: delta * (3 if name == "blocks.0.ffn.0.weight" else 12) / RANK for name, delta in deltas.items()}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    return Written(written.tensors, metadata, lambda strength: _sum(state, scaled, strength))


WRITERS: dict[str, Callable[[State], Written]] = {
    **{name: lambda state, dialect=dialect: low_rank(state, dialect) for name, dialect in DIALECTS.items()},
    "loha": loha,
    "lokr": lambda state: lokr(state, inner_is_whole=False),
    "lokr-whole": lambda state: lokr(state, inner_is_whole=True),
    "dora-rows": lambda state: dora(state, per_row=True),
    "dora-inputs": lambda state: dora(state, per_row=False),
}
WAN_WRITERS = {
    **WRITERS,
    **{name: lambda state, dialect=dialect: low_rank(state, dialect) for name, dialect in DIFFUSERS.items()},
    "lightx2v": differences,
    "convolution": convolution,
    "metadata": configured,
}


def write(path: Path, written: Written) -> Path:
    """Write a LoRA's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in written.tensors.items()}, path, written.metadata or None)
    return path


def official(path: Path) -> State:
    """Return the weights of a tiny model in float32."""
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def _random(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype=torch.float32: (torch.randn(shape, generator=generator) * 0.2).to(dtype)


def _sum(state: State, deltas: State, strength: float) -> State:
    return {name: tensor.double() + strength * deltas.get(name, 0) for name, tensor in state.items()}
