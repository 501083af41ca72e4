"""Models in DFloat11, each with its twin in bf16: what the one gives, the other must give bit for bit."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from wanqwen.core.weights.compress import Compressed, compress
from wanqwen.core.weights.reader import open_checkpoint, read_tensors
from wanqwen.loading import DEMO_FOLDER


def write_bf16(source: Path, path: Path) -> Path:
    """Write a checkpoint with its matrices in bf16 and everything else as it is; of scaled ones the scales are lost."""
    checkpoint, state = open_checkpoint(source), {}
    for name, tensor in read_tensors(checkpoint, checkpoint.tensors):
        if not name.endswith(("scale_weight", "weight_scale", "scaled_fp8")):
            is_matrix = tensor.dim() == 2 and tensor.is_floating_point()
            state[name] = (tensor.float().bfloat16() if is_matrix else tensor).clone()
    save_file(state, path, dict(checkpoint.metadata))
    return path


def write_pair(source: str | Path, folder: Path, out: str = "dfloat11.safetensors") -> tuple[Path, Compressed]:
    """Write a model, given by its file or the name of a miniature, in bf16, and that as DFloat11."""
    source = DEMO_FOLDER / f"{source}.safetensors" if isinstance(source, str) else source
    plain = write_bf16(source, folder / "bf16.safetensors")
    return plain, compress(open_checkpoint(plain), folder / out, threads=1)


def words(tensor: Tensor) -> Tensor:
    """Return a bf16 tensor as the numbers of its bits."""
    return tensor.contiguous().view(torch.int16)
