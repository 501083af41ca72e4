"""Goldens of the Qwen-Image diffusion transformer: packed tokens of a target and of the references after it."""
# B batch, C channels, T images, H W latent positions, L packed tokens

import re
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from wanqwen.core.blocks import Run
from wanqwen.qwen_image.config import PATCH, QwenImageConfig
from wanqwen.qwen_image.family import keep_float32
from wanqwen.qwen_image.transformer import QwenImageTransformer

from .golden import Golden, need

# Forward passes in float32, and in bfloat16 with the weights stored as for that.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TELLING = ("img_in.weight", "txt_norm.weight", "transformer_blocks.0.attn.add_k_proj.weight", "proj_out.weight")
INPUTS = {"hidden_states", "context", "timestep", "mask"}
OUTPUTS = ("out", "out_all_tokens")


def recognise(golden: Golden) -> bool:
    """Say whether a file holds a Qwen-Image transformer."""
    return golden.weights.keys() >= set(TELLING)


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how an output is checked.

    Of the inner values the text after the last block is left out: nothing reads it, so it is not computed.
    """
    section, _, name = key.split("/", 2)
    if section == "out":
        return tuple(TOLERANCE) if name in OUTPUTS else ()
    block = re.fullmatch(r"block(\d+)_(img|txt)", name)
    if block is None:
        return ("fp32",) if name in ("temb", "txt_in") else ()
    is_unread = block[2] == "txt" and int(block[1]) == golden.config["num_layers"] - 1
    return () if is_unread else ("fp32",)


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Run the case of an output and return ours and the reference.

    What the network makes of the references' own tokens is never used: only the target's rows are ours, and compared.
    """
    section, case, name = key.split("/", 2)
    net = model(golden, DTYPES[way], bool(golden.cases[case].get("zero_cond_t", golden.config.get("zero_cond_t"))))
    ours = _inner(net, golden, case, name) if section == "mid" else _packed(_forward(net, golden, case, DTYPES[way]))
    reference = golden.tensors[key]
    return [(ours, reference[:, : ours.shape[1]] if reference.dim() == 3 else reference)]


@lru_cache(maxsize=4)
def model(golden: Golden, dtype: torch.dtype, zero_cond_t: bool) -> QwenImageTransformer:
    """Return the file's transformer stored as the runtime would store it for this compute dtype."""
    config, weights = golden.config, golden.weights
    if config.get("guidance_embeds"):
        raise ValueError(f"{golden.path.name} has guidance_embeds, which no published Qwen-Image has")
    sizes = QwenImageConfig(
        num_layers=config["num_layers"],
        num_heads=config["num_attention_heads"],
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        ffn_dim=weights["transformer_blocks.0.img_mlp.net.0.proj.weight"].shape[0],
        text_dim=config["joint_attention_dim"],
        freq_dim=weights["time_text_embed.timestep_embedder.linear_1.weight"].shape[1],
        latent_channels=config["in_channels"] // config["patch_size"] ** 2,
        axes=tuple(config["axes_dims_rope"]),
        zero_cond_t=zero_cond_t,
        layered="time_text_embed.addition_t_embedding.weight" in weights,
    )
    net = QwenImageTransformer(sizes)
    net.load_state_dict({name: w if keep_float32(name) else w.to(dtype) for name, w in weights.items()}, assign=True)
    return net.eval().requires_grad_(False)


def _forward(net: QwenImageTransformer, golden: Golden, case: str, dtype: torch.dtype) -> Tensor:
    inputs = golden.inputs(case)
    hidden, context, sigma = need(inputs, "hidden_states", "context", "timestep")
    if unknown := inputs.keys() - INPUTS:
        raise ValueError(f"a case takes no {', '.join(sorted(unknown))}")
    entries = golden.cases[case].get("img_shapes")
    if not entries:
        raise ValueError(f"the metadata of case {case} must name its img_shapes")
    num_targets = len(entries) - 1 if net.config.layered else 1
    counts = [frames * height * width for frames, height, width in entries]
    images = [_unpacked(rows, *entry) for rows, entry in zip(hidden.split(counts, dim=1), entries, strict=True)]
    run, mask = Run(dtype=dtype), inputs.get("mask")
    prompt = net.prompt(context, run, None if mask is None else mask.bool())
    return net(torch.cat(images[:num_targets], dim=2), sigma * 1000, prompt, run, images[num_targets:])


def _inner(net: QwenImageTransformer, golden: Golden, case: str, name: str) -> Tensor:
    """Return what a module gave during the forward pass of a case."""
    block = re.fullmatch(r"block(\d+)_(img|txt)", name)
    modules: dict[str, nn.Module] = {"temb": net.time_text_embed, "txt_in": net.txt_in}
    module = modules[name] if block is None else net.transformer_blocks[int(block[1])]
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        # A copy: the next block works in place.
        lambda _, __, out: seen.append((out if block is None else out[("img", "txt").index(block[2])]).clone())
    )
    try:
        _forward(net, golden, case, torch.float32)
    finally:
        handle.remove()
    return seen[0]


def _unpacked(tokens_BLC: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    pattern = "b (t h w) (c p q) -> b c t (h p) (w q)"
    return rearrange(tokens_BLC, pattern, t=frames, h=rows, w=columns, p=PATCH, q=PATCH)


def _packed(image_BCTHW: Tensor) -> Tensor:
    return rearrange(image_BCTHW, "b c t (h p) (w q) -> b (t h w) (c p q)", p=PATCH, q=PATCH)
