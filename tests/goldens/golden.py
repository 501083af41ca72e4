"""Golden files: safetensors that hold a small model, the inputs of some cases and what a reference made of them.

`weights/<official name>`, `in|mid|out/<case>/<name>`; the metadata keys `config` and `cases` are JSON.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """One golden file, read whole."""

    path: Path
    config: dict[str, Any]
    cases: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's weights by their official names."""
        return self._below("weights/")

    def inputs(self, case: str) -> dict[str, Tensor]:
        """Return the inputs of a case by name."""
        return self._below(f"in/{case}/")

    def keys(self, section: str) -> list[str]:
        """Return the keys of a section (`out`, `mid`) as `section/case/name`."""
        return sorted(key for key in self.tensors if key.startswith(f"{section}/"))

    def _below(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}


@lru_cache(maxsize=4)
def read(path: Path) -> Golden:
    """Read a golden file; raises what safetensors and json raise if it is none."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a handle is no dict)
    return Golden(
        path=path,
        config=json.loads(metadata.get("config", "{}")),
        cases=json.loads(metadata.get("cases", "{}")),
        tensors=tensors,
    )


def numbered(inputs: dict[str, Tensor], name: str) -> list[Tensor]:
    """Return `name0`, `name1`, ... of the inputs of a case."""
    found = []
    while f"{name}{len(found)}" in inputs:
        found.append(inputs[f"{name}{len(found)}"])
    return found


def need(inputs: dict[str, Tensor], *names: str) -> list[Tensor]:
    """Return the inputs of these names; raises ValueError for those that a case lacks."""
    missing = [name for name in names if name not in inputs]
    if missing:
        raise ValueError(f"the case has no input {', '.join(missing)}; it has {', '.join(inputs) or 'none'}")
    return [inputs[name] for name in names]
