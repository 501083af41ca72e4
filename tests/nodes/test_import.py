"""Importing the nodes pulls in no heavy library, wherever that is tried."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = (
    "transformers",
    "accelerate",
    "sentencepiece",
    "ftfy",
    "diffusers",
    "triton",
    "av",
    "PIL",
    "tokenizers",
    "gguf",
)
SCRIPT = """
import importlib.util, json, pathlib, sys
import torch
root = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("wanqwen", root / "__init__.py", submodule_search_locations=[str(root)])
sys.modules["wanqwen"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from wanqwen.tests.nodes import comfy_double
sys.modules.update(comfy_double.modules(root / "nowhere"))
before = set(sys.modules)
import wanqwen.nodes
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_nodes_import_no_heavy_library(tmp_path):
    root = Path(__file__).resolve().parents[2]
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    new = json.loads(finished.stdout)
    assert "wanqwen" in new and not set(HEAVY) & set(new)
