"""A file whose tensors are of shapes that no model has is refused by name, or known for what else it is."""

from pathlib import Path

import pytest
from wanqwen.core.types import TensorInfo
from wanqwen.core.weights.lora import is_lora
from wanqwen.families import family_of_lora, identify
from wanqwen.inspection import describe_lora
from wanqwen.tests.manifests import checkpoint, fake

TELLING = {
    "wan21_official_t2v_1.3B": (
        *("patch_embedding.weight", "blocks.0.ffn.0.bias", "head.head.bias", "text_embedding.0.weight"),
        "time_embedding.0.weight",
    ),
    "wan21_official_flf2v_14B_720P": ("img_emb.proj.0.bias", "img_emb.emb_pos"),
    "wan21_official_vace_1.3B": ("vace_patch_embedding.weight",),
    "wan21_official_vae": ("encoder.conv1.weight", "conv2.weight", "encoder.downsamples.0.residual.6.bias"),
    "wan21_official_umt5_xxl_enc_bf16": (
        *("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight", "blocks.0.attn.q.weight"),
        "blocks.0.ffn.fc1.weight",
    ),
    "wan21_comfy_clip_vision_h": (
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
    ),
    "qwen_comfy_bf16": (
        *("img_in.weight", "transformer_blocks.0.attn.norm_q.weight", "txt_in.weight"),
        *("transformer_blocks.0.img_mlp.net.0.proj.weight", "time_text_embed.timestep_embedder.linear_1.weight"),
    ),
    "qwen_comfy_qwen_2.5_vl_7b_bf16": (
        *("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "visual.patch_embed.proj.weight"),
        *("visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", "visual.blocks.0.mlp.gate_proj.weight"),
    ),
}
CASES = [(name, tensor) for name, tensors in TELLING.items() for tensor in tensors]


@pytest.mark.parametrize(("name", "tensor"), CASES)
def test_a_telling_tensor_of_an_odd_shape_is_named(name: str, tensor: str) -> None:
    found = checkpoint(name, Path("odd.safetensors"))
    assert tensor in found.tensors
    sides = len(found.tensors[tensor].shape)
    for shape in ((), (0,) * sides, (5,) * (sides + 1), (7,) * max(1, sides - 1)):
        may_be = (2, 3) if tensor.endswith((".emb_pos", ".position_embedding.weight")) else (sides,)
        if len(shape) not in may_be or 0 in shape:
            tensors = {**found.tensors, tensor: TensorInfo("BF16", shape)}
            with pytest.raises(ValueError, match=r"odd\.safetensors: "):
                identify(fake(tensors, path=found.path))


@pytest.mark.parametrize(
    "said",
    ['{"num_heads": Infinity}', '{"vace_layers": [1e999]}', "[" * 100_000, '{"num_heads": ' + "9" * 5000 + "}",
     '{"vace_layers": [' + "7," * 200_000 + "7]}"],
    ids=["endless number", "endless layer", "depth", "digits", "many layers"],
)  # fmt: skip
def test_metadata_that_can_t_be_is_refused_in_few_words(said: str) -> None:
    found = checkpoint("wan21_official_vace_1.3B", Path("odd.safetensors"))
    with pytest.raises(ValueError, match=r"odd\.safetensors: ") as refused:
        identify(fake(found.tensors, metadata={"wanqwen": said}, path=found.path))
    assert len(str(refused.value)) < 2000


def test_names_of_very_many_parts_take_no_time_and_few_words() -> None:
    names = {
        ".".join("a" * 50_000): TensorInfo("F32", (1,)),
        **{f"b{i}.weight": TensorInfo("F32", ()) for i in range(9)},
    }
    with pytest.raises(ValueError, match="none of the models") as refused:
        identify(fake(names))
    assert len(str(refused.value)) < 2000


def test_a_lora_s_factor_without_sides_fits_nothing() -> None:
    found = checkpoint("lora_qwen_lightning_bf16")
    tensors = dict(found.tensors) | {name: TensorInfo("BF16", ()) for name in found.tensors if "lora_down" in name}
    odd = fake(tensors)
    assert is_lora(odd) and family_of_lora(odd)[0].name == "qwen-image"
    assert describe_lora(odd)["fits"] == {} and describe_lora(odd)["ranks"] == []
