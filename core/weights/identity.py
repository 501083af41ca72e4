"""What it takes to identify a checkpoint of any family: sizes from names and shapes, and what only words tell."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..storage import MAX_SIDES, weight_format
from ..types import Checkpoint, Identity
from .keymap import Account, Match

METADATA_KEY = "wanqwen"  # JSON in a safetensors header: what the shapes don't tell of our own checkpoints
MAX_DIGITS = 3  # of a layer's index
Config = TypeVar("Config")


def identity(
    checkpoint: Checkpoint, match: Match, found: Account, *, family: str, role: str, variant: str, config: object
) -> Identity:
    """Return the record of a checkpoint whose names have been matched and held against what its model expects."""
    prefix = match.spelling.prefix
    return Identity(
        family=family,
        role=role,
        variant=variant,
        weight_format=weight_format({official: checkpoint.tensors[name] for official, name in found.names.items()}),
        spelling=f"{match.spelling.name}, prefix {prefix}" if prefix else match.spelling.name,
        config=config,
        names=found.names,
        missing=found.missing,
        unexpected=found.unexpected,
        ignored=found.ignored,
        prefix=prefix,
    )


def count(names: Iterable[str], stack: str) -> int:
    """Return one more than the highest layer index that follows `stack`, 0 if there is none.

    Longer numbers than those of `MAX_DIGITS` are none, so that a damaged file can't ask for layers without end.
    """
    indices = (name[len(stack) :].split(".")[0] for name in names if name.startswith(stack))
    return max((int(index) + 1 for index in indices if index.isdecimal() and len(index) <= MAX_DIGITS), default=0)


def shapes(checkpoint: Checkpoint, names: Mapping[str, str], what: str) -> Callable[..., tuple[int, ...]]:
    """Return a look-up of shapes: by official name, and by how many sides it has, or may have.

    For a name that the file lacks, or of another shape than that, it raises a ValueError saying so.
    """

    def shape(official: str, *sides: int) -> tuple[int, ...]:
        if official not in names:
            raise ValueError(f"{checkpoint.path}: looks like a {what}, but lacks {official}: is the file complete?")
        found = checkpoint.tensors[names[official]].shape
        if len(found) not in sides or 0 in found:
            raise ValueError(
                f"{checkpoint.path}: looks like a {what}, but its {official} is {list(found[:MAX_SIDES])}, where "
                f"{' or '.join(map(str, sides))} sides from 1 on are expected: is the file damaged?"
            )
        return found

    return shape


def made(checkpoint: Checkpoint, config: Callable[..., Config], sizes: Mapping[str, Any]) -> Config:
    """Return the record of these sizes; its complaint names the file."""
    try:
        return config(**sizes)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error


def own_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint of our own says of itself in its header, nothing for all others.

    Raises ValueError where that is not a JSON object.
    """
    text = checkpoint.metadata.get(METADATA_KEY, "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{checkpoint.path}: metadata {METADATA_KEY} is not JSON but {text[:80]!r}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{checkpoint.path}: metadata {METADATA_KEY} is not JSON of an object but {text[:80]!r}")
    return found


def own_values(checkpoint: Checkpoint, kinds: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Return those of our own metadata that `kinds` names, each made what its kind makes of it."""
    return converted(own_metadata(checkpoint), kinds, f"{checkpoint.path}: metadata {METADATA_KEY}")


def converted(values: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], Any]], where: str) -> dict[str, Any]:
    """Return the values that `kinds` names and that are stated; raises ValueError for one that is not of its kind."""
    made = {}
    for key, kind in kinds.items():
        if values.get(key) is not None:
            try:
                made[key] = kind(values[key])
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"{where}: {key} can't be {str(values[key])[:80]!r} ({error})") from error
    return made


def positive(value: Any) -> int:
    """Return a whole number from 1."""
    if int(value) != value or value < 1:
        raise ValueError("expected a whole number from 1")
    return int(value)


def whole_numbers(value: Any) -> tuple[int, ...]:
    """Return a list of whole numbers as a tuple."""
    if not isinstance(value, (list, tuple)):
        raise TypeError("expected a list of whole numbers")
    return tuple(int(number) for number in value)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file that lies beside weights, nothing if there is no such file.

    Raises ValueError where the file is there and is no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__} where a JSON object is expected: download it again")
    return found
