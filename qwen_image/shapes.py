"""Names and shapes of the parameters of Qwen-Image, for telling what a file is before PyTorch is there.

The module itself (`transformer`) has the same ones; tests hold the two against each other.
"""

from ..core.types import Shapes
from .config import QwenImageConfig
from .keymap import LAYERED

MODULATIONS = 6  # of a stream in a block: shift, scale and gate, before the attention and before the MLP


def transformer(config: QwenImageConfig) -> Shapes:
    """Return the parameters of a diffusion transformer by their official names."""
    dim, time = config.dim, "time_text_embed.timestep_embedder"
    found = {"txt_norm.weight": (config.text_dim,)} | _layer("txt_in", dim, config.text_dim)
    found |= _layer("img_in", dim, config.token_dim) | _layer("proj_out", config.token_dim, dim)
    found |= _layer(f"{time}.linear_1", dim, config.freq_dim) | _layer(f"{time}.linear_2", dim, dim)
    found |= _layer("norm_out.linear", 2 * dim, dim)
    if config.layered:
        found[f"{LAYERED}.weight"] = 2, dim
    for i in range(config.num_layers):
        found |= _block(config, f"transformer_blocks.{i}")
    return found


def _block(config: QwenImageConfig, path: str) -> dict[str, tuple[int, ...]]:
    dim, width = config.dim, config.dim // config.num_heads
    found: dict[str, tuple[int, ...]] = {}
    for stream in ("img", "txt"):
        found |= _layer(f"{path}.{stream}_mod.1", MODULATIONS * dim, dim)
        found |= _layer(f"{path}.{stream}_mlp.net.0.proj", config.ffn_dim, dim)
        found |= _layer(f"{path}.{stream}_mlp.net.2", dim, config.ffn_dim)
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        found |= _layer(f"{path}.attn.{name}", dim, dim)
    return found | {f"{path}.attn.norm_{name}.weight": (width,) for name in ("q", "k", "added_q", "added_k")}


def _layer(path: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}.weight": (out, width), f"{path}.bias": (out,)}
