import pytest
from wanqwen.core.weights.keymap import Renamer, inverse
from wanqwen.qwen_image.keymap import DIFFUSION_MODEL_SPELLINGS, TEXT_ENCODER_SPELLINGS
from wanqwen.tests.manifests import manifest

OFFICIAL, TRANSFORMERS_5, ALONE, _ = TEXT_ENCODER_SPELLINGS
RENAMED = manifest("name_maps")["maps"]["qwen2_5_vl_old_to_new_transformers"]


def test_published_renaming_of_transformers_5_is_ours() -> None:
    """The map writes the layers with `*`; `model.` is a prefix of this spelling; the head is not part of the model."""
    there = Renamer(TRANSFORMERS_5.table)
    checked = 0
    for old, new in RENAMED.items():
        if old.startswith("lm_head"):
            continue
        for tail in ("self_attn.q_proj.bias", "blocks.3.attn.qkv.weight"):
            official, other = (name.replace("{i}", "27").replace("*", tail) for name in (old, new))
            if (renamed := there(official)) is not None:
                assert f"model.{renamed}" == other
                checked += 1
    assert checked >= len(RENAMED) - 1


@pytest.mark.parametrize("spelling", [*DIFFUSION_MODEL_SPELLINGS, *TEXT_ENCODER_SPELLINGS], ids=lambda s: s.name)
def test_renaming_goes_both_ways(spelling) -> None:
    there, back = Renamer(spelling.table), Renamer(inverse(spelling.table))
    for path in spelling.table:
        name = f"{path.replace('{}', '11')}.weight"
        assert back(there(name)) == name


def test_scales_follow_their_layer() -> None:
    back = Renamer(inverse(TRANSFORMERS_5.table))
    assert back("language_model.layers.3.mlp.up_proj.scale_weight") == "model.layers.3.mlp.up_proj.scale_weight"
    assert back("visual.merger.mlp.2.weight_scale") == "visual.merger.mlp.2.weight_scale"
    assert Renamer(inverse(ALONE.table))("norm.weight") == "model.norm.weight"
