"""Models of the published sizes with random weights, and the scenes that they are measured in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..core.dfloat11 import num_sections
from ..core.memory.slab import Loaded
from ..core.ops.linear import Linear
from ..core.ops.packed import Packed
from ..core.planning import Scene, conditionings_of
from ..core.types import Family, TensorInfo
from ..core.weights.dfloat11_target import planes_of
from ..qwen_image.config import QwenImageConfig
from ..qwen_image.family import FAMILY as QWEN_IMAGE
from ..wan.config import WanConfig
from ..wan.family import FAMILY as WAN

META = torch.device("meta")
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN_I2V = replace(WAN_14B, in_dim=36, image_dim=1280)
WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_VACE_14B = replace(WAN_14B, vace_layers=tuple(range(0, 40, 5)), vace_dim=96)
WAN_VACE_1_3B = replace(WAN_1_3B, vace_layers=tuple(range(0, 30, 2)), vace_dim=96)


DFLOAT11, CODE_BITS = "dfloat11", 2.65  # bits of an exponent's code, on the average over a published block
FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, what it makes, and how the weights of its blocks are stored.

    `size` is width, height and frames; `rows` the text rows of each guidance pass; `references` the width and height of
    the pictures that an edit is about.
    """

    family: Family
    config: Any
    size: tuple[int, int, int]
    rows: tuple[int, ...]
    references: tuple[tuple[int, int], ...] = ()
    batch: int = 1
    stored: str = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """What the large products compute in."""
        return torch.bfloat16 if self.stored in ("fp8", "int8", DFLOAT11) else FORMATS[self.stored]

    def scene(self, kept_latents: int = 0) -> Scene:
        """Return the run, with a solver that remembers so many latents."""
        latent_format = self.family.latent_format
        width, height, frames = self.size
        references = [latent_format.shape(1, 1, rows, columns) for columns, rows in self.references]
        latent_shape = latent_format.shape(self.batch, frames, height, width)
        return Scene(
            family=self.family,
            config=self.config,
            latent_shape=latent_shape,
            conditionings=conditionings_of(self.family, self.config, latent_shape, self.rows, references),
            dtype=self.dtype,
            kept_latents=kept_latents,
        )


GUIDED = (512, 511)  # two prompts that differ
CASES = {
    "Wan-14B 832x480x81": Case(family=WAN, config=WAN_14B, size=(832, 480, 81), rows=GUIDED),
    "Wan-14B 1280x720x81": Case(family=WAN, config=WAN_14B, size=(1280, 720, 81), rows=GUIDED),
    "Wan-I2V-14B 1280x720x81": Case(family=WAN, config=WAN_I2V, size=(1280, 720, 81), rows=GUIDED),
    "Wan-VACE-14B 1280x720x81": Case(family=WAN, config=WAN_VACE_14B, size=(1280, 720, 81), rows=GUIDED),
    "Wan-VACE-1.3B 832x480x81": Case(family=WAN, config=WAN_VACE_1_3B, size=(832, 480, 81), rows=GUIDED),
    "Qwen-Image 1328x1328": Case(family=QWEN_IMAGE, config=QwenImageConfig(), size=(1328, 1328, 1), rows=(128, 127)),
    "Wan-1.3B 832x480x81": Case(family=WAN, config=WAN_1_3B, size=(832, 480, 81), rows=GUIDED),
    "Qwen-Image 1328x1328, DFloat11": Case(
        family=QWEN_IMAGE, config=QwenImageConfig(), size=(1328, 1328, 1), rows=(128, 127), stored=DFLOAT11
    ),
    "Qwen-Image-Edit 1024x1024, 2 references": Case(
        family=QWEN_IMAGE, config=QwenImageConfig(), size=(1024, 1024, 1), rows=GUIDED, references=((1024, 1024),) * 2
    ),
}


class RandomWeights:
    """The `Weights` of a model that was never trained: small numbers, the same in every run."""

    converted_bytes = 0  # nothing is kept that a plan counts on

    def __init__(self, module: nn.Module):
        self.module = module
        self.pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def fill(self, out: Mapping[str, Tensor], go_on: Callable[[], None], readers: object = None) -> None:
        """Write the pattern over and over."""
        for tensor in out.values():
            go_on()
            flat = tensor.view(-1)
            for part in flat.split(len(self.pattern)):
                part.copy_(self.pattern[: len(part)])

    def materialise(self) -> nn.Module:
        """Give every tensor memory on the CPU."""
        for name, tensor in list(self.module.named_parameters()):
            path, _, leaf = name.rpartition(".")
            real = torch.empty_like(tensor, device="cpu")
            self.fill({name: real}, lambda: None)
            self.module.get_submodule(path).register_parameter(leaf, nn.Parameter(real, requires_grad=False))
        return self.module


class NoWeights:
    """The `Weights` of a model of which only the shapes matter."""

    converted_bytes = 0

    def __init__(self, module: nn.Module):
        self.module = module

    def fill(self, out: Mapping[str, Tensor], go_on: Callable[[], None], readers: object = None) -> None:
        """Leave the memory as it is."""

    def materialise(self) -> nn.Module:
        """Return the module as it is."""
        return self.module


def load(case: Case, weights: type[RandomWeights] | type[NoWeights] = NoWeights) -> Loaded:
    """Return a case's model, the large weights of its blocks stored as it says; nothing takes memory yet."""
    family = case.family
    with META:
        module = family.build(case.config)
    inside = {id(parameter) for block in family.blocks(module) for parameter in block.parameters()}
    for name, parameter in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        stored = (
            FORMATS.get(case.stored, case.dtype) if parameter.dim() == 2 and id(parameter) in inside else case.dtype
        )
        bare = parameter.to(torch.float32 if family.float32(name) else stored)
        module.get_submodule(path).register_parameter(leaf, nn.Parameter(bare, requires_grad=False))
    if case.stored == DFLOAT11:
        for block in family.blocks(module):
            _pack(module, block)
    return Loaded(weights(module.eval()), family.blocks(module))


def _pack(module: nn.Module, block: nn.Module) -> None:
    """Put a block's layers into one DFloat11 group, of the size that it would have."""
    inside = set(block.modules())
    layers = {
        path: tuple(part.weight.shape)
        for path, part in module.named_modules()
        if part in inside and isinstance(part, Linear)
    }
    planes = planes_of(layers)
    count = sum(map(prod, layers.values()))
    stream = int(count * CODE_BITS / 8)
    sections = num_sections(stream)
    sizes = {"encoded_exponent": stream, "output_positions": 4 * (sections + 1), "gaps": 320 * sections}
    found = {name.rpartition(".")[2]: info for name, info in planes.items()}
    found |= {name: TensorInfo("U8", (size,)) for name, size in sizes.items()}
    block.add_module(DFLOAT11, Packed(module, layers, found))
