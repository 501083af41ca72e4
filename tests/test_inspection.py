import json

import torch
from safetensors.torch import save_file
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.families import identify
from wanqwen.inspection import describe, render
from wanqwen.tests.manifests import checkpoint
from wanqwen.wan.config import VAEConfig
from wanqwen.wan.vae import WanVAE


def test_facts_of_a_small_vae(tmp_path):
    config = VAEConfig(dim=4, z_dim=2, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
    state = WanVAE(config).state_dict()
    count = sum(tensor.numel() for tensor in state.values())
    del state["decoder.head.2.bias"]
    path = tmp_path / "vae.safetensors"
    save_file(state | {"stray": torch.zeros(5, dtype=torch.int64)}, path, {"format": "pt"})

    found = open_checkpoint(path)
    facts = describe(found, identify(found))
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["family"], facts["role"], facts["variant"]) == ("wan21", "vae", "vae")
    assert facts["config"]["dim_mult"] == [1, 2]
    assert facts["bytes"] == path.stat().st_size
    assert facts["parameters"] == count - 3
    assert facts["dtypes"] == {"F32": len(state), "I64": 1}
    assert facts["missing"] == ["decoder.head.2.bias"]
    assert facts["unexpected"] == ["stray"]
    assert facts["metadata"] == ["format"]

    text = render(facts)
    assert "missing:    decoder.head.2.bias" in text
    assert f"parameters: {count - 3:,}" in text


def test_facts_of_a_text_encoder_with_its_nested_sizes_and_of_a_variant(tmp_path):
    encoder = checkpoint("qwen_comfy_qwen_2.5_vl_7b_bf16")
    facts = describe(encoder, identify(encoder))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["config"]["vision"]["full_attention"] == [7, 15, 23, 31]
    assert facts["config"]["mrope_section"] == [16, 24, 24]
    assert "vision (depth 32, hidden 1280, " in render(facts)

    edit = checkpoint("qwen_comfy_bf16", path=tmp_path / "qwen_image_edit_2509_bf16.safetensors")
    facts = describe(edit, identify(edit))
    assert facts["variant"] == "edit-2509"
    assert facts["told by"] == "the word '2509' in 'qwen_image_edit_2509_bf16.safetensors'"
    assert "told by:    the word '2509'" in render(facts)
