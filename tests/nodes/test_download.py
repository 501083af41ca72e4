"""The download node: what it fetches where, what it says, and that it stops when the user wants it to."""

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from wanqwen.core import host
from wanqwen.downloads import fetch as fetching
from wanqwen.downloads import hub as library
from wanqwen.downloads.catalog import FileSet, PublishedFile

from ..downloads.hub_double import Hub

REPO, COMMIT = "owner/weights", "1" * 40
TITLE = "Some model"


class Interrupted(Exception):
    """ComfyUI's own, in place of it."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with closing(Hub()) as double:
        yield double


@pytest.fixture
def files(hub: Hub) -> tuple[PublishedFile, ...]:
    """A model of two files, published."""
    files = []
    for folder, name, size in (("diffusion_models", "some_model", 3_000_000), ("vae", "some_vae", 1000)):
        content = os.urandom(size)
        path = f"split_files/{folder}/{name}.safetensors"
        sha256 = hub.publish(COMMIT, REPO, path, content)
        files.append(PublishedFile(repo=REPO, path=path, folder=folder, size=size, sha256=sha256))
    return tuple(files)


@pytest.fixture
def node(nodes, files, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The node, with a catalog of its own, empty folders, and the hub on localhost."""
    import folder_paths
    from wanqwen.downloads import catalog
    from wanqwen.nodes import download

    sets = (FileSet(name="some", title=TITLE, files=files),)
    for module in (catalog, download):
        monkeypatch.setattr(module, "SETS", sets)
    places = {
        "diffusion_models": [str(tmp_path / "unet"), str(tmp_path / "diffusion_models")],
        "vae": [str(tmp_path / "vae")],
    }
    monkeypatch.setattr(folder_paths, "get_folder_paths", places.__getitem__)
    look_up = library.look_up
    monkeypatch.setattr(library, "look_up", lambda repo, path, at, endpoint: look_up(repo, path, at, hub.endpoint))
    return nodes.Download


def test_a_set_goes_into_the_folders_that_are_called_so(node, files, tmp_path):
    out = node.execute(TITLE, "everything", False)
    names, report = out.values
    assert names == "some_model.safetensors\nsome_vae.safetensors"
    assert report.count("fetched") == 2 and out.ui["text"] == report.split("\n")
    assert (tmp_path / "diffusion_models" / "some_model.safetensors").stat().st_size == files[0].size
    assert (tmp_path / "vae" / "some_vae.safetensors").is_file() and not (tmp_path / "unet").exists()


def test_a_file_in_an_older_folder_or_a_subfolder_counts(node, files, tmp_path, hub):
    node.execute(TITLE, "model only", False)
    (tmp_path / "unet" / "wan").mkdir(parents=True)
    (tmp_path / "diffusion_models" / "some_model.safetensors").rename(
        tmp_path / "unet" / "wan" / "some_model.safetensors"
    )
    asked = len(hub.requests)
    out = node.execute(TITLE, "model only", True)
    assert out.values[0] == str(Path("wan", "some_model.safetensors")) and len(hub.requests) == asked
    assert out.values[1].endswith("sha256 as published")


def test_nothing_is_fetched_unasked(node, hub, tmp_path):
    out = node.execute(TITLE, "nothing", False)
    assert "diffusion_models/some_model.safetensors: to fetch, 3 MB" in out.values[1] and "free at" in out.values[1]
    assert not hub.requests and not list(tmp_path.iterdir())


def test_another_revision_may_have_other_files(node, hub, files, tmp_path):
    hub.publish("2" * 40, REPO, files[1].path, b"another")
    out = node.execute(TITLE, "everything", False, "main")
    assert out.values[0] == "some_model.safetensors\nsome_vae.safetensors"
    assert (tmp_path / "vae" / "some_vae.safetensors").read_bytes() == b"another"


def test_a_revision_of_spaces_is_none(node):
    assert "fetched" in node.execute(TITLE, "model only", False, " ").values[1]


def test_the_user_s_stop_is_comfyui_s_own(node, hub, monkeypatch, tmp_path):
    hub.stall_after = 2_000_000

    def interrupted() -> None:
        part = tmp_path / "diffusion_models" / ".wanqwen" / "some_model.safetensors.part"
        if part.exists() and part.stat().st_size > 1_000_000:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(host, "check_interrupt", interrupted)
        with pytest.raises(Interrupted):
            node.execute(TITLE, "everything", False)
    assert not (tmp_path / "diffusion_models" / "some_model.safetensors").exists()
    hub.release.set()
    hub.stall_after = None
    node.execute(TITLE, "everything", False)
    assert (tmp_path / "diffusion_models" / "some_model.safetensors").exists()
    assert any(request.start > 1_000_000 for request in hub.contents)


def test_progress_goes_to_comfyui_s_bar_and_onto_the_node(node, monkeypatch):
    from wanqwen.nodes import download

    bar, told = [], []
    monkeypatch.setattr(host, "meter", lambda total: lambda done: bar.append((done, total)))
    monkeypatch.setattr(download, "tell", lambda node_id, lines: told.append(lines) or {"text": lines})
    monkeypatch.setattr(download, "TEXT_SECONDS", 0)
    watch = download._watch("7")
    for done in (0, 1_500_000, 1_600_000, 3_000_000):
        watch(fetching.Progress(done=done, total=3_000_000, text=f"{done} of it"))
    assert bar == [(1, 3), (3, 3)] and told[-1] == ["3000000 of it"]


def test_it_always_looks_again_and_checks_its_choices(node):
    first = node.fingerprint_inputs(TITLE, "everything", False)
    assert first != node.fingerprint_inputs(TITLE, "everything", False)
    assert node.validate_inputs(TITLE, "everything") is True
    assert "choose one of Some model" in node.validate_inputs("https://evil.example/x", "everything")
    from wanqwen.nodes import download

    assert [file.folder for file in download._files(TITLE, "model only")] == ["diffusion_models"]
    assert len(download._files("some_vae.safetensors", "model only")) == 1  # there is no model in it
    assert "choose one of everything, model only, nothing" in node.validate_inputs(TITLE, "all")


def test_a_loader_says_that_a_missing_file_can_be_fetched(nodes):
    problem = nodes.LoadWanVAE.validate_inputs("wan/wan_2.1_vae.safetensors")
    assert "The node Download (WanQwen) can fetch it: it belongs to 'Wan 2.1 T2V 1.3B'." in problem
    assert "Download" not in nodes.LoadWanVAE.validate_inputs("gone.safetensors")


def test_the_meter_is_comfyui_s_progress_bar(monkeypatch):
    told = []
    bar = SimpleNamespace(update_absolute=lambda done, total: told.append((done, total)))
    monkeypatch.setitem(sys.modules, "comfy.utils", SimpleNamespace(ProgressBar=lambda total: bar))
    host.meter(5)(2)
    monkeypatch.delitem(sys.modules, "comfy.utils")
    host.meter(5)(3)
    assert told == [(2, 5)]
