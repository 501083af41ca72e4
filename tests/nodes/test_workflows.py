"""Every workflow fits the nodes, ours and those of ComfyUI's that it uses, and is laid out to be read."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wanqwen.downloads.catalog import SETS
from wanqwen.tests.comfy.convert import NOTES, to_prompt

from .texts import ROOT, all_schemas

FOLDER = ROOT / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
# What /object_info of ComfyUI 0.3.64 says of the nodes of its own that our workflows use; lists of files are left out.
STOCK = json.loads((ROOT / "tests" / "fixtures" / "stock_nodes.json").read_text(encoding="utf-8"))
FILE_LISTS = ("file", "image", "video")
TITLE = 30  # pixels that a node's title takes above its position
LARGEST_PICTURE = 60_000

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def described(schema) -> dict[str, Any]:
    """Return a schema of ours as /object_info gives it."""
    inputs = {
        kind: {
            slot.id: [slot.type, slot.options]
            for slot in schema.inputs
            if bool(slot.options.get("optional")) == (kind == "optional")
        }
        for kind in ("required", "optional")
    }
    return {"input": inputs, "output": [slot.type for slot in schema.outputs]}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_is_one_for_every_task():
    names = {path.stem for path in WORKFLOWS}
    wan = ("text_to_video", "image_to_video", "first_last_frame", "vace", "vace_inpaint", "video_to_video")
    tasks = {f"wan21_{task}" for task in (*wan, "text_to_image", "long_video")}
    tasks |= {f"qwen_image_{task}" for task in ("text_to_image", "edit", "edit_multiple", "inpaint")}
    assert tasks | {f"{task}_4_steps" for task in tasks} <= names
    assert len([name for name in names if name.startswith("demo_")]) >= 7


@each_workflow
def test_nodes_sockets_and_values_fit_the_schemas(path: Path, nodes):
    check_against(read(path), {schema.node_id: described(schema) for schema in all_schemas(nodes)})


def check_against(workflow: dict[str, Any], ours: dict[str, Any]) -> None:
    """Fail where a workflow has a node, socket or value that there is not."""
    object_info = STOCK | ours
    prompt = to_prompt(workflow, object_info)  # fails for a value too many or too few
    for node in prompt.values():
        kind, known = node["class_type"], object_info[node["class_type"]]["input"]
        slots = known.get("required", {}) | known.get("optional", {})
        assert set(known.get("required", {})) <= set(node["inputs"]) <= set(slots), kind
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source, output = value
                given = object_info[prompt[source]["class_type"]]["output"][output]
                assert slots[name][0] in (given, "*"), f"{kind}: {given} into {name}"
            else:
                assert is_legal(value, *slots[name], name), f"{kind}: {name} is {value!r}"


def is_legal(value: Any, kind: str, options: dict[str, Any], name: str) -> bool:
    """Say whether a widget takes a value; any file may be asked for, but for the miniatures, which must be there."""
    if kind == "COMBO":
        asks_for_file = name in FILE_LISTS and not str(value).startswith("demo/")
        return asks_for_file or value in options["options"]
    if kind in ("INT", "FLOAT"):
        on_step = kind == "FLOAT" or (isinstance(value, int) and (value - options["min"]) % options.get("step", 1) == 0)
        return not isinstance(value, bool) and on_step and options["min"] <= value <= options["max"]
    return isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind])


@each_workflow
def test_links_are_the_same_at_both_ends(path: Path):
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    at_inputs = {slot["link"] for node in nodes.values() for slot in node.get("inputs", ()) if slot["link"] is not None}
    assert at_inputs == {link[0] for link in workflow["links"]}
    for number, source, output, target, _, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"], number
        [slot] = [slot for slot in nodes[target]["inputs"] if slot["link"] == number]
        assert slot["type"] == kind, number
    assert workflow["last_node_id"] >= max(nodes) and workflow["last_link_id"] >= max(at_inputs)


@each_workflow
def test_it_reads_from_left_to_right(path: Path):
    """Numbered groups, every node in one of them, nothing on top of another thing, no link that goes back."""
    workflow = read(path)
    groups = sorted(workflow["groups"], key=lambda group: group["bounding"][0])
    assert [group["title"].split(". ")[0] for group in groups] == [str(i + 1) for i in range(len(groups))]
    for first, second in pairs([group["bounding"] for group in groups]):
        assert not overlap(first, second)
    working = [node for node in workflow["nodes"] if node["type"] not in NOTES]
    notes = [node for node in workflow["nodes"] if node["type"] in NOTES]
    for node in working:
        assert sum(within(box(node), group["bounding"]) for group in groups) == 1, node["type"]
    for first, second in pairs([box(node) for node in workflow["nodes"]]):
        assert not overlap(first, second)
    assert not any(overlap(box(note), group["bounding"]) for note in notes for group in groups)
    left = {node["id"]: node["pos"][0] for node in working}
    assert all(left[link[1]] <= left[link[3]] for link in workflow["links"])


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Return left, top, width and height of a node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, width, height + TITLE


def overlap(a, b) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def within(a, b) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[0] + a[2] <= b[0] + b[2] and a[1] + a[3] <= b[1] + b[3]


def pairs(boxes: list) -> Iterator[tuple]:
    return ((a, b) for i, a in enumerate(boxes) for b in boxes[:i])


PUBLISHED = {file.name: file for known in SETS for file in known.files}  # what Download (WanQwen) fetches
TITLES = re.compile(r"(?<!\*)\*([^*]+)\*(?!\*)")  # in italics
FOLDERS = {
    "WanQwenLoadWanModel": "diffusion_models", "WanQwenLoadQwenImageModel": "diffusion_models", "WanQwenLoRA": "loras",
    "WanQwenLoadWanTextEncoder": "text_encoders", "WanQwenLoadQwenImageTextEncoder": "text_encoders",
    "WanQwenLoadWanVAE": "vae", "WanQwenLoadWanImageEncoder": "clip_vision",
}  # fmt: skip


@each_workflow
def test_it_says_which_files_go_where(path: Path):
    """In a note, which names the sets that Download (WanQwen) has, and to the editor, which offers missing files."""
    workflow = read(path)
    [note] = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES]
    used = {node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in FOLDERS}
    wanted = {known.title for known in SETS if {file.name for file in known.files} <= used}
    asked, found, _ = note.partition("Then press")
    assert set(TITLES.findall(asked) if found else ()) == wanted
    for node in workflow["nodes"]:
        if node["type"] not in FOLDERS:
            continue
        folder, file = FOLDERS[node["type"]], node["widgets_values"][0]
        if path.stem.startswith("demo_"):
            assert file.startswith("demo/")
            continue
        [offer] = node["properties"]["models"]
        assert (offer["name"], offer["directory"]) == (file, folder)
        assert offer["url"].startswith("https://huggingface.co/") and offer["url"].endswith(f"/{file}")
        assert f"| `models/{folder}` | [{file}]({offer['url']})" in note
        if listed := PUBLISHED.get(file):
            assert offer["url"] == f"https://huggingface.co/{listed.repo}/resolve/main/{listed.path}"


@each_workflow
def test_it_has_a_picture_for_the_template_browser(path: Path):
    from PIL import Image

    picture = path.with_suffix(".jpg")  # the only ending that ComfyUI's browser asks for
    assert picture.stat().st_size < LARGEST_PICTURE
    with Image.open(picture) as image:
        assert image.size == (512, 288)


def test_no_picture_is_of_a_workflow_that_is_gone():
    assert {path.stem for path in FOLDER.glob("*.jpg")} == {path.stem for path in WORKFLOWS}
