"""Bytes come from the file as they lie there, whatever the pieces they are read in."""

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from wanqwen.core.weights import ranges
from wanqwen.core.weights.ranges import Range, read_ranges


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(random.Random(0).randbytes(10_000))
    return path


@pytest.fixture(params=["scattered", "plain"])
def _calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":  # as on Windows
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no scattered reads")


@pytest.mark.usefixtures("_calls")
@pytest.mark.parametrize("piece", [7, 64, 100_000])
def test_any_ranges_in_any_order(file: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE", piece)
    monkeypatch.setattr(ranges, "MAX_PARTS", 3)
    content, rng = file.read_bytes(), random.Random(piece)
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, 5000), 9))
        spans = [(2 * a, 2 * b) for a, b in zip([0, *cuts], cuts, strict=False)]
        rng.shuffle(spans)
        chosen = spans[: rng.randint(1, 9)]
        outs = [torch.zeros((b - a) // 2, dtype=torch.int16) for a, b in chosen]
        read_ranges(Range(file=file, start=a, name="x", out=out) for (a, _), out in zip(chosen, outs, strict=True))
        for (a, b), out in zip(chosen, outs, strict=True):
            assert bytes(out.view(torch.uint8).tolist()) == content[a:b]


def test_threads_share_the_work_and_none_stays(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    both, original, threads = Barrier(3, timeout=20), ranges._read, set()

    def read(*given: object) -> None:
        if threading.current_thread() not in threads:
            threads.add(threading.current_thread())
            both.wait()  # passes only when three are here at once
        original(*given)

    monkeypatch.setattr(ranges, "_read", read)
    if not hasattr(os, "preadv"):
        pytest.skip("one thread reads on this system")
    out = torch.zeros(10_000, dtype=torch.uint8)
    read_ranges([Range(file=file, start=0, name="x", out=out)])
    assert bytes(out.tolist()) == file.read_bytes()
    helpers = threads - {threading.current_thread()}
    assert len(helpers) == 2 and not any(thread.is_alive() for thread in helpers)


def test_an_error_of_a_helper_stops_all_and_nobody_waits_for_one_that_comes_too_late(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "preadv"):
        pytest.skip("one thread reads on this system")
    monkeypatch.setattr(ranges, "PIECE", 10)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    here, failed, original, calls = threading.current_thread(), threading.Event(), ranges._read, []

    def read(*given: object) -> None:
        calls.append(threading.current_thread())
        if calls[-1] is not here:
            failed.set()
            raise OSError(5, "Input/output error")
        assert failed.wait(20)
        original(*given)

    wanted = Range(file=file, start=0, name="x", out=torch.zeros(10_000, dtype=torch.uint8))
    with ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            patch.setattr(ranges, "_read", read)
            read_ranges([wanted], pool=pool)
        assert len(calls) < 1000
        busy = threading.Event()
        pool.submit(busy.wait, 20)
        read_ranges([wanted], pool=pool)
        assert not busy.is_set() and bytes(wanted.out.tolist()) == file.read_bytes()
        busy.set()


def test_neighbours_are_read_in_one_call(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], ranges._read_once
    monkeypatch.setattr(ranges, "_read_once", lambda *a: calls.append(1) or original(*a))
    outs = [torch.zeros(100, dtype=torch.uint8) for _ in range(6)]
    starts = [0, 100, 200, 5000, 5100, 300]
    read_ranges(Range(file=file, start=s, name="x", out=o) for s, o in zip(starts, outs, strict=True))
    assert len(calls) == 2


@pytest.mark.usefixtures("_calls")
def test_a_file_that_ends_early_is_named(file: Path) -> None:
    wanted = Range(file=file, start=9_000, name="blocks.3.weight", out=torch.zeros(2000, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"bytes ends at byte 10000, in the middle of blocks\.3\.weight.*Download"):
        read_ranges([wanted])


def test_scalars_and_empty_tensors(file: Path) -> None:
    scalar, empty = torch.zeros((), dtype=torch.float32), torch.zeros(0)
    read_ranges([Range(file=file, start=8, name="a", out=scalar), Range(file=file, start=12, name="b", out=empty)])
    assert bytes(scalar.view(1).view(torch.uint8).tolist()) == file.read_bytes()[8:12]


def test_a_stop_is_asked_for_between_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE", 10)
    out, asked = torch.zeros(1000, dtype=torch.uint8), []

    def stop() -> None:
        asked.append(1)
        if len(asked) == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        read_ranges([Range(file=file, start=0, name="x", out=out)], stop)
    assert int((out != 0).nonzero().max()) < 30
