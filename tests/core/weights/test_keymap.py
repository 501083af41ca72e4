import pytest
from wanqwen.core.types import Spelling
from wanqwen.core.weights import keymap

ROWS = {
    "blocks.{}.q": ("layers.{}.to_q", keymap.LAYER),
    "blocks.{}.experts.{}.w": ("layers.{}.moe.{}.proj", keymap.WEIGHT),
    "blocks.0.before": ("layers.0.proj_in", keymap.LAYER),
    "head": ("out", keymap.BARE),
    "head.fc.0": ("out_proj", keymap.LAYER),
}
OFFICIAL = Spelling(name="official", table={path: path for path in ROWS})
OTHER = Spelling(name="other", table=keymap.table(ROWS))


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("blocks.12.q.weight", "layers.12.to_q.weight"),
        ("blocks.12.q.lora_A.weight", "layers.12.to_q.lora_A.weight"),
        ("blocks.3.experts.41.w.scale_weight", "layers.3.moe.41.proj.scale_weight"),
        ("blocks.0.before.bias", "layers.0.proj_in.bias"),
        ("blocks.1.before.bias", None),
        ("head", "out"),
        ("head.fc.0.weight", "out_proj.weight"),
        ("header", None),
        ("blocks.x.q.weight", None),
    ],
)
def test_rename(name, renamed):
    assert keymap.Renamer(OTHER.table)(name) == renamed
    if renamed:
        assert keymap.Renamer(keymap.inverse(OTHER.table))(renamed) == name


def test_two_modules_may_not_share_a_name():
    with pytest.raises(AssertionError):
        keymap.inverse({"a": "c", "b": "c"})


def test_expand_names_every_parameter():
    names = keymap.expand({k: v for k, v in ROWS.items() if "experts" not in k}, {"blocks": 2})
    assert names == [
        "blocks.0.q.weight", "blocks.0.q.bias", "blocks.1.q.weight", "blocks.1.q.bias",
        "blocks.0.before.weight", "blocks.0.before.bias", "head", "head.fc.0.weight", "head.fc.0.bias",
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", keymap.PREFIXES)
@pytest.mark.parametrize("spelling", [OFFICIAL, OTHER])
def test_pick_finds_spelling_and_prefix(spelling, prefix):
    rename = keymap.Renamer(spelling.table)
    official = ["blocks.0.q.weight", "blocks.1.q.weight", "head.fc.0.bias"]
    match = keymap.pick([prefix + rename(name) for name in official] + ["stray"], (OFFICIAL, OTHER))
    assert (match.spelling.name, match.spelling.prefix) == (spelling.name, prefix)
    assert list(match.names) == official
    assert match.unmatched == ("stray",)


def test_pick_nothing():
    assert keymap.pick(["x", "y.weight"], (OFFICIAL, OTHER)) is None


def test_account_puts_every_name_somewhere():
    prefix = "model.diffusion_model."
    inner = ["blocks.0.q.weight", "blocks.0.q.scale_weight", "blocks.9.q.weight", "scaled_fp8", "marker.x", "foreign"]
    match = keymap.pick([prefix + name for name in inner], (OFFICIAL, OTHER))
    found = keymap.account(match, ["blocks.0.q.weight", "blocks.0.q.bias"], ["marker.*"])
    assert list(found.names) == ["blocks.0.q.weight", "blocks.0.q.scale_weight"]
    assert found.missing == ("blocks.0.q.bias",)
    assert found.unexpected == (prefix + "blocks.9.q.weight", prefix + "foreign")
    assert found.ignored == (prefix + "scaled_fp8", prefix + "marker.x")
    assert len(found.names) + len(found.unexpected) + len(found.ignored) == len(inner)
