"""What workflows that people saved rely on: node ids, inputs and their order."""

import json
import sys
from pathlib import Path

from .texts import all_schemas

SNAPSHOT = Path(__file__).parents[1] / "fixtures" / "schema_snapshot.json"


def slots(schema) -> dict[str, list[list[str]]]:
    """Return a schema as the snapshot holds it: what ComfyUI shows and saves, required inputs first."""
    inputs = sorted(schema.inputs, key=lambda slot: bool(slot.options.get("optional")))
    return {
        "required": [[slot.id, slot.type] for slot in inputs if not slot.options.get("optional")],
        "optional": [[slot.id, slot.type] for slot in inputs if slot.options.get("optional")],
        "outputs": [[slot.options["display_name"], slot.type] for slot in schema.outputs],
    }


def test_nobody_s_workflow_breaks(nodes):
    """Required inputs are frozen; optional inputs and outputs may only be added at the end, new nodes at will."""
    found = {schema.node_id: slots(schema) for schema in all_schemas(nodes)}
    for node_id, saved in json.loads(SNAPSHOT.read_text(encoding="utf-8")).items():
        # Newer versions of ComfyUI move workflows on to another node: ComfyAPI().node_replacement.register(
        # io.NodeReplace(old_node_id=..., new_node_id=..., input_mapping=...)) in Extension.on_load.
        assert node_id in found, f"{node_id} is gone: keep it, for the versions that know no replacements"
        now = found[node_id]
        assert now["required"] == saved["required"], node_id
        for kind in ("optional", "outputs"):
            assert now[kind][: len(saved[kind])] == saved[kind], (node_id, kind)


def test_comfyui_may_leave_out_what_the_user_left_out(nodes):
    """A missing argument would hide ComfyUI's own message, which names the input."""
    checking = [node for node in nodes.NODES if "validate_inputs" in vars(node)]
    assert checking and all(node.validate_inputs() is True for node in checking)


def test_the_snapshot_knows_every_input(nodes):
    """A new node or input goes into the snapshot with the change that adds it."""
    found = {schema.node_id: slots(schema) for schema in all_schemas(nodes)}
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_every_node_and_input_explains_itself(nodes):
    for schema in all_schemas(nodes):
        assert schema.display_name and schema.description and schema.category == "WanQwen", schema.node_id
        silent = [slot.id for slot in (*schema.inputs, *schema.outputs) if not slot.options.get("tooltip")]
        assert not silent, f"{schema.node_id}: no tooltip on {silent}"


def test_ids_of_inputs_are_unique_and_start_with_the_pack(nodes):
    for schema in all_schemas(nodes):
        ids = [slot.id for slot in schema.inputs]
        assert len(set(ids)) == len(ids) and schema.node_id.startswith("WanQwen")


def test_defaults_are_within_their_own_limits(nodes):
    for schema in all_schemas(nodes):
        for slot in schema.inputs:
            default, options = slot.options.get("default"), slot.options
            if slot.type in ("INT", "FLOAT"):
                assert options["min"] <= default <= options["max"], (schema.node_id, slot.id)
            elif slot.type == "COMBO" and default is not None:
                assert default in options["options"], (schema.node_id, slot.id)


def test_every_node_is_found_by_other_words_where_comfyui_can(nodes, monkeypatch):
    """Its older versions refuse the argument, so theirs go without."""
    assert not any(hasattr(schema, "search_aliases") for schema in all_schemas(nodes))
    older = sys.modules["comfy_api.latest"].io.Schema

    def newer(*, search_aliases: list[str], **facts):
        schema = older(**facts)
        schema.search_aliases = search_aliases
        return schema

    monkeypatch.setattr(sys.modules["comfy_api.latest"].io, "Schema", newer)
    for schema in all_schemas(nodes):
        assert len(schema.search_aliases) >= 2, schema.node_id
        assert schema.display_name.lower() not in schema.search_aliases
