"""As much of ComfyUI as our schemas use: records in place of its input classes, and folders in place of its models."""

import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

SOCKETS = (
    *("Combo", "Int", "Float", "String", "Boolean"),
    *("Latent", "Conditioning", "Vae", "Image", "Sigmas", "Mask", "ClipVision", "ClipVisionOutput", "Model"),
)


@dataclass
class Slot:
    """An input or output of a schema, with the options that it was given."""

    type: str
    id: str | None
    options: dict[str, Any] = field(default_factory=dict)


def _socket(name: str) -> Any:
    def make(id: str | None = None, **options: Any) -> Slot:
        return Slot(name, id, options)

    return SimpleNamespace(Input=make, Output=make)


class Node:
    """io.ComfyNode."""

    hidden = SimpleNamespace(unique_id="7")


class NodeOutput:
    """io.NodeOutput."""

    def __init__(self, *values: Any, ui: Any = None):
        self.values, self.ui = values, ui


class Folders:
    """folder_paths: one folder of models for each name."""

    def __init__(self, root: Path):
        self.root = root

    def get_folder_paths(self, folder: str) -> list[str]:
        return [str(self.root / folder)]

    def get_filename_list(self, folder: str) -> list[str]:
        found, _ = self.recursive_search(str(self.root / folder))
        return self.filter_files_extensions(found, {".ckpt", ".pt", ".bin", ".pth", ".safetensors", ".sft"})

    def recursive_search(
        self, directory: str, excluded_dir_names: list[str] | None = None
    ) -> tuple[list[str], dict[str, float]]:
        home = Path(directory)
        return [str(file.relative_to(home)) for file in home.rglob("*") if file.is_file()], {}

    def filter_files_extensions(self, files: Collection[str], extensions: Collection[str]) -> list[str]:
        return sorted(file for file in files if Path(file).suffix.lower() in extensions)

    def get_full_path(self, folder: str, name: str) -> str | None:
        path = self.root / folder / name
        return str(path) if path.is_file() else None

    def get_output_directory(self) -> str:
        return str(self.root / "output")


def modules(models: Path) -> dict[str, ModuleType | SimpleNamespace]:
    """Return what belongs into `sys.modules` for our nodes to be imported."""
    io = SimpleNamespace(
        Schema=lambda **facts: SimpleNamespace(**{"hidden": [], **facts}),
        ComfyNode=Node,
        NodeOutput=NodeOutput,
        Custom=_socket,
        Input=Slot,
        Output=Slot,
        Hidden=SimpleNamespace(unique_id="UNIQUE_ID"),
        **{name: _socket(re.sub("(?<=[a-z])(?=[A-Z])", "_", name).upper()) for name in SOCKETS},
    )
    latest = ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, type("ComfyExtension", (), {})
    package = ModuleType("comfy_api")
    package.latest = latest
    return {"comfy_api": package, "comfy_api.latest": latest, "folder_paths": Folders(models)}


def forget_nodes() -> None:
    """Drop our nodes package, so that the next import meets another ComfyUI, or none."""
    for name in [name for name in sys.modules if name == "wanqwen.nodes" or name.startswith("wanqwen.nodes.")]:
        del sys.modules[name]
