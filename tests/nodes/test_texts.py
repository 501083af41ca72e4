"""Names, tooltips and help pages say every node and input, in every language, and nothing that is no more."""

import re

import pytest

from .texts import LANGUAGES, LISTS, ROOT, all_schemas, english, lists, locale, page_file

WRITE = "run .venv/bin/python -m wanqwen.tests.nodes.texts"
MEANT_BY_THE_EDITOR = re.compile(r"[{}@|]")  # the editor's message format reads these as its own
SCRIPTS = {"zh": re.compile(r"[\u4e00-\u9fff]"), "ja": re.compile(r"[\u3040-\u30ff]"), "fr": re.compile(r"[a-zà-ÿ]{2}")}
QUOTED = re.compile(r"^- \*(?!\*)(.+?)\*(?::|：| :)", re.MULTILINE)  # a message, at the head of what it means

translated = pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
documented = pytest.mark.parametrize("language", LISTS)


def test_english_is_what_the_schemas_say(nodes):
    said = {schema.node_id: english(schema) for schema in all_schemas(nodes)}
    assert locale("en") == said, WRITE


@translated
def test_every_name_and_tooltip_is_translated(nodes, language):
    known, english_texts = locale(language), locale("en")
    assert list(known) == [schema.node_id for schema in all_schemas(nodes)]
    for schema in all_schemas(nodes):
        texts, source = known[schema.node_id], english_texts[schema.node_id]
        assert list(texts["inputs"]) == [slot.id for slot in schema.inputs], schema.node_id
        assert list(texts["outputs"]) == [str(i) for i in range(len(schema.outputs))], schema.node_id
        pairs = [(texts["description"], source["description"])]
        for kind in ("inputs", "outputs"):
            pairs += [(texts[kind][name]["tooltip"], source[kind][name]["tooltip"]) for name in texts[kind]]
            assert all(texts[kind][name]["name"].strip() for name in texts[kind]), schema.node_id
        for text, said in pairs:
            assert text != said and SCRIPTS[language].search(text), f"{schema.node_id}: {text or said}"


@translated
def test_tooltips_call_inputs_as_they_are_shown(nodes, language):
    """By their translated names, not by ids, which the editor does not show."""
    for node_id, texts in locale(language).items():
        hidden = [name for name, said in texts["inputs"].items() if "_" in name and said["name"] != name]
        for said in texts["inputs"].values():
            assert not [name for name in hidden if re.search(rf"\b{name}\b", said["tooltip"], re.ASCII)], (
                node_id,
                said,
            )


@translated
def test_translated_options_exist(nodes, language):
    """The option's own word stays in sight, because tutorials, workflows and errors have it."""
    for schema in all_schemas(nodes):
        for slot in schema.inputs:
            options = locale(language)[schema.node_id]["inputs"][slot.id].get("options", {})
            assert set(options) <= set(slot.options.get("options", ())), (schema.node_id, slot.id)
            assert all(shown.startswith(value) for value, shown in options.items()), (schema.node_id, slot.id)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_editor_takes_every_text_literally(language):
    assert not MEANT_BY_THE_EDITOR.findall(str(_strings(locale(language))))


def _strings(texts) -> list[str]:
    parts = texts.values() if isinstance(texts, dict) else [texts]
    return [text for part in parts for text in (_strings(part) if isinstance(part, dict) else [part])]


@documented
def test_every_node_has_a_help_page(nodes, language):
    """A title, what the node is for, typical values, what goes wrong, and all inputs and outputs."""
    for schema in all_schemas(nodes):
        page, texts = page_file(schema.node_id, language), locale(language)[schema.node_id]
        text = page.read_text(encoding="utf-8")
        title, intro, *sections = text.split("\n\n")
        assert title == f"# {texts['display_name']}", page
        assert len(intro) > 10 and len(sections) == 4 and all(part.startswith("## ") for part in sections), page
        assert all(part.count("\n- ") >= 2 for part in sections[:2]), page
        assert text.endswith(lists(schema, language, texts)), f"{page}: {WRITE}"


def test_no_help_page_is_of_a_node_that_is_gone(nodes):
    ids = {schema.node_id for schema in all_schemas(nodes)}
    assert {path.name for path in (ROOT / "web" / "docs").iterdir()} == ids
    assert {path.name for path in (ROOT / "web" / "docs").glob("*/*")} == {f"{language}.md" for language in LISTS}


@documented
def test_help_pages_quote_messages_that_exist(nodes, language):
    """What goes wrong is headed by words of the message that says so."""
    folders = ("nodes", "wan", "qwen_image", "core", "downloads")
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that go on in the next line
    source = re.sub(r"\{[^{}]*\}", "...", source)
    pages = [page_file(schema.node_id, language).read_text(encoding="utf-8") for schema in all_schemas(nodes)]
    quoted = [words for page in pages for words in QUOTED.findall(page)]
    assert len(quoted) >= 7
    for words in quoted:
        parts = re.sub(r"\d+", "...", words).split("...")
        assert all(part.strip() in source for part in parts), words
