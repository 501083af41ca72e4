"""What only shows beside ComfyUI's own code, in one process with it: see `inside/`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "inside"
ROOT = HERE.parents[2]
SECONDS = 300
DYNAMIC_VRAM = "dynamic_vram"  # the module that needs a card
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
        drivers = [cuda_in_ram(*comfyui, tmp_path)] if module == DYNAMIC_VRAM else []
        _found[module] = run(module, *drivers, home=comfyui[0], python=comfyui[1], folder=tmp_path)
    assert _found[module][name] is None, _found[module][name]


def cuda_in_ram(home: Path, python: Path, folder: Path) -> Path:
    """Return the library that stands for CUDA's, built here; skip where nothing asks for it or it can't be built."""
    compiler = shutil.which("cc")
    if "ModelPatcherDynamic" not in (home / "comfy" / "model_patcher.py").read_text(encoding="utf-8"):
        pytest.skip(f"the ComfyUI in {home} has no dynamic VRAM")
    if sys.platform != "linux" or not compiler:
        pytest.skip("the card that dynamic VRAM needs is made of RAM on Linux, with a C compiler")
    if subprocess.run([python, "-c", "import comfy_aimdo"], capture_output=True).returncode:
        pytest.skip(f"{python} has no comfy-aimdo, ComfyUI's library for dynamic VRAM")
    driver = folder / "libcuda.so.1"
    shared = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{driver.name}"]
    subprocess.run([compiler, *shared, "-o", driver, HERE / "cuda_in_ram.c", "-ldl"], check=True)
    return driver


def run(module: str, *drivers: Path, home: Path, python: Path, folder: Path) -> dict[str, str | None]:
    """Run all checks of a module in one process, and return how each failed."""
    (folder / "wanqwen").symlink_to(ROOT)
    finished = subprocess.run(
        [python, HERE / "run.py", module, *drivers],
        cwd=home, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (home, folder)))},
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])
