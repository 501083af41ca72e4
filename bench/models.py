"""Models of the published sizes with random weights, and the scenes that they are measured in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.memory.slab import Loaded
from ..core.planning import Scene, conditioning_of
from ..core.types import Family
from ..qwen_image.config import QwenImageConfig
from ..qwen_image.family import FAMILY as QWEN_IMAGE
from ..wan.config import WanConfig
from ..wan.family import FAMILY as WAN

META = torch.device("meta")
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and what it makes: width, height, frames; rows of text; pictures of 1024 x 1024 that an edit is about."""

    family: Family
    config: Any
    size: tuple[int, int, int]
    rows: int
    references: int = 0

    def scene(self, dtype: torch.dtype = torch.bfloat16) -> Scene:
        """Return the run with a prompt and a negative prompt."""
        latent_format = self.family.latent_format
        width, height, frames = self.size
        references = [latent_format.shape(1, 1, 1024, 1024)] * self.references
        prompts = [conditioning_of(self.rows, self.config.text_dim, references) for _ in range(2)]
        return Scene(
            family=self.family,
            config=self.config,
            latent_shape=latent_format.shape(1, frames, height, width),
            conditionings=tuple(prompts),
            dtype=dtype,
        )


CASES = {
    "Wan-14B 832x480x81": Case(family=WAN, config=WAN_14B, size=(832, 480, 81), rows=512),
    "Wan-14B 1280x720x81": Case(family=WAN, config=WAN_14B, size=(1280, 720, 81), rows=512),
    "Qwen-Image 1328x1328": Case(family=QWEN_IMAGE, config=QwenImageConfig(), size=(1328, 1328, 1), rows=128),
    "Wan-1.3B 832x480x81": Case(family=WAN, config=WAN_1_3B, size=(832, 480, 81), rows=512),
    "Qwen-Image-Edit 1024x1024, 2 references": Case(
        family=QWEN_IMAGE, config=QwenImageConfig(), size=(1024, 1024, 1), rows=512, references=2
    ),
}


class RandomWeights:
    """The `Weights` of a model that was never trained: small numbers, the same in every run."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def fill(self, out: Mapping[str, Tensor], go_on: Callable[[], None]) -> None:
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


def load(case: Case, dtype: torch.dtype = torch.bfloat16) -> Loaded:
    """Return a case's model, stored as it is computed with; nothing takes memory yet."""
    with META:
        module = case.family.build(case.config)
    for name, parameter in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        bare = parameter.to(torch.float32 if case.family.float32(name) else dtype)
        module.get_submodule(path).register_parameter(leaf, nn.Parameter(bare, requires_grad=False))
    return Loaded(RandomWeights(module.eval()), module.get_submodule(case.family.blocks))
