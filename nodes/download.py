"""Published files, fetched into ComfyUI's folders of models. Only what the catalog lists, so that no one who can reach
ComfyUI can make it fetch from elsewhere.
"""

import time
from collections.abc import Callable
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..core import host
from ..downloads import fetch as fetching
from ..downloads.catalog import SETS, PublishedFile, files_of
from .types import CATEGORY, check_choice, found_by, tell, verdict

EVERYTHING, MODEL, NOTHING = "everything", "model only", "nothing"
FETCH = (EVERYTHING, MODEL, NOTHING)
MODEL_FOLDERS = ("diffusion_models", "loras")
TEXT_SECONDS = 0.5
MEGABYTE = 1_000_000


class Download(io.ComfyNode):
    """A set of published files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenDownload",
            display_name="Download (WanQwen)",
            **found_by("model downloader", "get models", "huggingface", "missing models"),
            category=CATEGORY,
            description="Fetches the published files of a model into ComfyUI's folders of models, each under its name "
            "only when its sha256 has been checked. Files that are there are left alone. It works when it is queued, "
            "and goes on where it was stopped. Then press R, and the loaders list the files. HF_ENDPOINT, set before "
            "ComfyUI starts, names a mirror of huggingface.co.",
            inputs=_inputs(),
            outputs=[
                io.String.Output(display_name="files", tooltip="The files as loaders list them, one in a line."),
                io.String.Output(display_name="report", tooltip="What was fetched or found, one file in a line."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, what: str | None = None, fetch: str | None = None) -> bool | str:
        return verdict(check_choice("what", what, [known.title for known in SETS]), check_choice("fetch", fetch, FETCH))

    @classmethod
    def fingerprint_inputs(cls, what: str, fetch: str, check: bool, revision: str = "") -> float:
        return time.time()  # the disk is another each time

    @classmethod
    def execute(cls, what: str, fetch: str, check: bool, revision: str = "") -> io.NodeOutput:
        files, watch = _files(what, fetch), _watch(cls.hidden.unique_id)
        if fetch == NOTHING:
            outcomes = fetching.look(files, _places, watch, check=check)
        else:
            outcomes = fetching.fetch(files, _places, watch, revision=revision.strip() or None, check=check)
        folders = {place for file in files for place in _places(file.folder)}
        names = [_listed(outcome.path, folders) for outcome in outcomes if outcome.path]
        lines = [outcome.line for outcome in outcomes]
        return io.NodeOutput("\n".join(names), "\n".join(lines), ui=tell(cls.hidden.unique_id, lines))


def _inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "what", options=[known.title for known in SETS],
            tooltip="The files to fetch: a model with its text encoder, its VAE and what else it needs, or a LoRA.",
        ),
        io.Combo.Input(
            "fetch", options=list(FETCH), default=EVERYTHING,
            tooltip="everything: all files of the set that are missing. model only: without text encoder, VAE and "
            "image encoder, if you have others of them. nothing: say what is missing, how large it is, and what room "
            "there is.",
        ),
        io.Boolean.Input(
            "check", default=False,
            tooltip="Read files that are there from end to end and compare their sha256. Without it their size is "
            "enough. What is fetched is always checked.",
        ),
        io.String.Input(
            "revision", default="", optional=True,
            tooltip="A branch, tag or commit of the repository to fetch from instead of the one that the pack knows. "
            "Leave it empty unless files were moved or replaced. It plays no part when fetch is nothing.",
        ),
    ]  # fmt: skip


def _files(what: str, fetch: str) -> list[PublishedFile]:
    files = list(files_of(what))
    models = [file for file in files if file.folder in MODEL_FOLDERS]
    return models if fetch == MODEL and models else files


def _places(folder: str) -> list[Path]:
    """Return where ComfyUI looks for files of a folder, the one that is called like it first."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(folder)]
    return sorted(paths, key=lambda path: path.name != folder)


def _listed(path: Path, folders: set[Path]) -> str:
    """Return a file's name as dropdowns have it: with the subfolder, if it lies in one."""
    return next(str(path.relative_to(folder)) for folder in folders if path.is_relative_to(folder))


def _watch(node_id: str | None) -> Callable[[fetching.Progress], None]:
    """Return what shows progress on the node and in ComfyUI's bar, and raises if the user asked to stop."""
    bars: dict[int, Callable[[int], None]] = {}  # a check and what is fetched after it have one each
    told, shown = 0.0, 0

    def watch(progress: fetching.Progress) -> None:
        nonlocal told, shown
        host.check_interrupt()
        done, total = progress.done // MEGABYTE, progress.total // MEGABYTE
        if total and done != shown:
            if total not in bars:
                bars[total] = host.meter(total)
            bars[total](done)
            shown = done
        if progress.text and time.monotonic() - told > TEXT_SECONDS:
            told = time.monotonic()
            tell(node_id, [progress.text])

    return watch
