"""What only shows beside ComfyUI's own code, in one process with it: see `inside/`."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "inside"
ROOT = HERE.parents[2]
SECONDS = 300
MODULES = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "run")
CHECKS = [
    (module, name)
    for module in MODULES
    for name in re.findall(r"^def (test_\w+)", (HERE / f"{module}.py").read_text(encoding="utf-8"), re.MULTILINE)
]
_found: dict[str, dict[str, str | None]] = {}


@pytest.mark.parametrize(("module", "name"), CHECKS, ids=lambda word: word)
def test_beside_comfyui(module: str, name: str, comfyui: tuple[Path, Path], tmp_path: Path) -> None:
    if module not in _found:
        _found[module] = run(module, *comfyui, tmp_path)
    assert _found[module][name] is None, _found[module][name]


def run(module: str, home: Path, python: Path, folder: Path) -> dict[str, str | None]:
    """Run all checks of a module in one process, and return how each failed."""
    (folder / "wanqwen").symlink_to(ROOT)
    finished = subprocess.run(
        [python, HERE / "run.py", module],
        cwd=home, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (home, folder)))},
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])
