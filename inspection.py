"""What there is to say of a checkpoint that has been identified, for people and for programs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from typing import Any

from .core import storage
from .core.types import Checkpoint, Identity
from .families import family_of_lora, fits_of_lora, presets_of_lora, recognised_by, width_of_lora

SHOWN = 8  # names per line of the text


def describe(checkpoint: Checkpoint, identity: Identity) -> dict[str, Any]:
    """Return the facts as plain JSON values; nothing but the header is read."""
    files = sorted(set(checkpoint.location.values()))
    weights = [name for official, name in identity.names.items() if storage.companion(official) is None]
    return {
        "path": str(checkpoint.path),
        "files": [file.name for file in files],
        "bytes": sum(file.stat().st_size for file in files if file.is_file()),
        "family": identity.family,
        "variant": identity.variant,
        "told by": recognised_by(checkpoint, identity),
        "role": identity.role,
        "format": identity.weight_format,
        "spelling": identity.spelling,
        "config": _plain(asdict(identity.config)),
        "tensors": len(checkpoint.tensors),
        "parameters": sum(prod(checkpoint.tensors[name].shape) for name in weights),
        "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values()).most_common()),
        "missing": list(identity.missing),
        "unexpected": list(identity.unexpected),
        "ignored": list(identity.ignored),
        "metadata": sorted(checkpoint.metadata),
    }


def describe_lora(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts of a LoRA as plain JSON values; nothing but the header is read. Raises ValueError."""
    family, file = family_of_lora(checkpoint)
    fits = fits_of_lora(family, file)
    return {
        "path": str(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size if checkpoint.path.is_file() else 0,
        "family": family.name,
        "role": "lora",
        "dialect": file.dialect,
        "ranks": file.ranks,
        "width": width_of_lora(file),
        "tensors": len(checkpoint.tensors),
        "targets": len(file.parts),
        "fits": {name: found.num_used for name, found in fits.items()},
        "presets": list(presets_of_lora(family, checkpoint)),
        "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values()).most_common()),
        "unknown": list(file.unknown),
        "twice": list(file.twice),
        "metadata": sorted(checkpoint.metadata),
    }


def render(facts: Mapping[str, Any]) -> str:
    """Return the facts as lines of text, long lists cut short."""
    return "\n".join(f"{key + ':':<12}{_line(key, value)}" for key, value in facts.items())


def _plain(value: Any) -> Any:
    """Return the value with lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def _line(key: str, value: Any) -> str:
    if isinstance(value, dict):
        parts = (f"{name} ({_line(name, inner)})" if isinstance(inner, dict) else f"{name} {inner}"
                 for name, inner in value.items())  # fmt: skip
        return ", ".join(parts) or "none"
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:SHOWN])) + (", ..." if len(value) > SHOWN else "")
        return f"{len(value)}: {shown}" if len(value) > 1 else shown or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
