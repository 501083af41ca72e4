"""Make `wanqwen` mean this checkout, whatever its folder is called, installed or not."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = "wanqwen_goldens"  # as pyproject.toml announces it

# Models this small lose more to threads than they gain, by far when the machine is busy. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

# Without a card, kernels run step by step on the CPU. Read when Triton is imported, which nothing has done yet.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _import_checkout() -> None:
    spec = importlib.util.spec_from_file_location(
        "wanqwen", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = sys.modules["wanqwen"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if "wanqwen" not in sys.modules:
    _import_checkout()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add our options where the plugin is not installed; then write `--goldens=DIR`, in one word."""
    parser.addoption("--resolve", action="store_true", help="wanqwen: ask pip whether our requirements fit ComfyUI's")
    if not pluginmanager.has_plugin(PLUGIN):
        from wanqwen.tests.goldens import plugin

        pluginmanager.register(plugin, PLUGIN)
    parser.addoption("--soak", type=int, default=0, help="how many prompts to send to ComfyUI in a row (default: none)")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test another checkout than this one."""
    found = Path(sys.modules["wanqwen"].__file__).resolve().parent
    if found != ROOT:
        raise pytest.UsageError(f"wanqwen is installed from {found}, these are the tests of {ROOT}: run make test here")
