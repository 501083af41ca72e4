"""The subgraph blueprints: whole chains as one node each, which must fit the nodes as the workflows do."""

import json
from pathlib import Path
from typing import Any

import pytest

from .test_workflows import ROOT, check_against, described
from .texts import all_schemas

BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
FROM_OUTSIDE, TO_OUTSIDE = -10, -20  # the ids of what stands for the outer node's inputs and outputs

each_blueprint = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the node and what it is made of."""
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    [node], [definition] = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    return node, definition


def test_common_chains_have_one():
    names = {path.stem for path in BLUEPRINTS}
    chains = ("Text to Video{} (Wan 2.1)", "Image to Video{} (Wan 2.1)", "Text to Image{} (Qwen-Image)")
    assert names == {c.format(steps) for c in (*chains, "Edit{} (Qwen-Image)") for steps in ("", ", 4 steps")}


@each_blueprint
def test_what_it_is_made_of_fits_the_schemas(path: Path, nodes):
    """Its inputs come, for the check, from a node that gives what they say."""
    _, definition = read(path)
    given = {"id": FROM_OUTSIDE, "type": "Given", "inputs": [], "widgets_values": []}
    links = [
        [link["id"], link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"], link["type"]]
        for link in definition["links"]
        if link["target_id"] != TO_OUTSIDE
    ]
    inner = {"nodes": [*definition["nodes"], given], "links": links}
    kinds = [slot["type"] for slot in definition["inputs"]]
    known = {schema.node_id: described(schema) for schema in all_schemas(nodes)}
    check_against(inner, known | {"Given": {"input": {}, "output": kinds}})


@each_blueprint
def test_its_node_shows_what_goes_in_and_comes_out(path: Path):
    node, definition = read(path)
    assert node["type"] == definition["id"] and definition["name"] == path.stem
    for kind in ("inputs", "outputs"):
        shown = [(slot["name"], slot["type"]) for slot in node[kind]]
        assert shown == [(slot["name"], slot["type"]) for slot in definition[kind]]
    links = {link["id"]: link for link in definition["links"]}
    for i, slot in enumerate(definition["inputs"]):
        assert slot["linkIds"]
        assert all(
            (links[n]["origin_id"], links[n]["origin_slot"]) == (FROM_OUTSIDE, i) and links[n]["type"] == slot["type"]
            for n in slot["linkIds"]
        )
    for i, slot in enumerate(definition["outputs"]):
        [link] = [links[n] for n in slot["linkIds"]]
        assert (link["target_id"], link["target_slot"], link["type"]) == (TO_OUTSIDE, i, slot["type"])
    widgets = [slot for slot in node["inputs"] if "widget" in slot]
    assert len(node["widgets_values"]) == len(widgets) >= 4


@each_blueprint
def test_the_menu_says_what_it_is_for(path: Path):
    _, definition = read(path)
    assert definition["category"] == "WanQwen" and definition["description"].startswith(("Makes ", "Changes "))
    assert ("4 steps" in definition["description"]) == ("4 steps" in path.stem)


@each_blueprint
def test_the_sampler_has_room_for_its_report(path: Path):
    """As much as in a workflow, within its group."""
    _, definition = read(path)
    [sampler] = [node for node in definition["nodes"] if node["type"] == "WanQwenSampler"]
    [group] = [group["bounding"] for group in definition["groups"] if group["title"].endswith("Sample")]
    (_, top), (_, height) = sampler["pos"], sampler["size"]
    assert height >= 590 and top + height < group[1] + group[3]
