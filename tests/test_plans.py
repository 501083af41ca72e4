"""Plans of the published models for cards of 24 GB and less, from headers alone."""

import json
from itertools import pairwise

import pytest
from wanqwen.__main__ import main
from wanqwen.core.types import ModelHandle
from wanqwen.loading import load_model
from wanqwen.plans import Question, facts, render

from .manifests import write_sparse

MODELS = {
    "t2v-1.3B": "wan21_comfy_t2v_1.3B_fp16",
    "t2v-14B": "wan21_comfy_t2v_14B_fp16_INFERRED",
    "t2v-14B fp8": "wan21_comfy_t2v_14B_fp8_scaled_INFERRED",
    "i2v-14B": "wan21_official_i2v_14B_480P_and_720P",
    "flf2v-14B": "wan21_comfy_flf2v_720p_14B_fp16",
    "vace-1.3B": "wan21_official_vace_1.3B",
    "vace-14B": "wan21_official_vace_14B",
    "t2i": "qwen_comfy_bf16",
}
VIDEO = {"width": 1280, "height": 720, "frames": 81}
CLIP = {"width": 832, "height": 480, "frames": 81}
STILL = {"width": 1328, "height": 1328}
EDIT = {"width": 1024, "height": 1024, "references": 2, "text_tokens": 800}
SCENES = [
    ("t2v-1.3B", CLIP),
    ("t2v-1.3B", VIDEO),
    ("t2v-14B", CLIP),
    ("t2v-14B", VIDEO),
    ("t2v-14B fp8", VIDEO),
    ("i2v-14B", CLIP),
    ("i2v-14B", VIDEO),
    ("flf2v-14B", VIDEO),
    ("vace-1.3B", CLIP),
    ("vace-14B", CLIP),
    ("t2i", STILL),
    ("t2i", EDIT),
]


@pytest.fixture(scope="module")
def handles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelHandle]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: load_model(write_sparse(folder / f"{name.replace(' ', '_')}.safetensors", file))
        for name, file in MODELS.items()
    }


@pytest.mark.parametrize(("model", "scene"), SCENES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_model_runs_on_every_tier(handles: dict[str, ModelHandle], model: str, scene: dict) -> None:
    found = [facts(handles[model], Question(**scene, vram=vram, ram=32)) for vram in (24, 16, 12, 8)]
    for plan, vram in zip(found, (24, 16, 12, 8), strict=True):
        assert len(plan["lines"]) <= 3, plan["lines"]  # no notice that it may run out of memory
        assert plan["peak_gb"] + 0.5 < vram * 1.0737 - 0.6
        assert plan["text_encoder"]["peak_gb"] < vram * 1.0737 - 1.1
        sees = model.startswith(("i2v", "flf2v"))
        assert (plan["image_encoder"] is not None) == sees
        assert not sees or 1 < plan["image_encoder"]["peak_gb"] < 1.5  # 31 of its blocks in fp16
        assert plan["vae"]["mode"] != "tiles" and plan["vae"]["peak_gb"] < vram * 1.0737 - 1.1
        assert plan["pinned_ram_gb"] < 32 * 1.0737 - 7.9
        assert plan["resident"] + len(plan["streaming"]) == plan["blocks"]
    assert all(more["resident"] >= less["resident"] for more, less in pairwise(found))


def test_a_model_with_controls_says_where_its_largest_size_does_not_fit(handles: dict[str, ModelHandle]) -> None:
    """At 720p the clip's tokens and the control's take 3.1 GB, and a block's work as much."""
    found = [facts(handles["vace-14B"], Question(**VIDEO, vram=vram, ram=32)) for vram in (12, 8)]
    assert [plan["blocks"] for plan in found] == [48, 48] and len(found[0]["lines"]) <= 3
    assert "it may run out of memory" in found[1]["lines"][-1]
    assert found[0]["step_seconds"] < 1.001 * found[0]["compute_seconds"]


def test_wan_hides_every_transfer_and_the_picture_model_does_with_its_passes_together(
    handles: dict[str, ModelHandle],
) -> None:
    for scene in (CLIP, VIDEO):
        for card in ("RTX 3090", "RTX 4090"):
            plan = facts(handles["t2v-14B"], Question(**scene, card=card))
            assert plan["step_seconds"] < 1.001 * plan["compute_seconds"]
    plan = facts(handles["t2i"], Question(**STILL, ram=64))
    assert plan["interleaved"] and plan["step_seconds"] < 1.001 * plan["compute_seconds"]


def test_a_machine_of_32_gb_runs_models_larger_than_that(handles: dict[str, ModelHandle]) -> None:
    plan = facts(handles["t2i"], Question(**STILL, vram=12, ram=32))
    assert plan["sources"]["disk"] and plan["sources"]["pinned"] and plan["streaming"]
    plan = facts(handles["t2i"], Question(**STILL, vram=12, ram=8))
    assert plan["sources"] == {"disk": len(plan["streaming"])}


def test_the_command_prints_lines_or_json(handles: dict[str, ModelHandle], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(handles["t2v-14B"].checkpoint.path)
    command = ["plan", "--model", path, "--size", "832x480x81", "--vram", "12", "--ram", "32"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "t2v-14B.safetensors (t2v-14B, fp16) at 832x480x81 on a RTX 4090 with 12 GB, 32 GB of RAM" in text
    assert "of 40 blocks stay on the device" in text and "after it the VAE in float32" in text
    fixed = ["--swap", "40", "--slots", "3", "--source", "disk", "--no-interleave", "--headroom-gb", "1", "--json"]
    assert main([*command, *fixed]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["resident"], found["slots"], found["sources"]) == (0, 3, {"disk": 40})
    assert found["interleaved"] is False
    assert main([*command, "--card", "Voodoo 2"]) == 2
    assert "Nothing is known of the speed of 'Voodoo 2': choose RTX 3090" in capsys.readouterr().err
    assert main([*command[:-3], "1", "--ram", "32"]) == 2
    assert "for the least of this model's weights that must be on the card" in capsys.readouterr().err
    assert main([*command, "--swap", "41"]) == 2
    assert "the model has 40: give 0 to 40" in capsys.readouterr().err


def test_a_miniature_has_no_published_text_encoder(handles: dict[str, ModelHandle]) -> None:
    from wanqwen.loading import DEMO_FOLDER

    found = facts(load_model(DEMO_FOLDER / "wan_dit.safetensors"), Question(width=64, height=64, frames=9))
    assert (
        found["text_encoder"] is None and found["image_encoder"] is None and found["resident"] == found["blocks"] == 4
    )
    assert "text encoder" not in render(found)
