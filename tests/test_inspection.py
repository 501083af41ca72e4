import json

import torch
from safetensors.torch import save_file
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.families import identify
from wanqwen.inspection import describe, render
from wanqwen.wan.config import VAEConfig
from wanqwen.wan.vae import WanVAE


def test_facts_of_a_small_vae(tmp_path):
    config = VAEConfig(dim=4, z_dim=2, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
    state = WanVAE(config).state_dict()
    count = sum(tensor.numel() for tensor in state.values())
    del state["decoder.head.2.bias"]
    path = tmp_path / "vae.safetensors"
    save_file(state | {"stray": torch.zeros(5, dtype=torch.int64)}, path, {"format": "pt"})

    checkpoint = open_checkpoint(path)
    facts = describe(checkpoint, identify(checkpoint))
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
