"""The numbers of the card in RAM: what its kernels would compute, in the order in which the streams work.

PyTorch's operations on CUDA tensors run as they are, with its own allocator, streams and events, on kernels that do
nothing (`cuda_in_ram.c`). Beside each of them, the stream that it runs on is given a call that computes it from the
same memory with PyTorch's operation for CPUs, when its turn comes: late, early, between copies, as the card likes.
"""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
# Nothing to compute: no numbers are made or read.
EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
         aten.detach_.default}  # fmt: skip
COPIES = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.copy_.default}
# Of these the answer is a number, or a shape that depends on numbers: who asks waits for it.
ASKED = {aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.is_nonzero.default,
         aten.nonzero.default, aten.masked_select.default, aten.repeat_interleave.Tensor,
         aten.repeat_interleave.self_Tensor, aten.unique_consecutive.default, aten._unique2.default}  # fmt: skip
# cuDNN is not there to be launched: the memory of the result is taken, and the CPU computes it as it does all else.
UNLAUNCHED = {"convolution", "_convolution", "conv1d", "conv2d", "conv3d", "cudnn_convolution"}
ATTENTION = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
             "_scaled_dot_product_cudnn_attention"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Memory:
    """A tensor on the card, as what lies where; it holds nothing."""

    address: int
    nbytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Memory":
        storage = tensor.untyped_storage()
        where = storage.data_ptr(), storage.nbytes()
        return cls(*where, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def tensor(self) -> Tensor:
        """Return it as a tensor of the CPU."""
        if not self.nbytes:
            return torch.empty(self.size, dtype=self.dtype)
        there = (ctypes.c_byte * self.nbytes).from_address(self.address)
        usable = self.nbytes // self.dtype.itemsize * self.dtype.itemsize
        flat = torch.frombuffer(there, dtype=torch.uint8)[:usable].view(self.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)


class CardInRam(TorchDispatchMode):
    """Compute, while active on this thread, what is asked of CUDA. `check` raises what went wrong on the card."""

    def __init__(self) -> None:
        super().__init__()
        self.card = ctypes.CDLL("libcuda.so.1")
        self.is_hollow = bool(self.card.card_is_hollow())
        self.errors: list[BaseException] = []
        self._calls: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._carry_out)

    def count(self, name: str) -> int:
        """Return what the function `count` does."""
        return count(name)

    def fails(self, function: str, nth: int, error: int) -> None:
        """Let the nth call from now of a function of CUDA fail."""
        self.card.card_fails(function.encode(), ctypes.c_long(nth), error)

    def check(self) -> None:
        """Wait for the card, and raise what went wrong in its calls."""
        torch.cuda.synchronize()
        if self.errors:
            raise self.errors[0]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        on_card = any(tensor.is_cuda for tensor in given)
        if not on_card and not _is_cuda(kwargs.get("device")) and func not in COPIES:
            return func(*args, **kwargs)
        if func in EMPTY:
            return func(*args, **kwargs)
        if func in ASKED or (func is aten.index.Tensor and any(_is_mask(index) for index in args[1])):
            return self._ask(func, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        if self.is_hollow:
            return _unlaunched(func, args, kwargs) if name in UNLAUNCHED else func(*args, **kwargs)
        if func in COPIES and (moved := self._move(func, args, kwargs)) is not None:
            return moved
        if func in COPIES and not on_card:
            return func(*args, **kwargs)
        inputs = tree_map(_as_the_cpu_has_it, (args, kwargs))
        out = _unlaunched(func, args, kwargs) if name in UNLAUNCHED else func(*args, **kwargs)
        self._give(func, name, inputs, {tensor.untyped_storage().data_ptr() for tensor in given}, out)
        return out

    def _give(self, func: Callable[..., Any], name: str, inputs: Any, known: set[int], out: Any) -> None:
        """Give the current stream the call that computes what an operation returned or wrote."""
        written = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        results = [Memory.of(leaf) if _on_card(leaf) else None for leaf in tree_flatten(out)[0]]
        fresh = [None if memory is None or memory.address in known else memory for memory in results]
        if not written and not any(fresh):
            return  # a view

        def call() -> None:
            args, kwargs = tree_map(lambda leaf: leaf.tensor() if isinstance(leaf, Memory) else leaf, inputs)
            made = _attention(name, args, kwargs) if name in ATTENTION else func(*args, **kwargs)
            for memory, result in zip(fresh, tree_flatten(made)[0], strict=False):
                if memory is not None and isinstance(result, Tensor):
                    memory.tensor().copy_(result)

        self.on_stream(call)

    def on_stream(self, call: Callable[[], None]) -> None:
        """Let the current stream make a call when its turn comes."""
        number = next(self._numbers)
        self._calls[number] = call
        stream = torch.cuda.current_stream().cuda_stream
        self.card.card_call(ctypes.c_void_p(stream), self._run, ctypes.c_void_p(number))

    def _carry_out(self, number: int) -> None:
        try:
            with torch.no_grad():
                self._calls.pop(number)()
        except BaseException as error:
            self.errors.append(error)

    def _ask(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        torch.cuda.current_stream().synchronize()
        if self.is_hollow:
            return True  # all is as it should be
        args, kwargs = tree_map(lambda leaf: Memory.of(leaf).tensor() if _on_card(leaf) else leaf, (args, kwargs))
        answer = func(*args, **kwargs)
        return tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, Tensor) else leaf, answer)

    def _move(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Copy between card and CPU; what has another dtype or order is made alike first. None for other copies."""
        if func is aten.copy_.default:
            target, source = args[:2]
            if target.is_cuda == source.is_cuda:
                return None
            if target.dtype == source.dtype and _lie_alike(target, source):
                return func(*args, **kwargs)
            with self:
                if target.shape != source.shape:
                    source = source.expand(target.shape)
                moved = source.to(target.dtype).contiguous().to(target.device)
                return target.copy_(moved)
        source = args[0]
        device = kwargs.get("device")
        device = source.device if device is None else torch.device(device)
        if func is aten.to.other:
            device = args[1].device
        if func is aten.to.device:
            device = torch.device(args[1])
        if device.type == source.device.type:
            return None
        dtype = kwargs.get("dtype")
        if func is aten.to.device:
            dtype = args[2]
        with self:
            ready = source if dtype is None else source.to(dtype)
            ready = ready if _is_dense(ready) else ready.contiguous()
        keeps = bool(kwargs.get("non_blocking", False))
        return aten._to_copy.default(ready, device=device, non_blocking=keeps)


def count(name: str) -> int:
    """Return how much or how many of something there is, or has been, on the card: a name in `cuda_in_ram.c`."""
    card = ctypes.CDLL("libcuda.so.1")
    card.card_count.restype = ctypes.c_size_t
    found = card.card_count(name.encode())
    if found == ctypes.c_size_t(-1).value:
        raise KeyError(name)
    return found


def forget_most() -> None:
    """Begin to watch anew how much is registered at the most."""
    ctypes.CDLL("libcuda.so.1").card_forget_most()


@contextmanager
def card_in_ram(*, copies: int = 0, calls: int = 0) -> Iterator[CardInRam]:
    """Compute on the card; its copies and calls take up to so many microseconds more. Raises what went wrong there."""
    with CardInRam() as card:
        card.card.card_delays(copies, calls)
        try:
            yield card
            card.check()
        finally:
            card.card.card_delays(0, 0)
            torch.cuda.synchronize()


def _as_the_cpu_has_it(leaf: Any) -> Any:
    """Return what stands for an argument when the card computes: memory for a tensor, the CPU for the card."""
    if _on_card(leaf):
        return Memory.of(leaf)
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _on_card(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cuda


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    """Say whether one copy of bytes makes one of the other."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    if one.shape != other.shape or any(a != b for size, a, b in strides if size > 1):
        return False
    return _is_dense(one)


def _is_dense(tensor: Tensor) -> bool:
    end = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != end:
            return False
        end *= size
    return True


def _unlaunched(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what cuDNN would write a convolution's result to: channels last where those of the input or weight are."""
    bare = tree_map(lambda leaf: _bare(leaf, "meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    out, last = func(*bare[0], **bare[1]), {4: torch.channels_last, 5: torch.channels_last_3d}
    is_last = any(tensor.shape[1] > 1 and tensor.stride(1) == 1 for tensor in args[:2])
    order = last[out.dim()] if is_last and out.dim() in last else torch.contiguous_format
    return torch.empty(out.shape, dtype=out.dtype, device="cuda", memory_format=order)


def _bare(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _attention(name: str, args: Any, kwargs: Any) -> tuple[Tensor]:
    q, k, v = args[:3]
    bias = args[3] if "efficient" in name or "cudnn" in name else None
    return (torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=kwargs.get("scale")),)
