"""LoRAs on a model for the length of a run: their tensors on the device, bound to the layers that they change."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from .. import host
from ..ops.change import Change, Dense, Difference, Hadamard, Kronecker, LowRank, changed
from ..ops.formats import DTYPES
from ..ops.linear import Linear
from ..storage import DTYPE_BYTES
from ..types import Lora
from .lora import BESIDE, WEIGHT, scale_of
from .reader import check_unchanged
from .tensors import read_tensors


class Adapters:
    """The LoRAs of a run, a `BlockHook`. Those that work in a step are bound to the model, the others are not.

    They are bound to the module as its weights on the device are, because a table in `Run` would have to reach every
    layer of every model; one run at a time has the module, and `close` leaves nothing of it. The weights of a `Linear`
    are changed by the layer itself. All other parameters are small: a changed copy takes their place, in a block as
    long as the block runs, since the next visit may find its weights elsewhere. `folded` ones have their strength in
    their tensors, so that another strength is no other program for torch.compile.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        loras: Sequence[Lora],
        dtype: torch.dtype,
        device: torch.device,
        folded: bool = False,
    ):
        self._folded = folded
        self._module, self._loras, self._dtype, self._device = module, tuple(loras), dtype, device
        self._block_of = {id(part): i for i, block in enumerate(blocks) for part in block.modules()}
        self._changes: tuple[Mapping[str, Change], ...] = ()  # of each LoRA, read when the first one begins to work
        self._active: tuple[int, ...] = ()
        self._changed: list[Linear] = []
        self._in_block: dict[int, list[_Copy]] = {}
        self._outside: list[_Copy] = []

    @property
    def nbytes(self) -> int:
        """How many bytes the LoRAs take on the device now."""
        return sum(device_bytes(lora, self._dtype) for lora in self._loras) if self._changes else 0

    def turn_to(self, step: int, steps: int) -> bool:
        """Bind the LoRAs that work in a step of so many; say whether that changes the model.

        Raises ValueError or OSError where a file can't be read.
        """
        active = tuple(i for i, lora in enumerate(self._loras) if lora.is_active(step, steps))
        if active == self._active:
            return False
        if not self._changes:
            self._changes = tuple(self._read(lora) for lora in self._loras)
        self._unbind()
        self._active = ()  # should memory run out here, the next call begins anew
        self._bind([self._changes[i] for i in active])
        self._active = active
        return True

    def _read(self, lora: Lora) -> Mapping[str, Change]:
        changes = read_changes(lora, self._dtype, self._device)
        return {name: change.folded for name, change in changes.items()} if self._folded else changes

    def before(self, i: int) -> None:
        """Change what is not the weight of a `Linear` in block i, whose weights are there."""
        for copy in self._in_block.get(i, ()):
            copy.put()

    def after(self, i: int) -> None:
        """Leave block i as it was."""
        for copy in self._in_block.get(i, ()):
            copy.take_away()

    def leave_blocks(self) -> None:
        """Leave all blocks as they were, after a pass that broke off in one: its changed copies hold its weights."""
        for i in self._in_block:
            self.after(i)

    def close(self) -> None:
        """Leave the model as it was, and let go of all that is on the device; also after an error."""
        self._unbind()
        self._changes, self._active = (), ()

    def _bind(self, loras: Iterable[Mapping[str, Change]]) -> None:
        by_name: dict[str, list[Change]] = {}
        for changes in loras:
            for name, change in changes.items():
                by_name.setdefault(name, []).append(change)
        present = dict(self._module.named_modules())
        for name, changes in by_name.items():
            path, _, leaf = name.rpartition(".")
            owner = present.get(path)
            if owner is None or leaf not in owner._parameters:
                continue  # a model made shallow, for planning
            if isinstance(owner, Linear) and leaf == WEIGHT:  # which need not be there yet
                owner.changes = tuple(changes)
                self._changed.append(owner)
            elif (i := self._block_of.get(id(owner))) is not None:
                self._in_block.setdefault(i, []).append(_Copy(owner._parameters, leaf, changes))
            else:
                self._outside.append(_Copy(owner._parameters, leaf, changes))
        for copy in self._outside:
            copy.put()

    def _unbind(self) -> None:
        for layer in self._changed:
            layer.changes = ()
        for copy in (*self._outside, *(copy for copies in self._in_block.values() for copy in copies)):
            copy.take_away()
        self._changed, self._outside, self._in_block = [], [], {}


class _Copy:
    """A changed copy of a parameter, in float32, that takes its place for a while."""

    def __init__(self, table: dict[str, nn.Parameter | None], key: str, changes: Sequence[Change]):
        self.table, self.key, self.changes = table, key, changes
        self.rest: nn.Parameter | None = None
        self.made: nn.Parameter | None = None

    def put(self) -> None:
        self.rest = self.table[self.key]
        out = torch.empty_like(self.rest, dtype=torch.float32)
        self.made = nn.Parameter(changed(self.rest, self.changes, out), requires_grad=False)
        self.table[self.key] = self.made

    def take_away(self) -> None:
        # What has been bound meanwhile, by a plan that changed, stays.
        if self.made is not None and self.table[self.key] is self.made:
            self.table[self.key] = self.rest
        self.rest = self.made = None


def read_changes(lora: Lora, dtype: torch.dtype, device: torch.device) -> dict[str, Change]:
    """Return a LoRA's changes on a device, for products in `dtype`, by the parameter that they are of.

    On the meta device they have no content, and nothing is read. Raises ValueError or OSError for a file that can't be
    read or is another one by now, and what ComfyUI does when the user stops the run.
    """
    names, infos = [name for tensors in lora.parts.values() for name in tensors.values()], lora.checkpoint.tensors
    if device.type == "meta":
        found = {n: torch.empty(infos[n].shape, dtype=DTYPES[infos[n].dtype], device=device) for n in names}
    else:
        check_unchanged(lora.checkpoint)
        found = dict(read_tensors(lora.checkpoint, names))
    changes = {}
    for parameter, tensors in lora.parts.items():
        host.check_interrupt()
        kept = {role: _kept(found[name], dtype, device) for role, name in tensors.items() if role not in BESIDE}
        difference = _difference(kept)
        rank, alpha = _rank(difference), tensors.get("alpha")
        stated = None if alpha is None or found[alpha].is_meta else float(found[alpha])
        changes[parameter] = Change(
            difference=difference,
            scale=1.0 if rank is None else scale_of(lora.checkpoint, rank, stated, min(tensors.values())),
            strength=lora.strength,
            magnitude=_magnitude(found[tensors["magnitude"]].to(device)) if "magnitude" in tensors else None,
        )
    return changes


def device_bytes(lora: Lora, dtype: torch.dtype) -> int:
    """Return how many bytes a LoRA takes on the device, for products in `dtype`."""
    infos = lora.checkpoint.tensors
    return sum(
        prod(infos[name].shape) * _kept_itemsize(infos[name].shape, DTYPE_BYTES[infos[name].dtype], dtype)
        for tensors in lora.parts.values()
        for role, name in tensors.items()
        if role not in BESIDE
    )


def _kept(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor on the device."""
    stored = tensor.dtype
    is_kept = _kept_itemsize(tensor.shape, stored.itemsize, dtype) == stored.itemsize
    return tensor.to(device, stored if is_kept else dtype)


def _kept_itemsize(shape: Sequence[int], stored: int, dtype: torch.dtype) -> int:
    """Return the bytes of each number on the device: for matrices no more than `dtype` has.

    What changes biases, norms and modulations is small, and most of those stay in float32 themselves.
    """
    return min(stored, dtype.itemsize) if len(shape) > 1 and shape[0] > 1 else stored


def _magnitude(tensor: Tensor) -> Tensor:
    """Return [O, 1] or [1, I] of magnitudes per row, which may have one axis, or per input."""
    return tensor.float().reshape(len(tensor), -1)


def _difference(kept: Mapping[str, Tensor]) -> Difference:
    if "diff" in kept:
        return Dense(kept["diff"].reshape(len(kept["diff"]), -1))
    if "down" in kept:
        return _pair(kept["up"], kept["down"])
    if "w1_a" in kept:
        return Hadamard(_pair(kept["w1_a"], kept["w1_b"]), _pair(kept["w2_a"], kept["w2_b"]))
    return Kronecker(_matrix(kept, "kw1"), _matrix(kept, "kw2"))


def _matrix(kept: Mapping[str, Tensor], role: str) -> LowRank | Dense:
    return Dense(kept[role]) if role in kept else _pair(kept[f"{role}_a"], kept[f"{role}_b"])


def _pair(up: Tensor, down: Tensor) -> LowRank:
    return LowRank(down.flatten(1), up.flatten(1))


def _rank(difference: Difference) -> int | None:
    """Return the rank that alpha is stated for, None where nothing has one."""
    if isinstance(difference, LowRank):
        return difference.down.shape[0]
    if isinstance(difference, Hadamard):
        return _rank(difference.first)
    if isinstance(difference, Kronecker):
        inner = _rank(difference.inner)
        return _rank(difference.outer) if inner is None else inner
    return None
