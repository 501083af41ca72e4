from math import inf
from pathlib import Path

import torch
from wanqwen.core.memory import kept
from wanqwen.core.memory.pinned import HostBuffer
from wanqwen.core.memory.resident import placed

from .toy import from_file

CPU = torch.device("cpu")


class Keeper:
    """Keeps ten bytes, or as many as it is told."""

    def __init__(self, nbytes: int = 10) -> None:
        self.kept_bytes, self.is_in_use = nbytes, False
        kept.remember(self)

    def let_go(self, nbytes: float = inf) -> None:
        self.kept_bytes = max(0, self.kept_bytes - nbytes)


def test_what_is_in_use_is_neither_counted_nor_taken() -> None:
    kept.release_idle()
    before = kept.idle_bytes()
    one, two, three = Keeper(), Keeper(), Keeper()
    two.is_in_use = True
    assert kept.idle_bytes() - before == 20 and kept.idle_bytes(but=one) - before == 10
    kept.release_idle(but=three)
    assert [keeper.kept_bytes for keeper in (one, two, three)] == [0, 10, 10]
    del two, three
    assert kept.idle_bytes() - before == 0


def test_as_many_bytes_are_given_as_are_wanted_by_the_largest_first() -> None:
    kept.release_idle()
    small, large, busy = Keeper(10), Keeper(100), Keeper(1000)
    busy.is_in_use = True
    for wanted, given, left in (
        (0, 0, (10, 100)),
        (-5, 0, (10, 100)),
        (30, 30, (10, 70)),
        (75, 75, (5, 0)),
        (9, 5, (0, 0)),
    ):
        assert kept.release_idle(nbytes=wanted) == given
        assert (small.kept_bytes, large.kept_bytes, busy.kept_bytes) == (*left, 1000)


def test_slabs_are_let_go_one_by_one(path: Path) -> None:
    loaded = from_file(path)
    loaded.masters = {block: HostBuffer(100) for block in range(3)}
    size = loaded.masters[0].bytes.numel()
    loaded.let_go(size + 1)
    assert set(loaded.masters) == {0} and loaded.kept_bytes == size
    loaded.let_go(0)
    assert loaded.kept_bytes == size
    loaded.let_go()
    assert loaded.kept_bytes == 0


def test_weights_in_ram_are_let_go_and_come_again(path: Path) -> None:
    """Only what is not stored as it is wanted takes RAM of its own; the rest is the file's, memory-mapped."""
    loaded = from_file(path)
    bare = {name: id(tensor) for name, tensor in loaded.module.named_parameters()}
    assert loaded.kept_bytes == 0
    with placed(loaded, CPU, lambda: 1 / 0):
        first = {name: tensor.clone() for name, tensor in loaded.module.named_parameters()}
    owned = loaded.weights.converted_bytes
    assert loaded.kept_bytes == owned
    assert 0 < owned < sum(tensor.nbytes for tensor in first.values())
    loaded.let_go()
    assert {name: id(tensor) for name, tensor in loaded.module.named_parameters()} == bare and loaded.kept_bytes == 0
    with placed(loaded, CPU, lambda: 1 / 0):
        assert all(torch.equal(tensor, first[name]) for name, tensor in loaded.module.named_parameters())
