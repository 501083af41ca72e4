"""What a computation holds in memory at its fullest: every tensor that it makes is counted as long as it lives."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count, while active, the bytes of the tensors made since: `live` now and `peak` at the fullest moment.

    Views share their bytes, and what was there before is not counted. Works on any device; on the meta device nothing
    is computed, so that sizes far beyond this machine's memory are counted in a moment. What an operation takes only
    while it runs, inside its kernel, is not seen. Run under `torch.no_grad`: inference mode hides composite
    operations' own tensors.
    """

    def __init__(self, device: torch.device | None = None):
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._known: dict[int, int] = {}  # storage -> bytes counted for it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch.compile's machinery is imported, which takes seconds, and asked at every operation

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, counted=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._meet(tensor, counted=True)
        return result

    def _meet(self, tensor: Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        elsewhere = self.device is not None and tensor.device.type != self.device.type
        self._known[key] = 0 if elsewhere or not counted else storage.nbytes()
        weakref.finalize(storage, self._forget, key).atexit = False
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


def peak_bytes(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """Return the most bytes that the tensors made by a call, its result among them, ever take together.

    With `device` only those on devices of its kind are counted.
    """
    with torch.no_grad(), LiveBytes(device) as counted:
        result = call()
        del result
    return counted.peak


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
