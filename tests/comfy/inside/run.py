"""Run the checks of one module of this folder in ComfyUI's own Python, beside ComfyUI's code: `run.py MODULE [DRIVER]`.

What is printed last is JSON: how each check failed, by its name, or null. DRIVER is a library that stands for CUDA's.
"""

import ctypes
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch


def start_comfyui(driver: str | None) -> None:
    """Have ComfyUI's modules as its server has them before the first prompt, on the CPU."""
    if driver:
        ctypes.CDLL(driver, mode=ctypes.RTLD_GLOBAL)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401 before `nodes` puts another `utils` first on the path

    if driver:
        import comfy_aimdo.control

        comfy_aimdo.control.init()  # the modules below look whether it is
    import comfy.model_management  # isort: skip
    import comfy.model_patcher


def load(name: str) -> ModuleType:
    """Return a module of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failure(check: object) -> str | None:
    """Run a check as ComfyUI runs nodes, and return how it failed."""
    try:
        with torch.inference_mode():
            check()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    wanted, *drivers = sys.argv[1:]
    start_comfyui(*(drivers or [None]))
    checks = {name: check for name, check in vars(load(wanted)).items() if name.startswith("test_")}
    print(json.dumps({name: failure(check) for name, check in checks.items()}))
