"""A small model with weights of every kind that a slab must carry, in memory and in a file."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from wanqwen.core.blocks import Run, run_blocks
from wanqwen.core.memory.slab import Loaded
from wanqwen.core.ops.linear import Linear
from wanqwen.core.weights.assemble import prepare
from wanqwen.core.weights.reader import open_checkpoint

WIDTH, DEPTH = 24, 7


class Block(nn.Module):
    """A norm in float32, a linear layer in bfloat16 or scaled fp8."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(WIDTH))
        self.linear = Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x * self.norm)


class Model(nn.Module):
    """Blocks with something before them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))


class InMemory:
    """The `Weights` of a module that has its tensors already."""

    converted_bytes = 0

    def __init__(self, module: nn.Module):
        self.module = module

    def fill(self, out: Mapping[str, Tensor], go_on: Callable[[], None], readers: object = None) -> None:
        """Write the tensors of these names."""
        state = self.module.state_dict(keep_vars=True)
        for name, target in out.items():
            go_on()
            target.copy_(state[name])

    def materialise(self) -> nn.Module:
        """Return the module as it is."""
        return self.module


def write(path: Path) -> Path:
    """Write the model's file: odd blocks in fp8 with a scale for each row, even ones in float16; norms in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, empty in Model().state_dict().items():
        tensor = torch.randn(empty.shape, generator=generator) / WIDTH**0.5
        if "norm" in name:
            tensor = tensor.bfloat16()
        elif name.endswith("linear.weight") and int(name.split(".")[1]) % 2:
            tensor = tensor.to(torch.float8_e4m3fn)
            scale = torch.rand(WIDTH, generator=generator) + 0.5
            state[name.replace("weight", "weight_scale")] = scale
        elif name.endswith("linear.weight"):
            tensor = tensor.half()
        state[name] = tensor
    save_file(state, path)
    return path


def from_file(path: Path) -> Loaded:
    """Return the model as its file has it, nothing read yet; it computes in bfloat16."""
    checkpoint = open_checkpoint(path)
    names = {name: name for name in checkpoint.tensors}
    weights = prepare(Model, names, checkpoint, float32=lambda name: "norm" in name, dtype=torch.bfloat16)
    return Loaded(weights, weights.module.blocks)


def in_memory(path: Path) -> Loaded:
    """Return the model with its tensors in RAM."""
    module = from_file(path).weights.materialise()
    return Loaded(InMemory(module), module.blocks)


KINDS: dict[str, Callable[[Path], Loaded]] = {"file": from_file, "memory": in_memory}


def forward(blocks: nn.ModuleList, x: Tensor, hooks: list) -> Tensor:
    """Run the blocks."""
    return run_blocks(blocks, x, lambda i, block, state: block(state), run=Run(hooks=hooks))


def inputs(count: int = 4) -> Tensor:
    """Return what to run the blocks on."""
    return torch.randn(count, 3, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()


def is_at_rest(loaded: Loaded, rest: dict[str, int]) -> bool:
    """Say whether every tensor of the module is the very one that was registered before."""
    return tensors_of(loaded) == rest


def tensors_of(loaded: Loaded) -> dict[str, int]:
    """Return the identity of every tensor of the module."""
    module = loaded.module
    return {name: id(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
