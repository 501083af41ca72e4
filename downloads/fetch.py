"""Fetching: look at what is there, ask the hub, check the room, then file after file, each checked before it counts.

All of that runs in a thread of its own. The caller's thread only looks on, several times a second, so that a stop
takes effect at once even where a server has gone silent.
"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from . import hub
from .catalog import PublishedFile
from .files import (
    Found,
    Places,
    Record,
    check_space,
    disks,
    gigabytes,
    is_disk_full,
    lock_of,
    part_of,
    read_record,
    survey,
    write_record,
)

LOOK_SECONDS = 0.1
PACE_SECONDS = 5.0  # the speed shown is the mean of so many
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before another try, as long as not a byte comes between
QUESTION_SECONDS, CONTENT_SECONDS = 10.0, 60.0  # how long to try; some versions of huggingface_hub try by themselves
LONGEST_PAUSE = 60.0  # seconds that a server may ask for
READ_BYTES = 1 << 20
AGAIN = "What has come so far is kept: the same again goes on from there."

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a download is, in bytes; `text` says it to people."""

    done: int
    total: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What there is to say of one file, in a line, and its path if it is there."""

    line: str
    path: Path | None = None


Watch = Callable[[Progress], None]  # told several times a second, from the thread that called; what it raises stops


def fetch(
    files: Iterable[PublishedFile],
    places: Places,
    watch: Watch,
    *,
    revision: str | None = None,
    check: bool = False,
    endpoint: str | None = None,
) -> list[Outcome]:
    """Fetch what is missing of some files and return what was done.

    A file that is there, by its size, is not fetched again; with `check` its sha256 is compared too. `revision`, a
    branch, tag or commit, is taken instead of the catalog's, and then the hub alone says what the files are. `endpoint`
    is the hub's address. Raises ValueError, before anything is fetched if that can be known, and what `watch` raises;
    what has come by then is used the next time.
    """
    gauge = _Gauge()
    wanted = list(dict.fromkeys(files))
    return _watched(lambda: _fetch(wanted, places, gauge, revision, check, endpoint), gauge, watch)


def look(
    files: Iterable[PublishedFile], places: Places, watch: Watch, *, check: bool = False, endpoint: str | None = None
) -> list[Outcome]:
    """Fetch nothing, and return what is there of some files, what would be fetched, and what room there is.

    With `check` the sha256 of what is there is compared. Raises as `fetch` does.
    """
    gauge = _Gauge()
    found = survey(dict.fromkeys(files), places)
    present = [item for item in found if item.present]
    missing = [item for item in found if not item.present]
    if check:
        _watched(lambda: _check(present, endpoint, gauge), gauge, watch)
    outcomes = [_is_there(item, check) for item in present]
    for item in missing:
        begun = f", of which {gigabytes(item.have)} have come" if item.have else ""
        known = "known" if item.file.sha256 else "as the hub says"
        source = f"{item.file.repo} at {item.file.revision}, sha256 {known}"
        line = f"{item.label}: to fetch, {gigabytes(item.file.size)}{begun}, from {source}"
        outcomes.append(Outcome(line=line))
    for disk in disks(missing):
        line = f"{gigabytes(disk.needed)} to fetch in all, {gigabytes(disk.free)} free at {disk.folder}"
        outcomes.append(Outcome(line=line))
    return outcomes


def _fetch(
    files: Sequence[PublishedFile],
    places: Places,
    gauge: "_Gauge",
    revision: str | None,
    check: bool,
    endpoint: str | None,
) -> list[Outcome]:
    remotes: dict[PublishedFile, hub.Remote] = {}
    if revision is not None:
        asked = _look_up([(file, revision) for file in files], endpoint, gauge)
        remotes = {_as_published(file, remote): remote for file, remote in asked.items()}
        files = list(remotes)
    found = survey(files, places)
    missing = [item for item in found if not item.present]
    present = [item for item in found if item.present]
    if check:
        _check(present, endpoint, gauge)
    if revision is None:
        remotes = _look_up([(item.file, _revision_of(item)) for item in missing], endpoint, gauge)
        for file, remote in remotes.items():
            _check_is_published(file, remote)
    check_space(missing)
    outcomes = [_is_there(item, check) for item in present]
    gauge.begin(sum(item.file.size for item in missing))
    for item in missing:
        line = _Arrival(item, remotes[item.file], gauge).run()
        outcomes.append(Outcome(line=line, path=item.path))
    return outcomes


def _is_there(item: Found, checked: bool) -> Outcome:
    known_by = "sha256 as published" if checked else item.known_by
    return Outcome(line=f"{item.label}: is there, {gigabytes(item.have)}, {known_by}", path=item.path)


def _revision_of(item: Found) -> str:
    """Return the revision to ask for: the commit of the part that has come, lest two be mixed, or the catalog's."""
    return item.record.commit if item.have and item.record else item.file.revision


def _as_published(file: PublishedFile, remote: hub.Remote) -> PublishedFile:
    """Return what a file is at a revision that the catalog does not know."""
    if remote.size is None or remote.sha256 is None:
        raise ValueError(f"The hub does not say what {file.path} of {file.repo} is: leave the revision out.")
    return replace(file, size=remote.size, sha256=remote.sha256, revision=remote.commit)


def _check_is_published(file: PublishedFile, remote: hub.Remote) -> None:
    """Raise ValueError if the hub has another file under a name than the one that the catalog knows."""
    for what, known, told in (("bytes", file.size, remote.size), ("sha256", file.sha256, remote.sha256)):
        if None not in (known, told) and known != told:
            raise ValueError(
                f"{file.path} of {file.repo} has {what} {told} at {remote.commit}, and the file that this pack knows "
                f"{known}: it was replaced. To take it all the same, give {remote.commit} as revision."
            )
    if file.sha256 is None and remote.sha256 is None:
        raise ValueError(
            f"Nobody says which sha256 {file.path} of {file.repo} has, so that it can't be checked: leave out a mirror "
            "that hides it, or fetch the file by hand."
        )


def _look_up(
    wanted: Sequence[tuple[PublishedFile, str]], endpoint: str | None, gauge: "_Gauge"
) -> dict[PublishedFile, hub.Remote]:
    """Return what the hub says of files at revisions; a branch is the same commit for all files of a repository."""
    remotes: dict[PublishedFile, hub.Remote] = {}
    commits: dict[tuple[str, str], str] = {}
    for file, revision in wanted:
        gauge.note = f"asking for {file.name}"
        at, patience = commits.get((file.repo, revision), revision), _Patience(gauge, QUESTION_SECONDS)
        while file not in remotes:
            try:
                remotes[file] = hub.look_up(file.repo, file.path, at, endpoint)
            except hub.Temporary as error:
                patience.wait(error)
        commits[file.repo, revision] = remotes[file].commit
    return remotes


def _check(present: Sequence[Found], endpoint: str | None, gauge: "_Gauge") -> None:
    """Raise ValueError if a file that is there has not the sha256 that it was published with."""
    gauge.begin(sum(item.have for item in present))
    wrong = []
    for item in present:
        expected = item.file.sha256 or (item.record and item.record.sha256)
        if expected is None:
            [remote] = _look_up([(item.file, item.file.revision)], endpoint, gauge).values()
            _check_is_published(item.file, remote)
            expected = remote.sha256
        gauge.note = f"checking {item.file.name}"
        with open(item.path, "rb") as opened:
            digest = _sha256(opened, item.have, gauge)
        if digest.hexdigest() != expected:
            wrong.append(f"{item.path} has sha256 {digest.hexdigest()}, and the published file {expected}")
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}: it is damaged or another file. Move it away, or delete it, and try again."
        )


def _sha256(opened: BinaryIO, size: int, gauge: "_Gauge") -> "hashlib._Hash":
    """Read the first bytes of a file into a digest."""
    digest = hashlib.sha256()
    while size and (piece := opened.read(min(size, READ_BYTES))):
        gauge.stop_if_asked()
        digest.update(piece)
        gauge.done += len(piece)
        size -= len(piece)
    return digest


class _Arrival:
    """One file on its way, from what has come of it before to its final name."""

    def __init__(self, item: Found, remote: hub.Remote, gauge: "_Gauge"):
        self.item, self.remote, self.gauge = item, replace(remote, size=item.file.size), gauge
        self.size, self.sha256 = item.file.size, item.file.sha256 or remote.sha256
        self.part, self.begun_at = part_of(item.path), gauge.done

    def run(self) -> str:
        """Return what happened, when the file is there."""
        from huggingface_hub.utils import WeakFileLock

        self.gauge.note = f"waiting for another download of {self.item.file.name}"
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self.part.parent} can't be made ({error.strerror}): choose folders that you may write to, "
                "or change that."
            ) from error
        with WeakFileLock(lock_of(self.item.path)):
            self.gauge.stop_if_asked()
            if self.item.path.is_file() and self.item.path.stat().st_size == self.size:
                self.gauge.done = self.begun_at + self.size
                return f"{self.item.label}: came by another download meanwhile"
            resumed = self._claim_part()
            try:
                self._receive(resumed)
            except _Damaged:
                self.part.unlink()  # of no use, whatever part of it is right
                raise
            except OSError as error:
                if not is_disk_full(error):
                    raise
                raise ValueError(f"The disk of {self.part.parent.parent} is full: free some of it. {AGAIN}") from error
            self._finish()
        went_on = f", {gigabytes(resumed)} of it before" if resumed else ""
        where = f"{self.remote.repo} at {self.remote.commit}"
        return f"{self.item.label}: fetched, {gigabytes(self.size)}{went_on}, sha256 as published; from {where}"

    def _claim_part(self) -> int:
        """Return how many bytes have come before; a part of another file, or too long a one, is thrown away."""
        fresh = Record(
            repo=self.remote.repo, path=self.remote.path, commit=self.remote.commit, size=self.size, sha256=self.sha256
        )
        old = read_record(self.item.path)
        have = self.part.stat().st_size if self.part.is_file() else 0
        if have and (old is None or old.sha256 != self.sha256 or have > self.size):
            self.part.unlink()
            have = 0
        write_record(self.item.path, fresh)
        return have

    def _receive(self, have: int) -> None:
        """Bring the part to its full size. Raises _Damaged if it is not the published file then."""
        with open(self.part, "r+b" if have else "wb") as opened:
            self.gauge.note = f"checking what there is of {self.item.file.name}"
            digest, furthest = _sha256(opened, have, self.gauge), have
            patience = _Patience(self.gauge, CONTENT_SECONDS)
            while have < self.size:
                self.gauge.note = self.item.file.name
                try:
                    for position, piece in hub.stream(self.remote, have):
                        self.gauge.stop_if_asked()
                        if position != have:  # the server began at the beginning
                            opened.seek(0)
                            opened.truncate()
                            digest = hashlib.sha256()
                        have = position + len(piece)
                        if have > self.size:
                            raise _Damaged(f"{self.remote.url} sends more than the {self.size} bytes of the file.")
                        opened.write(piece)
                        digest.update(piece)
                        self.gauge.done = self.begun_at + have
                    if have < self.size:
                        raise hub.Temporary(f"{self.remote.url} broke off after {have} of {self.size} bytes")
                except hub.Temporary as error:
                    if have > furthest:
                        patience, furthest = _Patience(self.gauge, CONTENT_SECONDS), have
                    patience.wait(error)
            opened.flush()
            os.fsync(opened.fileno())
        if digest.hexdigest() != self.sha256:
            raise _Damaged(
                f"{self.item.file.name} came with sha256 {digest.hexdigest()}, and {self.sha256} was expected: it was "
                "damaged on its way, and is not kept. Try again, and without proxies or mirrors if it happens again."
            )

    def _finish(self) -> None:
        if self.item.path.exists():
            raise ValueError(f"{self.item.path} has come from elsewhere meanwhile: move it away or delete it. {AGAIN}")
        os.replace(self.part, self.item.path)
        _sync_folder(self.item.path.parent)
        record = read_record(self.item.path)
        write_record(self.item.path, replace(record, mtime_ns=self.item.path.stat().st_mtime_ns))


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders can't be opened, and need not be
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Damaged(ValueError):
    """What has come is not the published file."""


class _Stopped(Exception):
    """The caller has stopped."""


@dataclass
class _Gauge:
    """What the working thread and the one that looks on share."""

    total: int = 0
    done: int = 0
    note: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)
    pace: deque[tuple[float, int]] = field(default_factory=deque)

    def begin(self, total: int) -> None:
        self.done, self.total = 0, total
        self.pace = deque()

    def stop_if_asked(self) -> None:
        if self.stopped.is_set():
            raise _Stopped

    def progress(self) -> Progress:
        """Return how far the work is; called by the thread that looks on."""
        now, done, total, pace = time.monotonic(), self.done, self.total, self.pace
        pace.append((now, done))
        while now - pace[0][0] > PACE_SECONDS:
            pace.popleft()
        seconds, come = now - pace[0][0], done - pace[0][1]
        text = f"{self.note}, {gigabytes(done)} of {gigabytes(total)}" if total else self.note
        if come > 0:
            left = int((total - done) * seconds / come)
            text += f", {come / seconds / 1e6:.1f} MB/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return Progress(done=done, total=total, text=text)


class _Patience:
    """Pauses before other tries, longer ones each time, and an end to them."""

    def __init__(self, gauge: _Gauge, seconds: float):
        self.gauge, self.pauses, self.until = gauge, iter(PAUSES), time.monotonic() + seconds

    def wait(self, error: hub.Temporary) -> None:
        """Wait before another try; raises ValueError when there were enough of them."""
        pause, asked = next(self.pauses, None), error.wait or 0.0
        if pause is None or asked > LONGEST_PAUSE or time.monotonic() > self.until:
            raise ValueError(f"{error}. {AGAIN}") from error
        pause, self.until = max(pause, asked), self.until + asked
        self.gauge.note = f"trying again in {pause:.0f} s: {error}"
        self.gauge.stopped.wait(pause)
        self.gauge.stop_if_asked()


def _watched(work: Callable[[], T], gauge: _Gauge, watch: Watch) -> T:
    """Return what `work` returns from a thread of its own, while this one looks on."""
    results: list[T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except (ValueError, OSError) as error:
            failures.append(error)
        except _Stopped:
            pass

    thread = threading.Thread(target=run, name="wanqwen download", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            watch(gauge.progress())
            thread.join(LOOK_SECONDS)
    finally:
        gauge.stopped.set()  # still at work only if `watch` raised
    watch(gauge.progress())
    if failures:
        raise failures[0]
    if not results:
        raise RuntimeError("A download ended without a result: the log says why.")
    return results[0]
