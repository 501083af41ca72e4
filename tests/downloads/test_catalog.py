"""The catalog: against what is known of the published files, and against itself."""

import re
from itertools import chain
from pathlib import Path

import pytest
from wanqwen.downloads.catalog import MAIN, SETS, PublishedFile, files_of, set_with
from wanqwen.tests.manifests import MANIFESTS, manifest

WORKFLOWS = sorted(Path(__file__).parents[2].joinpath("workflows").glob("*.json"))
FILES = sorted(set(chain.from_iterable(known.files for known in SETS)), key=lambda file: file.name)
FOLDERS = {"diffusion_models", "text_encoders", "vae", "clip_vision", "loras"}
each_file = pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
LINK = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/[^/]+/([^)\"\\?]+)")
# No public record states its size, which is not that of the other LoRAs of this publisher.
UNKNOWN = ("lightx2v/Qwen-Image-Lightning", "Qwen-Image-Lightning-4steps-V2.0-bf16.safetensors")


@each_file
def test_entries_are_well_formed(file: PublishedFile) -> None:
    assert file.folder in FOLDERS and file.path.endswith(".safetensors") and file.repo.count("/") == 1
    assert file.revision == MAIN or re.fullmatch("[0-9a-f]{40}", file.revision)
    assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert file.size > 10_000_000


def test_names_and_hashes_name_one_file_each() -> None:
    assert len({file.name for file in FILES}) == len(FILES)
    hashes = [file.sha256 for file in FILES if file.sha256]
    assert len(set(hashes)) == len(hashes)
    words = [word for known in SETS for word in (known.name, known.title)]
    assert len(set(words)) == len(words)


def test_a_set_or_a_file_is_found_by_name() -> None:
    assert files_of("qwen-image") == files_of("Qwen-Image (fp8)") and len(files_of("qwen-image")) == 3
    assert [file.folder for file in files_of("wan_2.1_vae.safetensors")] == ["vae"]
    with pytest.raises(ValueError, match=r"no file called wan: the sets are wan21-t2v-1.3b, "):
        files_of("wan")
    assert set_with("clip_vision_h.safetensors").name == "wan21-i2v-480p" and set_with("mine.safetensors") is None


def test_a_model_comes_with_what_it_needs() -> None:
    for known in SETS:
        folders = [file.folder for file in known.files]
        if "diffusion_models" in folders:
            needs = ["diffusion_models", "text_encoders", "vae"]
            assert folders == (needs + ["clip_vision"] * any(part in known.name for part in ("-i2v", "-flf2v")))


def test_sizes_are_those_of_the_manifests() -> None:
    """A manifest states the size of the files that it names in full."""
    known = {file.name: file.size for file in FILES}
    compared = set()
    for path in MANIFESTS.glob("*.json.gz"):
        stated = manifest(path.name.removesuffix(".json.gz"))
        for name in re.findall(r"[\w.-]+\.safetensors", stated.get("file", "")):
            if name in known and stated.get("published_file_bytes"):
                assert known[name] == stated["published_file_bytes"], name
                compared.add(name)
    assert len(compared) == 14


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_workflows_link_to_files_of_the_catalog(path: Path) -> None:
    places = {(file.repo, file.path) for file in FILES}
    links = set(LINK.findall(path.read_text(encoding="utf-8")))
    assert links - {UNKNOWN} <= places and (links or path.stem.startswith("demo_"))
