"""Published files on the disk: which are there, how that is known, what is left of a stopped download.

Beside the files of a folder of models, `.wanqwen/` holds for each file that was fetched a record of what it is (commit
and sha256), and the part that has come so far. ComfyUI lists neither. The folder may be deleted at any time.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .catalog import PublishedFile

HIDDEN = ".wanqwen"
RESERVE_BYTES = 1 << 29  # left free: a system whose disk is full to the last byte does not work

Places = Callable[[str], Sequence[Path]]  # ComfyUI's name of a folder -> where its files lie; new ones go to the first
OTHER_NAMES = {"diffusion_models": "unet", "text_encoders": "clip"}  # of the same folders in older versions of ComfyUI


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a fetched file is; `mtime_ns` is that of the file when its sha256 was checked, None while it comes."""

    repo: str
    path: str
    commit: str
    size: int
    sha256: str
    mtime_ns: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A published file's place, and what is there of it: `have` bytes, all of them if `present`."""

    file: PublishedFile
    path: Path
    present: bool
    have: int
    record: Record | None

    @property
    def label(self) -> str:
        """Return folder and name."""
        return f"{self.file.folder}/{self.path.name}"

    @property
    def known_by(self) -> str:
        """Return how it is known that the file is the published one."""
        fetched = self.record and self.record.mtime_ns == self.path.stat().st_mtime_ns
        return "sha256 checked when it was fetched" if fetched else "known by name and size"


def layout(root: Path) -> Places:
    """Return the places of a folder that is laid out as ComfyUI's `models`. Raises ValueError if it is another."""
    if (root / "main.py").is_file() and (root / "models").is_dir():
        raise ValueError(f"{root} is ComfyUI itself: name its folder of models, {root / 'models'}.")
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file: name a folder laid out as ComfyUI's models folder.")
    return lambda folder: [root / name for name in (folder, OTHER_NAMES.get(folder)) if name]


def survey(files: Iterable[PublishedFile], places: Places) -> list[Found]:
    """Return for each file whether it is there, from names and sizes alone, subfolders included.

    Raises ValueError for a file of the name in question that has another size.
    """
    found = [_find(file, places) for file in files]
    wrong = [
        f"{item.path} has {item.path.stat().st_size} bytes, and the published file {item.file.size}"
        for item in found
        if not item.present and item.path.exists()
    ]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}: it is cut off or another file. Move it away, or delete it, and try again."
        )
    return found


def _find(file: PublishedFile, places: Places) -> Found:
    folders = places(file.folder)
    target = folders[0] / file.name
    for path in (target, *(inner for folder in folders for inner in _named(folder, file.name))):
        if path.is_file() and path.stat().st_size == file.size:
            return Found(file=file, path=path, present=True, have=file.size, record=read_record(path))
    part = part_of(target)
    have = part.stat().st_size if part.is_file() else 0
    return Found(file=file, path=target, present=False, have=have, record=read_record(target))


def _named(folder: Path, name: str) -> Iterator[Path]:
    for path, _, files in os.walk(folder, followlinks=True):  # as ComfyUI lists them
        if name in files:
            yield Path(path, name)


def part_of(path: Path) -> Path:
    """Return where the part of a file lies that has come so far."""
    return path.parent / HIDDEN / f"{path.name}.part"


def lock_of(path: Path) -> Path:
    """Return the file that keeps others from fetching the same one."""
    return path.parent / HIDDEN / f"{path.name}.lock"


def _record_of(path: Path) -> Path:
    return path.parent / HIDDEN / f"{path.name}.json"


def read_record(path: Path) -> Record | None:
    """Return what is recorded of a file, None if that is nothing that makes sense."""
    try:
        return Record(**json.loads(_record_of(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_record(path: Path, record: Record) -> None:
    """Record what a file is; a reader sees the old record or the new one, never half of one."""
    place = _record_of(path)
    fresh = place.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, place)


def free_bytes(folder: Path) -> int:
    """Return the bytes that the disk of a folder has free; the folder may not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A disk that files are to come to: one of their folders, and the bytes that it needs and has."""

    folder: Path
    needed: int
    free: int


def disks(missing: Iterable[Found]) -> list[Disk]:
    """Return what is needed, and free, on each disk that missing files are to come to."""
    by_disk: dict[int, list[Found]] = {}
    for item in missing:
        by_disk.setdefault(_existing(item.path.parent).stat().st_dev, []).append(item)
    return [
        Disk(
            folder=items[0].path.parent,
            needed=sum(item.file.size - item.have for item in items),
            free=free_bytes(items[0].path.parent),
        )
        for items in by_disk.values()
    ]


def check_space(missing: Iterable[Found]) -> None:
    """Raise ValueError if what is missing of some files does not fit on their disks."""
    for disk in disks(missing):
        lacking = disk.needed + RESERVE_BYTES - disk.free
        if lacking > 0:
            raise ValueError(
                f"{disk.folder} has {gigabytes(disk.free)} free, and {gigabytes(disk.needed)} are to come, beside "
                f"{gigabytes(RESERVE_BYTES)} that stay free: free {gigabytes(lacking)} there, or choose another disk."
            )


def is_disk_full(error: OSError) -> bool:
    """Say whether an error means that a disk, or a user's share of it, is full."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))


def gigabytes(size: float) -> str:
    """Return a number of bytes for people: in GB of 10^9 bytes, below one in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
