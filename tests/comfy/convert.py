"""A workflow as the editor saves it, made into the prompt that the server runs, as the editor does."""

import json
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
MODEL, TEXT_ENCODER, VAE, PROMPT, SIZE, SAMPLER, DECODE, VIDEO, SAVE = map(str, range(1, 10))  # ids in our workflows
TINY = "tiny.safetensors"  # the random checkpoint in each model folder, see conftest.py

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")  # the last one of newer versions
NOTES = ("Note", "MarkdownNote")  # of the editor alone


def read_workflow(name: str) -> dict[str, Any]:
    """Return one of our workflows."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def of_type(prompt: dict[str, Any], class_type: str) -> list[str]:
    """Return the ids of all nodes of a type, in the order of the workflow."""
    return [node for node, content in prompt.items() if content["class_type"] == class_type]


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt.

    Raises KeyError for a node that the server lacks, ValueError for values without a widget, and the other way round in
    a node of ours.
    """
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
    values, num_buttons = iter(node.get("widgets_values", [])), 0
    found = {}
    for kind in ("required", "optional"):
        for name, (socket, *rest) in info["input"].get(kind, {}).items():
            options = rest[0] if rest else {}
            if options.get("forceInput") or not (isinstance(socket, list) or socket in WIDGETS):
                continue
            try:
                found[name] = next(values)
            except StopIteration:
                if info["python_module"].startswith("custom_nodes"):
                    raise ValueError(f"{node['type']} {node['id']}: no value for {name}") from None
                # A widget that a newer ComfyUI gave its own node: the editor takes the default.
                found[name] = options.get("default", (options.get("options") or socket)[0])
            if "control_after_generate" in options:
                next(values)  # what becomes of the seed after a run: for the editor alone
            num_buttons += bool(options.keys() & {"image_upload", "video_upload"})  # after all other values
    left = list(values)[num_buttons:]
    if left:
        raise ValueError(f"{node['type']} {node['id']}: {left} belong to no widget")
    return found
