import gzip
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from wanqwen.core.weights.keymap import Renamer, inverse
from wanqwen.wan.keymap import (
    DIFFUSION_MODEL_SPELLINGS,
    IMAGE_ENCODER,
    IMAGE_ENCODER_APART,
    IMAGE_ENCODER_FUSED,
    IMAGE_ENCODER_IGNORED,
    IMAGE_ENCODER_SPELLINGS,
    TEXT_ENCODER_SPELLINGS,
    vae_spellings,
)

MANIFESTS = Path(__file__).parents[1] / "fixtures" / "manifests"
MAPS = json.loads(gzip.decompress((MANIFESTS / "name_maps.json.gz").read_bytes()))["maps"]


def numbered(name, layer):
    return name.replace("{i}", str(layer))


CASES = [
    *((f"wan_dit_{task}_official_to_diffusers", DIFFUSION_MODEL_SPELLINGS[1]) for task in ("t2v", "i2v", "flf2v")),
    ("wan_dit_vace_official_to_diffusers", DIFFUSION_MODEL_SPELLINGS[1]),
    ("wan_vae_official_to_diffusers (full list; also Qwen-Image VAE)", vae_spellings(2)[1]),
    ("umt5_official_to_huggingface", TEXT_ENCODER_SPELLINGS[1]),
]


@pytest.mark.parametrize(("key", "spelling"), CASES, ids=[key.split(" ")[0] for key, _ in CASES])
def test_every_published_name_is_renamed_both_ways(key, spelling):
    there, back = Renamer(spelling.table), Renamer(inverse(spelling.table))
    assert len(MAPS[key]) > 10
    for official, other in MAPS[key].items():
        # Only the first VACE block has a projection before it.
        official, other = (numbered(name, 0 if "before_proj" in official else 27) for name in (official, other))
        assert there(official) == other
        assert back(other) == official


@pytest.mark.parametrize(
    "spellings",
    [DIFFUSION_MODEL_SPELLINGS, TEXT_ENCODER_SPELLINGS, IMAGE_ENCODER_SPELLINGS, *map(vae_spellings, range(1, 5))],
)
def test_no_two_modules_share_a_name(spellings):
    for spelling in spellings:
        assert len(inverse(spelling.table)) == len(spelling.table)


def unfolded(name):
    """Return the names that a row of the published map stands for: `{weight,bias}` and the like, without remarks."""
    name = numbered(name.split(" ")[0], 27)
    choices = re.search(r"\{([a-z,]+)\}", name)
    if choices is None:
        return [name]
    return [one for word in choices[1].split(",") for one in unfolded(name.replace(choices[0], word, 1))]


def test_every_published_name_of_the_image_encoder_has_its_place():
    whole = Renamer(IMAGE_ENCODER)
    apart = [Renamer({IMAGE_ENCODER_FUSED: path}) for path in IMAGE_ENCODER_APART]
    found = {}
    for official, other in MAPS["clip_visual_official_to_huggingface"].items():
        names, others = unfolded(official), [name.removeprefix("vision_model.") for name in unfolded(other)]
        if "to_qkv" in official:
            assert [rename(name) for rename in apart for name in names] == others
        elif any(fnmatchcase(names[0], pattern) for pattern in IMAGE_ENCODER_IGNORED):
            assert all(any(fnmatchcase(name, p) for p in IMAGE_ENCODER_IGNORED) for name in (*names, *others))
        else:
            assert [whole(name) for name in names] == others
            found |= dict(zip(names, others, strict=True))
    assert len(found) == 15


def test_scales_follow_their_layer():
    rename = Renamer(inverse(DIFFUSION_MODEL_SPELLINGS[1].table))
    assert rename("blocks.7.attn2.to_out.0.scale_weight") == "blocks.7.cross_attn.o.scale_weight"
    assert rename("proj_out.weight_scale") == "head.head.weight_scale"


def test_text_encoder_names_are_those_of_transformers():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=6, num_layers=2, num_heads=2)
    with torch.device("meta"):
        theirs = set(dict(UMT5EncoderModel(config).named_parameters()))
    rename = Renamer(inverse(TEXT_ENCODER_SPELLINGS[1].table))
    official = {rename(name) for name in theirs}
    assert None not in official
    assert {Renamer(TEXT_ENCODER_SPELLINGS[1].table)(name) for name in official} == theirs
