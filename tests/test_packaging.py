"""The files that ComfyUI, its Manager and pip read agree with each other and with the tree."""

import inspect
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import wanqwen

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTEST_PLUGIN = "wanqwen.tests.goldens"  # the one package without an __init__.py
SLOW = ("transformers", "accelerate", "diffusers", "sentencepiece", "ftfy", "av", "PIL", "huggingface_hub")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def bare_names(lines: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}


def test_requirements_equal_the_dependencies(pyproject: dict[str, Any]) -> None:
    assert requirements("requirements.txt") == pyproject["project"]["dependencies"]


def test_manager_is_asked_for_lower_bounds_only_and_never_for_torch(pyproject: dict[str, Any]) -> None:
    # Manager installs line by line: no options, no pins that would downgrade what others need.
    lines = pyproject["project"]["dependencies"]
    assert all(re.fullmatch(r"[\w.-]+>=[\d.]+", line) for line in lines)
    assert not {name for name in bare_names(lines) if name.startswith("torch")}


def test_development_pins_cover_every_dependency(pyproject: dict[str, Any]) -> None:
    wanted = [*pyproject["project"]["dependencies"], *chain(*pyproject["project"]["optional-dependencies"].values())]
    assert bare_names(wanted) <= bare_names(requirements("requirements-dev.txt"))
    assert len(re.findall(r"^torch==\d+\.\d+\.\d+$", "\n".join(requirements("requirements-dev.txt")), re.M)) == 1


def test_packages_are_the_folders(pyproject: dict[str, Any]) -> None:
    folders = [path.parent.relative_to(ROOT).parts for path in ROOT.rglob("__init__.py")]
    ours = {".".join(("wanqwen", *parts)) for parts in folders if not parts or not parts[0].startswith((".", "build"))}
    assert sorted(pyproject["tool"]["setuptools"]["packages"]) == sorted(ours | {PYTEST_PLUGIN})


def test_registry_finds_what_it_requires(pyproject: dict[str, Any]) -> None:
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert project["name"] == "wanqwen"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_registry_shows_pictures_that_are_here(pyproject: dict[str, Any]) -> None:
    """Icon and banner by the address that they have in the repository: a square of at most 400 pixels, and 21 to 9."""
    raw = pyproject["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    for key, ratio, largest in (("Icon", 1.0, 400), ("Banner", 21 / 9, 2000)):
        address = pyproject["tool"]["comfy"][key]
        assert address.startswith(raw), key
        drawing = (ROOT / address.removeprefix(raw)).read_text(encoding="utf-8")
        width, height = map(int, re.search(r'<svg[^>]* width="(\d+)" height="(\d+)"', drawing).groups())
        assert width <= largest and width / height == pytest.approx(ratio, rel=0.01), key


def test_registry_s_classifiers_are_of_those_it_knows(pyproject: dict[str, Any]) -> None:
    """It drops all systems, or all accelerators, where it does not know one of them."""
    found = pyproject["project"]["classifiers"]
    systems = [one for one in found if one.startswith("Operating System ::")]
    assert systems == ["Operating System :: OS Independent"]
    assert [one for one in found if one.startswith("Environment ::")] == ["Environment :: GPU :: NVIDIA CUDA"]


@pytest.fixture(scope="module")
def archived() -> set[str]:
    """What the registry archives: the files under version control but for those that .comfyignore names."""
    listed = [["git", "ls-files"], ["git", "ls-files", "-ci", "--exclude-from=.comfyignore"]]
    try:
        all_files, left_out = (
            subprocess.run(each, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
            for each in listed
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    assert left_out
    return set(all_files) - set(left_out)


def test_registry_s_archive_holds_what_runs_and_nothing_else(archived: set[str], pyproject: dict[str, Any]) -> None:
    tops = {path.split("/")[0] for path in archived}
    code = {package.split(".")[1] for package in pyproject["tool"]["setuptools"]["packages"] if "." in package}
    data = {"locales", "subgraphs", "web", "workflows"}
    assert {top for top in tops if (ROOT / top).is_dir()} == code - {"bench", "tests"} | data
    files = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE"}
    assert files <= tops and "requirements-dev.txt" not in tops
    included = pyproject["tool"]["comfy"]["includes"]
    for folder in included:
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.safetensors")}
        assert here and here <= archived, folder
    assert sum((ROOT / path).stat().st_size for path in archived) < 50 << 20


def test_a_new_version_is_published_by_a_push_of_it(pyproject: dict[str, Any]) -> None:
    action = (ROOT / ".github" / "workflows" / "publish_action.yml").read_text(encoding="utf-8")
    owner = pyproject["project"]["urls"]["Repository"].split("/")[3]
    for line in ("uses: Comfy-Org/publish-node-action@v1", f"repository_owner == '{owner}'", "- pyproject.toml"):
        assert line in action


def test_changelog_begins_with_this_version_and_goes_down(pyproject: dict[str, Any]) -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)\b", text, re.MULTILINE)
    assert versions[0] == pyproject["project"]["version"]
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)


def test_root_is_what_comfyui_looks_for() -> None:
    assert inspect.iscoroutinefunction(wanqwen.comfy_entrypoint)
    assert wanqwen.WEB_DIRECTORY == "./web"
    # With this name present ComfyUI would ignore comfy_entrypoint.
    assert not hasattr(wanqwen, "NODE_CLASS_MAPPINGS")


def run_python(code: str, folder: Path) -> str:
    """Run code in a fresh Python that sees this checkout as `wanqwen`, and nothing of it at the top level."""
    (folder / "wanqwen").symlink_to(ROOT, target_is_directory=True)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_root_imports_nothing(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import wanqwen; print(*(set(sys.modules) - before))"
    words = {name.split(".")[0] for name in run_python(code, tmp_path).split()}
    assert words - set(sys.stdlib_module_names) == {"wanqwen"}


def test_importing_every_module_loads_nothing_slow(tmp_path: Path) -> None:
    folders = ("core", "wan", "qwen_image", "kernels", "demo")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [path for path in sorted(ROOT.glob("*.py")) if path.stem not in ("__init__", "__main__")]
    names = [".".join(("wanqwen", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    names = [name.removesuffix(".__init__") for name in names]
    code = f"""
import sys, torch, einops, numpy, safetensors.torch
before = set(sys.modules)
import importlib
for name in {names}:
    importlib.import_module(name)
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] in {SLOW}))
"""
    assert len(names) > 30
    assert run_python(code, tmp_path).split() == []


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8").splitlines()
