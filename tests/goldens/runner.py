"""What a golden file asks to be checked, and the check itself."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from .golden import read
from .kinds import find_kind

Check = tuple[str, str]  # (the key of an output, the way of computing it)
UNREADABLE: Check = ("", "")


def checks(path: Path) -> list[Check]:
    """Return all that a file asks. One that can't be run stays as one check, which fails and says why."""
    try:
        return _checks(path)
    except (ValueError, SafetensorError, OSError):
        return [UNREADABLE]


@torch.no_grad()
def verify(path: Path, key: str, way: str) -> None:
    """Raise unless max |ours - ref| / max |ref| is within the tolerance of this kind of file and way."""
    if (key, way) == UNREADABLE:
        _checks(path)
    golden = read(path)
    kind = find_kind(golden)
    if not way:
        raise ValueError(f"{path.name} is a {kind.name}, which has no check for {key}")
    for i, (ours, reference) in enumerate(kind.run(golden, key, way)):
        if ours.shape != reference.shape:
            raise ValueError(f"{path.name} {key} is {tuple(reference.shape)}, we give {tuple(ours.shape)}")
        difference = (ours.double() - reference.double()).abs().max() / reference.double().abs().max()
        # Not `difference > tolerance`: NaN has to fail.
        assert difference <= kind.tolerance(way), f"{path.name} {key}, {way}, part {i}: off by {difference:.2e}"


def _checks(path: Path) -> list[Check]:
    golden = read(path)
    kind = find_kind(golden)
    outputs = kind.outputs(golden)
    if not outputs:
        raise ValueError(f"{path.name} holds no out/<case>/<name>")
    found = [(key, way) for key in (*outputs, *golden.keys("mid")) for way in kind.ways(golden, key)]
    unchecked = set(outputs) - {key for key, _ in found}
    return found + [(key, "") for key in sorted(unchecked)]
