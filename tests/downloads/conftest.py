"""A hub, a file on it, and a folder of models to fetch it into."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from wanqwen.downloads import fetch as fetching
from wanqwen.downloads.catalog import PublishedFile
from wanqwen.downloads.files import layout

from .hub_double import Hub

REPO = "owner/weights"
PATH = "split_files/vae/some_vae.safetensors"
FIRST, SECOND = "1" * 40, "2" * 40
CONTENT = os.urandom(200_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(fetching, "PAUSES", (0.02,) * 4)
    with closing(Hub()) as double:
        yield double


@pytest.fixture
def file(hub: Hub) -> PublishedFile:
    sha256 = hub.publish(FIRST, REPO, PATH, CONTENT)
    return PublishedFile(repo=REPO, path=PATH, folder="vae", size=len(CONTENT), sha256=sha256)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def fetch(hub: Hub, models: Path):
    """Fetch files into the folder and return what is said of them; `watch` looks on."""

    def run(*files: PublishedFile, watch=lambda progress: None, **options) -> list[str]:
        outcomes = fetching.fetch(files, layout(models), watch, endpoint=hub.endpoint, **options)
        return [outcome.line for outcome in outcomes]

    return run
