"""The engine for spelling tables: which of its known ways does a file name an architecture, and what is what in it.

A family writes tables of module paths (`blocks.{}.self_attn.q` -> `blocks.{}.attn1.to_q`); what follows the path in a
tensor's name is carried over as it is, so that scales, and a LoRA's factors, follow the layer they belong to.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from .. import storage
from ..types import Spelling

# What the tools of the field put before every name of a diffusion model.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")

# The parameters of a module, as suffixes of its path.
LAYER = (".weight", ".bias")
WEIGHT = (".weight",)
BARE = ("",)  # the path itself names a tensor

Rows = Mapping[str, tuple[str, tuple[str, ...]]]  # official path -> (the other spelling's path, its parameters)


class Renamer:
    """Rename tensors from one spelling to another; made once per table, called per name."""

    def __init__(self, table: Mapping[str, str]):
        self._rows: dict[tuple[str, ...], list[tuple[list[str], str]]] = {}
        for path, target in table.items():
            parts = path.split(".")
            self._rows.setdefault(_shape(parts), []).append((parts, target))
        self._longest = max(map(len, self._rows), default=0)
        for rows in self._rows.values():  # a row that names its layer goes before one that takes any
            rows.sort(key=lambda row: row[0].count("{}"))

    def __call__(self, name: str) -> str | None:
        """Return the new name, or None if no row of the table fits. The longest path that fits decides."""
        parts = name.split(".")
        shape = _shape(parts[: self._longest])
        for end in range(len(shape), 0, -1):
            for row, target in self._rows.get(shape[:end], ()):
                if all(want in ("{}", part) for want, part in zip(row, parts, strict=False)):
                    layers = [part for want, part in zip(row, parts, strict=False) if want == "{}"]
                    return target.format(*layers) + "".join(f".{part}" for part in parts[end:])
        return None


def _shape(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple("{}" if part.isdecimal() else part for part in parts)


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """Return the table from the other spelling to the official one."""
    back = {other: official for official, other in table.items()}
    assert len(back) == len(table), "two modules of one spelling must not share a name in another"
    return back


def under(parent: str, other_parent: str, rows: Rows) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the rows of a module put below a parent, whose path the two spellings may call differently."""
    return {f"{parent}.{path}": (f"{other_parent}.{other}", leaves) for path, (other, leaves) in rows.items()}


def below(parent: str, other_parent: str, inner: Mapping[str, str]) -> dict[str, str]:
    """Return a table of a module's paths put below a parent, whose path the two spellings may call differently."""
    return {f"{parent}.{path}": f"{other_parent}.{other}" for path, other in inner.items()}


def table(rows: Rows) -> dict[str, str]:
    """Return the plain table of rows, without their parameters."""
    return {official: other for official, (other, _) in rows.items()}


def expand(rows: Rows, layers: Mapping[str, int]) -> list[str]:
    """Return the official names of every parameter; `layers` gives the number of each stack by what precedes `.{}`."""
    names = []
    for path, (_, leaves) in rows.items():
        stack, numbered, _ = path.partition(".{}")
        for i in range(layers[stack] if numbered else 1):
            names += [path.format(i) + leaf for leaf in leaves]
    return names


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which rows of a file's tensor are a parameter: part `index` of `count` equal parts.

    The tensor may have more dimensions than the parameter, all of them 1 and before the others.
    """

    index: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """How a file spells an architecture. `names` maps official to file names; `unmatched` are the others."""

    spelling: Spelling
    names: Mapping[str, str]
    unmatched: tuple[str, ...]


def pick(names: Collection[str], spellings: Iterable[Spelling], prefixes: Iterable[str] = PREFIXES) -> Match | None:
    """Return the spelling and prefix under which most names of a file fit, None if none fits; the first wins a tie."""
    used = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)]
    best: Match | None = None
    for spelling in spellings:
        rename = Renamer(inverse(spelling.table))
        for prefix in used:
            match = _match(names, replace(spelling, prefix=prefix), rename)
            if match.names and (best is None or len(match.names) > len(best.names)):
                best = match
            if not match.unmatched:  # no other can name more
                return match
    return best


def _match(names: Collection[str], spelling: Spelling, rename: Renamer) -> Match:
    found, unmatched = {}, []
    for name in names:
        inner = name.removeprefix(spelling.prefix)
        official = rename(inner) if name.startswith(spelling.prefix) else None
        if official is None or official in found:
            unmatched.append(name)
        else:
            found[official] = name
    return Match(spelling=spelling, names=found, unmatched=tuple(unmatched))


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Where every name went: what the model takes, what it lacks, what the file has besides, known or not."""

    names: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]


def account(match: Match, expected: Collection[str], ignored: Iterable[str] = ()) -> Account:
    """Hold what a file has against the official names that its model expects.

    A companion of an expected weight (a scale, a record) belongs to the model. `ignored` are patterns with `*` of
    names that are known and not needed, as the file has them but for the prefix.
    """
    expected, patterns = set(expected), (*ignored, storage.SCALED_MARKER)
    names, ignored_names, unexpected = {}, [], []
    for official, name in match.names.items():
        suffix = storage.companion(official)
        if official in expected or (suffix and official.removesuffix(suffix) + ".weight" in expected):
            names[official] = name
    taken = set(names.values())
    for name in (*match.names.values(), *match.unmatched):
        inner = name.removeprefix(match.spelling.prefix)
        if name not in taken:
            known = any(fnmatchcase(inner, pattern) for pattern in patterns)
            (ignored_names if known else unexpected).append(name)
    return Account(
        names=names,
        missing=tuple(sorted(expected - names.keys())),
        unexpected=tuple(unexpected),
        ignored=tuple(ignored_names),
    )
