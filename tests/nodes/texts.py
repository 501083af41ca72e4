"""What ComfyUI shows of our nodes besides the schemas: names and tooltips in four languages, help pages in three.

After a change of a schema, and of the other languages by hand, this writes what follows from them: locales/en, and the
lists of inputs and outputs that end every help page.

    .venv/bin/python -m wanqwen.tests.nodes.texts
"""

import asyncio
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import comfy_double

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "zh", "fr", "ja")
# What closes a help page: the titles of its lists, and how a line says what a name means.
LISTS = {"en": ("Inputs", "Outputs", ": "), "zh": ("输入", "输出", "："), "fr": ("Entrées", "Sorties", " : ")}

Texts = dict[str, Any]  # of one node, as in nodeDefs.json


def locale_file(language: str) -> Path:
    return ROOT / "locales" / language / "nodeDefs.json"


def locale(language: str) -> dict[str, Texts]:
    return json.loads(locale_file(language).read_text(encoding="utf-8"))


def page_file(node_id: str, language: str) -> Path:
    """Return where the editor looks for a node's help."""
    return ROOT / "web" / "docs" / node_id / f"{language}.md"


def all_schemas(nodes) -> list:
    listed = asyncio.run(nodes.Extension().get_node_list())
    return [node.define_schema() for node in listed]


def english(schema) -> Texts:
    """Return what a schema says, in the form of nodeDefs.json."""
    inputs = {slot.id: {"name": slot.id, "tooltip": slot.options["tooltip"]} for slot in schema.inputs}
    outputs = [(slot.options["display_name"], slot.options["tooltip"]) for slot in schema.outputs]
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


def lists(schema, language: str, texts: Texts) -> str:
    """Return the lists of inputs and outputs that close a node's help page."""
    inputs, outputs, colon = LISTS[language]
    ids = [slot.options["display_name"] for slot in schema.outputs]
    rows = [
        *(_row(slot.id, texts["inputs"][slot.id], colon) for slot in schema.inputs),
        f"\n## {outputs}",
        *(_row(name, texts["outputs"][str(i)], colon) for i, name in enumerate(ids)),
    ]
    return "\n".join([f"## {inputs}", *rows]) + "\n"


def _row(name: str, said: dict[str, str], colon: str) -> str:
    shown = f"`{name}`" if said["name"] == name else f"**{said['name']}** (`{name}`)"
    return f"- {shown}{colon}{said['tooltip']}"


def write(schemas: list) -> None:
    """Write locales/en, and the closing lists of all help pages."""
    texts = {schema.node_id: english(schema) for schema in schemas}
    locale_file("en").parent.mkdir(parents=True, exist_ok=True)
    locale_file("en").write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    for language, (inputs, *_) in LISTS.items():
        known = locale(language)
        for schema in schemas:
            page = page_file(schema.node_id, language)
            by_hand = page.read_text(encoding="utf-8").split(f"## {inputs}\n")[0]
            page.write_text(by_hand + lists(schema, language, known[schema.node_id]), encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as models:
        sys.modules.update(comfy_double.modules(Path(models)))
        write(all_schemas(importlib.import_module("wanqwen.nodes")))
