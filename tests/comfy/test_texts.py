"""What a real ComfyUI serves of our texts and pictures: translations, help pages, templates, blueprints."""

import json
import urllib.error

import pytest

from .convert import WORKFLOWS
from .test_workflows import ROOT, SNAPSHOT

PACK = "wanqwen"  # the folder's name in conftest.py


def test_translations(server):
    served = server.get("/i18n")
    for folder in (ROOT / "locales").iterdir():
        texts = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert {node: served[folder.name]["nodeDefs"][node] for node in texts} == texts


@pytest.mark.parametrize("node", SNAPSHOT)
def test_help_pages(server, node):
    for page in (ROOT / "web" / "docs" / node).iterdir():
        assert server.fetch(f"/extensions/{PACK}/docs/{node}/{page.name}") == page.read_bytes()


def test_templates_with_their_pictures(server):
    workflows = sorted(WORKFLOWS.glob("*.json"))
    assert sorted(server.get("/workflow_templates")[PACK]) == [path.stem for path in workflows]
    for path in workflows:
        for file in (path, path.with_suffix(".jpg")):
            assert server.fetch(f"/api/workflow_templates/{PACK}/{file.name}") == file.read_bytes()


def test_blueprints(server):
    try:
        served = server.get("/global_subgraphs")
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI knows no blueprints of node packs")
    names = {entry["name"] for entry in served.values() if PACK in entry["info"]["node_pack"]}
    assert names == {path.stem for path in (ROOT / "subgraphs").glob("*.json")}
