"""Installing the pack takes nothing from ComfyUI's Python that ComfyUI needs, for its oldest and newest versions."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "requirements.txt"
COMFYUI = sorted((ROOT / "tests" / "fixtures" / "comfyui_requirements").glob("*.txt"))
OFFLINE = ("Connection", "Network is unreachable", "timed out", "Name or service not known", "ProxyError")
SECONDS = 600

each_comfyui = pytest.mark.parametrize("theirs", COMFYUI, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Requirement]:
    lines = path.read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in wanted}


@each_comfyui
def test_both_lists_agree_on_every_package_that_they_share(theirs: Path):
    """Ours are lower bounds, so a bound of ours may be what they ask for at most: a pin, or a version of ~=."""
    ours, known = read(OURS), read(theirs)
    shared = ours.keys() & known.keys()
    assert {"transformers", "safetensors", "einops", "numpy"} <= shared
    for name in shared:
        bounds = [Version(one.version) for one in known[name].specifier if one.operator in ("==", "~=", "<", "<=")]
        assert all(bound in ours[name].specifier for bound in bounds), (ours[name], known[name])


@each_comfyui
def test_pip_resolves_both_together(theirs: Path, pytestconfig: pytest.Config):
    """`make test-requirements` asks pip, which takes minutes and a package index."""
    if not pytestconfig.getoption("--resolve"):
        pytest.skip("pip is asked by make test-requirements")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-input", "--disable-pip-version-check", "--quiet"]
    asked = [*pip, "--retries", "0", "--timeout", "15", "-r", str(theirs), "-r", str(OURS)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode and any(word in done.stderr for word in OFFLINE):
        pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
