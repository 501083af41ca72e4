"""`python -m wanqwen download`, as a terminal would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import wanqwen
from wanqwen.__main__ import main
from wanqwen.downloads import catalog
from wanqwen.downloads import fetch as fetching
from wanqwen.downloads.catalog import FileSet, PublishedFile

from .conftest import CONTENT, FIRST
from .hub_double import Hub


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, file: PublishedFile) -> None:
    """A catalog of one set of one file."""
    sets = (FileSet(name="some-set", title="Some set", files=(file,)),)
    monkeypatch.setattr(catalog, "SETS", sets)
    monkeypatch.setattr("wanqwen.commands.download.SETS", sets)


def download(hub: Hub, models: Path, *more: str) -> int:
    return main(["download", "some-set", "--to", str(models), "--endpoint", hub.endpoint, *more])


def test_it_lists_the_sets(capsys):
    assert main(["download"]) == 0
    assert capsys.readouterr().out.split() == ["some-set", "0", "MB", "Some", "set"]


def test_it_fetches_shows_how_far_it_is_and_says_what_it_did(hub, models, capsys):
    hub.cuts = [100_000]
    assert download(hub, models) == 0
    said = capsys.readouterr()
    assert said.out.startswith("vae/some_vae.safetensors: fetched") and FIRST in said.out
    assert "some_vae.safetensors" in said.err and said.err.endswith("\n")
    assert (models / "vae" / "some_vae.safetensors").read_bytes() == CONTENT


def test_a_file_of_a_set_can_be_named(hub, models):
    assert main(["download", "some_vae.safetensors", "--to", str(models), "--endpoint", hub.endpoint]) == 0
    assert (models / "vae" / "some_vae.safetensors").is_file()


def test_a_dry_run_asks_nobody(hub, models, capsys):
    assert download(hub, models, "--dry-run") == 0
    assert "to fetch, 0 MB" in capsys.readouterr().out
    assert not hub.requests and not models.exists()


def test_check_names_what_is_damaged(hub, models, capsys):
    assert download(hub, models) == 0
    path = models / "vae" / "some_vae.safetensors"
    assert download(hub, models, "--check", "--dry-run") == 0
    assert "sha256 as published" in capsys.readouterr().out
    path.write_bytes(CONTENT[::-1])
    for more in (["--check"], ["--check", "--dry-run"]):
        assert download(hub, models, *more) == 2
        assert f"{path} has sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["some-set"], "--to is missing"),
        (["other", "--to", "."], "no set and no file called other: the sets are some-set"),
        (["some-set", "--to", "comfyui"], "is ComfyUI itself: name its folder of models, comfyui/models"),
        (["some-set", "--to", "a_file"], "a_file is a file: name a folder"),
        (["some-set", "--to", ".", "--dry-run", "--revision", "main"], "leave out --revision"),
    ],
)
def test_what_it_can_not_do_is_said(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "comfyui" / "models").mkdir(parents=True)
    (tmp_path / "comfyui" / "main.py").touch()
    (tmp_path / "a_file").touch()
    assert main(["download", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said.replace("\\", "/") and "Traceback" not in said


def test_ctrl_c_keeps_what_came(hub, models, monkeypatch, capsys):
    hub.stall_after = 100_000
    writes = fetching._Gauge.progress

    def interrupted(gauge):
        progress = writes(gauge)
        if progress.done >= 90_000:
            raise KeyboardInterrupt
        return progress

    with monkeypatch.context() as patch:
        patch.setattr(fetching._Gauge, "progress", interrupted)
        assert download(hub, models) == 130
    hub.release.set()
    hub.stall_after = None
    assert download(hub, models) == 0
    assert hub.contents[-1].start >= 90_000


def in_a_process(hub: Hub, models: Path, file: PublishedFile, **environment: str) -> subprocess.CompletedProcess[str]:
    """Fetch without a named endpoint, in a process whose environment says what it is."""
    package = models.parent / "package"
    code = (
        "from wanqwen.downloads.catalog import PublishedFile\n"
        "from wanqwen.downloads import fetch, files\n"
        "from pathlib import Path\n"
        "fetch.PAUSES = ()\n"
        f"print(fetch.fetch([{file!r}], files.layout(Path({str(models)!r})), lambda progress: None))"
    )
    package.mkdir()
    (package / "wanqwen").symlink_to(Path(wanqwen.__file__).resolve().parent)
    paths = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_a_mirror_is_asked_that_the_environment_names(hub, models, file):
    done = in_a_process(hub, models, file, HF_ENDPOINT=hub.endpoint)
    assert "fetched" in done.stdout, done.stderr
    assert (models / "vae" / "some_vae.safetensors").read_bytes() == CONTENT and len(hub.requests) == 3


def test_offline_by_the_user_s_wish_is_said(hub, models, file):
    done = in_a_process(hub, models, file, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in done.stderr and not hub.requests
