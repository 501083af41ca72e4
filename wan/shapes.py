"""Names and shapes of the parameters of Wan 2.1 models, for telling what a file is before PyTorch is there.

The modules themselves (`transformer`, `vae`) have the same ones; tests hold the two against each other.
"""

from ..core.types import Shapes
from .config import VAEConfig, WanConfig

Parameters = dict[str, tuple[int, ...]]


def transformer(config: WanConfig) -> Shapes:
    """Return the parameters of a diffusion transformer by their official names."""
    dim, image = config.dim, config.image_dim
    found = _layer("patch_embedding", dim, config.in_dim, *config.patch_size)
    for path, out, width in (
        ("text_embedding.0", dim, config.text_dim),
        ("text_embedding.2", dim, dim),
        ("time_embedding.0", dim, config.freq_dim),
        ("time_embedding.2", dim, dim),
        ("time_projection.1", 6 * dim, dim),
    ):
        found |= _layer(path, out, width)
    if image:
        found |= _norm("img_emb.proj.0", image) | _layer("img_emb.proj.1", image, image)
        found |= _layer("img_emb.proj.3", dim, image) | _norm("img_emb.proj.4", dim)
    if config.image_positions:
        found["img_emb.emb_pos"] = 1, config.image_positions, image
    for i in range(config.num_layers):
        found |= _block(config, f"blocks.{i}")
    if config.vace_layers:
        found |= _layer("vace_patch_embedding", dim, config.vace_dim, *config.patch_size)
        found |= _layer("vace_blocks.0.before_proj", dim, dim)
    for i in range(len(config.vace_layers)):
        found |= _block(config, f"vace_blocks.{i}") | _layer(f"vace_blocks.{i}.after_proj", dim, dim)
    found["head.modulation"] = 1, 2, dim
    patch_frames, patch_height, patch_width = config.patch_size
    return found | _layer("head.head", patch_frames * patch_height * patch_width * config.out_dim, dim)


def _block(config: WanConfig, path: str) -> Parameters:
    dim = config.dim
    found = {f"{path}.modulation": (1, 6, dim)} | _norm(f"{path}.norm3", dim)
    for attention in ("self_attn", "cross_attn"):
        for name in "qkvo":
            found |= _layer(f"{path}.{attention}.{name}", dim, dim)
        found |= {f"{path}.{attention}.norm_{name}.weight": (dim,) for name in "qk"}
    if config.image_dim:
        found |= _layer(f"{path}.cross_attn.k_img", dim, dim) | _layer(f"{path}.cross_attn.v_img", dim, dim)
        found[f"{path}.cross_attn.norm_k_img.weight"] = (dim,)
    return found | _layer(f"{path}.ffn.0", config.ffn_dim, dim) | _layer(f"{path}.ffn.2", dim, config.ffn_dim)


def vae(config: VAEConfig) -> Shapes:
    """Return the parameters of a VAE by their official names."""
    widths = [config.dim * mult for mult in config.dim_mult]
    deepest, latent = widths[-1], config.z_dim
    found = _layer("encoder.conv1", config.dim, config.channels, 3, 3, 3) | _ends("encoder", deepest, 2 * latent)
    found |= _layer("decoder.conv1", deepest, latent, 3, 3, 3) | _ends("decoder", widths[0], config.channels)
    for part in ("encoder", "decoder"):
        found |= _residual(f"{part}.middle.0", deepest, deepest) | _residual(f"{part}.middle.2", deepest, deepest)
        found |= {f"{part}.middle.1.norm.gamma": (deepest, 1, 1)}
        found |= _layer(f"{part}.middle.1.to_qkv", 3 * deepest, deepest, 1, 1)
        found |= _layer(f"{part}.middle.1.proj", deepest, deepest, 1, 1)
    found |= _layer("conv1", 2 * latent, 2 * latent, 1, 1, 1) | _layer("conv2", latent, latent, 1, 1, 1)
    return found | _downsamples(config, widths) | _upsamples(config, widths)


def _downsamples(config: VAEConfig, widths: list[int]) -> Parameters:
    found: Parameters = {}
    at, width = 0, config.dim
    for level, out in enumerate(widths):
        for _ in range(config.num_res_blocks):
            found |= _residual(f"encoder.downsamples.{at}", width, out)
            at, width = at + 1, out
        if level < len(widths) - 1:
            found |= _layer(f"encoder.downsamples.{at}.resample.1", out, out, 3, 3)
            if config.temporal_downsample[level]:
                found |= _layer(f"encoder.downsamples.{at}.time_conv", out, out, 3, 1, 1)
            at += 1
    return found


def _upsamples(config: VAEConfig, widths: list[int]) -> Parameters:
    found: Parameters = {}
    at, width = 0, widths[-1]
    for level, out in reversed(list(enumerate(widths))):
        for _ in range(config.num_res_blocks + 1):
            found |= _residual(f"decoder.upsamples.{at}", width, out)
            at, width = at + 1, out
        if level:  # upsampling halves the width
            found |= _layer(f"decoder.upsamples.{at}.resample.1", out // 2, out, 3, 3)
            if config.temporal_downsample[level - 1]:
                found |= _layer(f"decoder.upsamples.{at}.time_conv", 2 * out, out, 3, 1, 1)
            at, width = at + 1, out // 2
    return found


def _residual(path: str, width: int, out: int) -> Parameters:
    found = {f"{path}.residual.0.gamma": (width, 1, 1, 1), f"{path}.residual.3.gamma": (out, 1, 1, 1)}
    found |= _layer(f"{path}.residual.2", out, width, 3, 3, 3) | _layer(f"{path}.residual.6", out, out, 3, 3, 3)
    return found if width == out else found | _layer(f"{path}.shortcut", out, width, 1, 1, 1)


def _ends(part: str, width: int, out: int) -> Parameters:
    return {f"{part}.head.0.gamma": (width, 1, 1, 1)} | _layer(f"{part}.head.2", out, width, 3, 3, 3)


def _layer(path: str, *shape: int) -> Parameters:
    return {f"{path}.weight": shape, f"{path}.bias": shape[:1]}


def _norm(path: str, width: int) -> Parameters:
    return {f"{path}.weight": (width,), f"{path}.bias": (width,)}
