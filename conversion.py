"""Turn a checkpoint into another one of the same model: in another spelling, in another format of its weights."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from .core.types import Checkpoint, Identity
from .core.weights.convert import Plan, Wish, make_plan
from .core.weights.dfloat11 import CONFIG_FILE
from .core.weights.export import Export
from .core.weights.reader import SHARD
from .core.weights.targets import TARGETS
from .core.weights.vocabulary import KIND
from .core.weights.write import check_place, left_behind
from .families import identify, with_variant
from .loading import open_any
from .qwen_image.export import export_of as qwen_image_export
from .qwen_image.files import NAME as QWEN_IMAGE
from .qwen_image.keymap import TOKENIZER as QWEN_TOKENIZER
from .wan.export import TOKENIZER as WAN_TOKENIZER
from .wan.export import export_of as wan_export
from .wan.files import NAME as WAN

EXPORTS: Mapping[str, Callable[[Checkpoint, Identity], Export]] = {WAN: wan_export, QWEN_IMAGE: qwen_image_export}
TOKENIZERS = (WAN_TOKENIZER, QWEN_TOKENIZER)  # names of the tensors that hold one
NOWHERE = Path("nowhere") / "model"  # a file about which neither its name nor its folder tells anything
SECONDS_BETWEEN_LINES = 0.2
SHOWN = 4  # names in a line

Write = Callable[[str], None]


def plan(path: Path, wish: Wish, variant: str | None = None) -> tuple[Checkpoint, Identity, Plan]:
    """Return what a file is, and how it becomes what is wished; nothing but its header is read.

    `variant` is a user's word for which of Qwen-Image's models it holds. Raises ValueError for what can't be converted.
    """
    checkpoint, identity = open_any(path)
    if variant is not None:
        identity = with_variant(identity, variant)
    made = make_plan(checkpoint, identity, EXPORTS[identity.family](checkpoint, identity), wish)
    problem = _misread(made.checkpoint(NOWHERE.with_suffix(made.container.suffix)), identity)
    if problem:
        raise ValueError(
            f"{checkpoint.path.name} is {identity.family} {identity.variant}, which a file of it as {wish.target} "
            f"could not tell: {problem}. Choose another prefix, spelling or format."
        )
    return checkpoint, identity, made


def _misread(new: Checkpoint, identity: Identity) -> str | None:
    """Return what a new file would be taken for, None if that is the model that it is."""
    try:
        found = identify(new)
    except ValueError:
        return f"nobody would know names such as {next(iter(new.tensors))}"
    return None if _facts(found) == _facts(identity) else f"it would be taken for {found.variant}, {found.config}"


def _facts(identity: Identity) -> tuple[object, ...]:
    return identity.family, identity.role, identity.variant, identity.config, identity.missing, identity.unexpected


def convert(
    path: Path, out: Path, wish: Wish, write: Write, *, variant: str | None = None, replace: bool = False
) -> Path:
    """Write the file that is wished to `out`, and tell in lines of text what is done. The source is not touched.

    Raises ValueError, before any weight is read, for what can't be converted and for a place that is taken, not there
    or too small; OSError where the disk fails. Then, and on Ctrl-C, nothing is left behind.
    """
    checkpoint, identity, made = plan(path, wish, variant)
    suffix, size = made.container.suffix, made.size
    if out.suffix.lower() != suffix and not out.is_dir():
        raise ValueError(f"--out {out}: {wish.target} of this file is written as {suffix}, name it {out.stem}{suffix}")
    _check_name(path, out)
    for file in left_behind(out) if out.parent.is_dir() else ():
        left = f"{file} ({file.stat().st_size / 1e9:.2f} GB)"
        write(f"{left} is left of a conversion that did not end well: delete it, unless one is at work there now\n")
    check_place(out, size, set(checkpoint.location.values()), replace)
    where = f"{identity.family} {identity.variant}"
    write(f"{checkpoint.path.name}: {where}, {identity.weight_format}, {identity.spelling}\n")
    layers = f", {made.num_quantised} layers quantised" if made.num_quantised else ""
    write(f"{out.name}: {wish.target}{layers}, {size / 1e9:.2f} GB\n")
    if made.dropped:
        shown = ", ".join(made.dropped[:SHOWN]) + ", ..." * (len(made.dropped) > SHOWN)
        write(f"left out, as they are no weights of this model: {len(made.dropped)} tensors ({shown})\n")
    if KIND in checkpoint.metadata or any(name.removeprefix(identity.prefix) in TOKENIZERS for name in made.dropped):
        write("left out: its tokenizer. Put one beside the new file, or choose one where the file is used\n")
    if readers := TARGETS[wish.target].readers:
        write(f"{wish.target}: {readers}\n")
    made.write(out, Progress(size, write).advance)
    write("\n")
    if out.stat().st_size < size:
        write(f"{out.name} has {out.stat().st_size / 1e9:.2f} GB\n")
    if key := TARGETS[wish.target].beside:
        _write_beside(out.with_name(CONFIG_FILE), key, made, write)
    return out


def _check_name(path: Path, out: Path) -> None:
    """Raise ValueError for a place in which the new file, or the folder that is read, would not open afterwards."""
    if SHARD.fullmatch(out.name):
        raise ValueError(
            f"--out {out}: that is a name of one shard of several, and the others would be missed. Choose another"
        )
    if path.is_dir() and out.parent.resolve() == path.resolve():
        raise ValueError(
            f"--out {out}: {path} would hold two models then, and not open as a folder any more. Choose another folder"
        )


def _write_beside(config: Path, key: str, made: Plan, write: Write) -> None:
    """Write a fact of the new file where official loaders look for it, unless something is there already."""
    if config.exists():
        write(f"{config} is there already and stays as it is: loaders other than ours need {key} in it\n")
        return
    config.write_text(json.dumps({key: json.loads(made.facts[key])}, indent=2) + "\n", encoding="utf-8")
    write(f"{config.name} beside it is for loaders other than ours\n")


class Progress:
    """Tell how much of a file has been written, how fast, and how long the rest will take."""

    def __init__(self, size: int, write: Write):
        self.size, self.write, self.done = size, write, 0
        self.started = self.told = time.monotonic()

    def advance(self, count: int) -> None:
        """Count bytes that have been written."""
        self.done += count
        now = time.monotonic()
        if now - self.told < SECONDS_BETWEEN_LINES and self.done < self.size:
            return
        self.told, rate = now, self.done / max(now - self.started, 1e-9)
        left = (self.size - self.done) / max(rate, 1.0)
        line = f"{self.done / self.size:4.0%} of {self.size / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
        self.write(f"\r{line:<60}")
