"""Published files turned into one another, by their headers alone: nothing of full size is read or written here."""

from collections.abc import Mapping
from functools import cache
from itertools import permutations

import pytest
from wanqwen.conversion import EXPORTS, NOWHERE
from wanqwen.core.storage import WEIGHT_SCALES, companion
from wanqwen.core.types import Checkpoint, Identity, TensorInfo
from wanqwen.core.weights.convert import Plan, Wish, make_plan
from wanqwen.core.weights.export import Export
from wanqwen.families import identify

from .manifests import checkpoint

PREFIX = "model.diffusion_model."
OFFICIAL, DIFFUSERS, COMFYUI = Wish(spelling="official"), Wish(spelling="diffusers"), Wish(spelling="comfyui")
KIJAI = Wish(spelling="kijai")

# Publications of one model, and how each of them is asked for.
SETS: tuple[dict[str, Wish], ...] = (
    {
        "wan21_official_t2v_1.3B": OFFICIAL,
        "wan21_diffusers_t2v_1.3B": DIFFUSERS,
        "wan21_comfy_t2v_1.3B_fp16": Wish(spelling="comfyui", prefix=PREFIX),
    },
    {
        "wan21_comfy_t2v_14B_fp8_scaled_INFERRED": COMFYUI,
        "wan21_kijai_t2v_14B_fp8_e4m3fn_INFERRED": KIJAI,
        "wan21_diffusers_t2v_14B": DIFFUSERS,
    },
    {
        "wan21_official_i2v_14B_480P_and_720P": OFFICIAL,
        "wan21_diffusers_i2v_14B": DIFFUSERS,
        "wan21_kijai_i2v_14B_fp8_e4m3fn_scaled_KJ": KIJAI,
    },
    {"wan21_comfy_flf2v_720p_14B_fp16": COMFYUI, "wan21_diffusers_flf2v_14B": DIFFUSERS},
    {
        "wan21_official_vace_1.3B": OFFICIAL,
        "wan21_diffusers_vace_1.3B": DIFFUSERS,
        "wan21_comfy_vace_1.3B_fp16_INFERRED": COMFYUI,
    },
    {"wan21_official_vae": OFFICIAL, "qwen_diffusers_vae": DIFFUSERS, "wan21_comfy_wan_2.1_vae": COMFYUI},
    {
        "wan21_official_umt5_xxl_enc_bf16": OFFICIAL,
        "wan21_diffusers_umt5_xxl": DIFFUSERS,
        "wan21_comfy_umt5_xxl_fp8_e4m3fn_scaled": COMFYUI,
    },
    {
        "wan21_official_clip_xlm_roberta_vit_h_14": OFFICIAL,
        "wan21_kijai_clip_visual_fp16_INFERRED": KIJAI,
        "wan21_comfy_clip_vision_h": COMFYUI,
    },
    {"qwen_diffusers_transformer": DIFFUSERS, "qwen_comfy_fp8_e4m3fn": COMFYUI},
    {"qwen_diffusers_text_encoder": DIFFUSERS, "qwen_comfy_qwen_2.5_vl_7b_fp8_scaled": COMFYUI},
)
PAIRS = [(source, target, among[target]) for among in SETS for source, target in permutations(among, 2)]


@cache
def known(name: str) -> tuple[Checkpoint, Identity, Export]:
    found = checkpoint(name)
    identity = identify(found)
    return found, identity, EXPORTS[identity.family](found, identity)


def planned(name: str, wish: Wish) -> Plan:
    return make_plan(*known(name), wish)


@pytest.mark.parametrize(("source", "target", "wish"), PAIRS, ids=[f"{a}-{b}" for a, b, _ in PAIRS])
def test_each_publication_becomes_each_other_one_to_the_last_name_and_shape(
    source: str, target: str, wish: Wish
) -> None:
    published, identity, _ = known(target)
    weights = {file for official, file in identity.names.items() if companion(official) is None}
    no_weights = {*known(source)[1].ignored, *identity.ignored}  # tokenizers, marks, heads that are not computed
    made = {name: info.shape for name, info in planned(source, wish).tensors.items() if companion(name) is None}
    assert {name: made[name] for name in made if name not in no_weights} == {
        name: published.tensors[name].shape for name in weights
    }


# What published quantised files round, what they were made of, and what to ask for.
ROUNDED = {
    "wan21_kijai_i2v_14B_fp8_e4m3fn_scaled_KJ": ("wan21_official_i2v_14B_480P_and_720P", "fp8_scaled"),
    "wan21_comfy_i2v_480p_14B_fp8_scaled": ("wan21_official_i2v_14B_480P_and_720P", "fp8_scaled_tensor"),
    "qwen_comfy_edit_2511_fp8mixed": ("qwen_diffusers_transformer", "fp8_scaled"),
    "wan21_comfy_umt5_xxl_fp8_e4m3fn_scaled": ("wan21_diffusers_umt5_xxl", "fp8_scaled_tensor"),
    "qwen_comfy_qwen_2.5_vl_7b_fp8_scaled": ("qwen_diffusers_text_encoder", "fp8_scaled_tensor"),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_the_layers_are_quantised_that_published_files_quantise(name: str) -> None:
    source, target = ROUNDED[name]
    published, ours = checkpoint(name).tensors, planned(source, Wish(target=target)).tensors

    def rounded(tensors: Mapping[str, TensorInfo]) -> set[str]:
        return {key for key, info in tensors.items() if info.dtype == "F8_E4M3"} - {"scaled_fp8"}

    def scales(tensors: Mapping[str, TensorInfo]) -> set[str]:
        return {key.removesuffix(end) for key in tensors for end in WEIGHT_SCALES if key.endswith(end)}

    assert rounded(ours) == rounded(published) and scales(ours) == scales(published)
    if target == "fp8_scaled_tensor":
        assert {info.shape for key, info in ours.items() if key.endswith(".scale_weight")} == {()}


@pytest.mark.parametrize("name", [next(iter(among)) for among in SETS])
def test_every_model_tells_what_it_is_in_each_format_and_spelling(name: str) -> None:
    _, identity, export = known(name)
    for wish in (
        *(
            Wish(target="bf16", spelling=spelling)
            for spelling in dict.fromkeys(("official", next(iter(export.spellings))))
        ),
        *([Wish(target="fp8_scaled", requantise=True)] if export.quantised else []),
        *([Wish(target="gguf_bf16")] if export.gguf else []),
    ):
        new = identify(planned(name, wish).checkpoint(NOWHERE))
        assert (new.family, new.role, new.variant, new.config) == (
            identity.family,
            identity.role,
            identity.variant,
            identity.config,
        )
        assert not new.missing and not new.unexpected
