"""Layers whose weights are stored together, and are theirs only while they are needed."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from ..dfloat11 import PLANES
from ..types import TensorInfo
from .dfloat11 import Decode
from .linear import Linear


class Packed(nn.Module):
    """The weights of several layers as one DFloat11 group. Its planes are buffers, which travel as all weights do.

    The layers have no weights, but between `unpack` and `leave`. `layers` maps their paths in `root` to the shapes of
    their weights, in the order of the stream; `planes` gives the sizes of the planes, which are on the meta device.
    """

    def __init__(self, root: nn.Module, layers: Mapping[str, tuple[int, ...]], planes: Mapping[str, TensorInfo]):
        super().__init__()
        self.layers, self.planes = dict(layers), dict(planes)
        self._owners = tuple(root.get_submodule(path) for path in layers)  # in a tuple they are no submodules
        self.count = sum(map(prod, layers.values()))
        for name in PLANES:
            self.register_buffer(name, torch.empty(planes[name].shape, dtype=torch.uint8, device="meta"))
        self.leave()

    @property
    def num_foreign(self) -> int:
        """How many of its weights are of layers that are not of ours, and take them in one dtype only."""
        layers = zip(self._owners, self.layers.values(), strict=True)
        return sum(prod(shape) for layer, shape in layers if not isinstance(layer, Linear))

    def unpack(self, out: Tensor, dtype: torch.dtype, decode: Decode) -> None:
        """Give the layers their weights, which lie in `out` [count] then; layers not of ours take them in `dtype`."""
        decode(*(self._buffers[name] for name in PLANES), out)
        parts = out.split([prod(shape) for shape in self.layers.values()])
        for layer, part, shape in zip(self._owners, parts, self.layers.values(), strict=True):
            weight = part.view(shape) if isinstance(layer, Linear) else part.view(shape).to(dtype)
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def leave(self) -> None:
        """Take the weights from the layers."""
        for layer in self._owners:
            layer._parameters["weight"] = None
