"""Models in DFloat11, each with its twin in bf16: what the one gives, the other must give bit for bit."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from wanqwen.conversion import convert
from wanqwen.core.weights.convert import Wish
from wanqwen.core.weights.reader import open_checkpoint, read_header
from wanqwen.core.weights.tensors import read_tensors
from wanqwen.loading import DEMO_FOLDER

from .manifests import write_header


def write_bf16(source: Path, path: Path) -> Path:
    """Write a checkpoint with its matrices in bf16 and everything else as it is; of scaled ones the scales are lost."""
    checkpoint, state = open_checkpoint(source), {}
    for name, tensor in read_tensors(checkpoint, checkpoint.tensors):
        if not name.endswith(("scale_weight", "weight_scale", "scaled_fp8")):
            is_matrix = tensor.dim() == 2 and tensor.is_floating_point()
            state[name] = (tensor.float().bfloat16() if is_matrix else tensor).clone()
    save_file(state, path, dict(checkpoint.metadata))
    return path


def write_dfloat11(source: Path, out: Path, **wish: Any) -> Path:
    """Convert a model, and return the new file."""
    said: list[str] = []
    return convert(source, out, Wish(target="dfloat11", **wish), said.append)


def write_pair(source: str | Path, folder: Path) -> tuple[Path, Path]:
    """Write a model, given by its file or the name of a miniature, in bf16, and that as DFloat11 in a folder."""
    source = DEMO_FOLDER / f"{source}.safetensors" if isinstance(source, str) else source
    plain, out = write_bf16(source, folder / "bf16.safetensors"), folder / "df11"
    out.mkdir()
    return plain, write_dfloat11(plain, out / "model.safetensors")


def words(tensor: Tensor) -> Tensor:
    """Return a bf16 tensor as the numbers of its bits."""
    return tensor.contiguous().view(torch.int16)


def write_published(path: Path, tensors: dict, layers: list[str]) -> Path:
    """Write a published file with holes for weights, but with the true places at which its groups are divided."""
    write_header(path, tensors)
    found = {name: info.start for name, info in read_header(path)[0].items() if name.endswith(".split_positions")}
    with open(path, "r+b") as file:
        for name, start in found.items():
            block = name.removesuffix("split_positions")
            total = tensors[f"{block}sign_mantissa"][1][0]
            biases = [tensors[f"{block}{layer}.bias"][1][0] for layer in layers]
            inputs = inputs_of(layers, biases)
            sizes = torch.tensor([o * i for o, i in zip(biases, inputs, strict=True)])
            assert int(sizes.sum()) == total, "the manifest is of this architecture"
            file.seek(start)
            file.write(sizes.cumsum(0)[:-1].numpy().tobytes())
    return path


def inputs_of(layers: list[str], biases: list[int]) -> list[int]:
    """Return how many inputs each layer has: the model's width, but those of the last layers of feed-forwards."""
    width, wide = biases[layers.index(next(x for x in layers if x.endswith("to_q")))], max(biases)
    ffn = biases[layers.index(next(x for x in layers if x.endswith("net.0.proj")))]
    assert wide >= ffn
    return [ffn if layer.endswith("net.2") else width for layer in layers]
