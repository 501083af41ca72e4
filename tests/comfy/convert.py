"""A workflow as the editor saves it, made into the prompt that the server runs, as the editor does."""

import json
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
MODEL, TEXT_ENCODER, VAE, PROMPT, SIZE, SAMPLER, DECODE, VIDEO, SAVE = map(str, range(1, 10))  # ids in our workflows
TINY = "tiny.safetensors"  # the random checkpoint in each model folder, see conftest.py

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")  # of the editor alone


def read_workflow(name: str) -> dict[str, Any]:
    """Return one of our workflows."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def of_type(prompt: dict[str, Any], class_type: str) -> list[str]:
    """Return the ids of all nodes of a type, in the order of the workflow."""
    return [node for node, content in prompt.items() if content["class_type"] == class_type]


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt. Raises KeyError for a node that the server lacks, ValueError for values without a widget."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": _widget_values(node, object_info[node["type"]]) | _linked(node, sources),
        }
        for node in workflow["nodes"]
        if node["type"] not in NOTES
    }


def _linked(node: dict[str, Any], sources: dict[int, list[Any]]) -> dict[str, Any]:
    return {slot["name"]: sources[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}


def _widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    values = iter(node.get("widgets_values", []))
    found = {}
    for kind in ("required", "optional"):
        for name, (socket, *rest) in info["input"].get(kind, {}).items():
            options = rest[0] if rest else {}
            if options.get("forceInput") or not (isinstance(socket, list) or socket in WIDGETS):
                continue
            try:
                found[name] = next(values)
            except StopIteration:
                raise ValueError(f"{node['type']} {node['id']}: no value for {name}") from None
            if options.keys() & {"control_after_generate", "image_upload", "video_upload"}:
                next(values)  # what becomes of the seed after a run, or the upload button: for the editor alone
    if left := list(values):
        raise ValueError(f"{node['type']} {node['id']}: {left} belong to no widget")
    return found
