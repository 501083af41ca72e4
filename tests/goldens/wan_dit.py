"""Goldens of the Wan diffusion transformer: text to video, and with pictures."""
# B batch, C channels, T H W latent grid, S text rows, E width

import re
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wanqwen.core.blocks import Run
from wanqwen.wan.config import WanConfig
from wanqwen.wan.family import keep_float32
from wanqwen.wan.transformer import WanTransformer

from .golden import Golden, need, numbered

# Forward passes in float32; each sample of a case on its own, or all in one batch where they have one size.
TOLERANCE = {"single": 2e-5, "batch": 2e-5, "bf16": 2e-2}
Pictures = tuple[Tensor | None, Tensor | None]
SIZES = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim", "text_len", "eps")


def recognise(golden: Golden) -> bool:
    """Say whether a file holds a transformer that takes text, or text and pictures."""
    names = golden.weights
    return "blocks.0.self_attn.q.weight" in names and not any(name.startswith("vace_") for name in names)


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how an output is checked: in bf16 as well, and as a batch where there is one."""
    section, case, name = key.split("/", 2)
    if section == "mid":
        # Only a case of one sample says whose inner value it is; what no module of ours gives is not checked.
        return ("single",) if re.fullmatch(r"block\d+|" + "|".join(INNER), name) else ()
    batch = golden.inputs(case).get("x", torch.empty(0)).dim() == 5
    return ("single", "batch", "bf16") if batch else ("single", "bf16")


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Run the case of an output and return ours and the reference."""
    section, case, name = key.split("/", 2)
    reference = golden.tensors[key]
    if section == "mid":
        return [(_inner(golden, case, name, reference), reference)]
    samples, pictures = _samples(golden, case), pictures_of(golden.inputs(case))
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    net = model(golden, dtype)
    if name == "out":
        whole = way == "batch"
        outs = _as_batch(net, samples) if whole else torch.cat([_one(net, *s, pictures, dtype) for s in samples])
        return [(outs.reshape(reference.shape) if outs.shape[0] == 1 else outs, reference)]
    index = re.fullmatch(r"out(\d+)", name)
    if index is None or int(index[1]) >= len(samples):
        raise ValueError(f"no sample of this case gives {key}")
    return [(_one(net, *samples[int(index[1])], pictures, dtype)[0], reference)]


@lru_cache(maxsize=2)
def model(golden: Golden, dtype: torch.dtype) -> WanTransformer:
    """Return the file's transformer, stored as the runtime would store it for this compute dtype."""
    config = golden.config
    for always in ("qk_norm", "cross_attn_norm"):
        if not config.get(always, True):
            raise ValueError(f"{golden.path.name} has {always} off, which no Wan 2.1 has")
    sizes = {name: config[name] for name in SIZES if name in config}
    if "img_emb.proj.0.weight" in golden.weights:
        sizes["image_dim"] = config["img_emb_in_dim"]
    if "img_emb.emb_pos" in golden.weights:
        sizes["image_positions"] = golden.weights["img_emb.emb_pos"].shape[1]
    if "vace_patch_embedding.weight" in golden.weights:
        sizes |= {"vace_layers": tuple(config["vace_layers"]), "vace_dim": config["vace_in_dim"]}
    net = WanTransformer(WanConfig(**sizes, patch_size=tuple(config.get("patch_size", (1, 2, 2)))))
    net.load_state_dict(
        {name: w if keep_float32(name) else w.to(dtype) for name, w in golden.weights.items()}, assign=True
    )
    return net.eval()


def _samples(golden: Golden, case: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (x [C, T, H, W], t [1], text [S, E]) of every sample of a case."""
    inputs = golden.inputs(case)
    xs = numbered(inputs, "x") or list(_with_batch(*need(inputs, "x"), dims=5))
    texts = numbered(inputs, "context") or list(_with_batch(*need(inputs, "context"), dims=3))
    times = need(inputs, "t")[0].reshape(-1)
    counts = {len(xs), len(texts), len(times)} - {1}
    if len(counts) > 1:
        raise ValueError(f"{case} has {len(xs)} latents, {len(texts)} contexts and {len(times)} timesteps")
    count = max(counts, default=1)
    xs, texts = (list(items) * (count if len(items) == 1 else 1) for items in (xs, texts))
    return list(zip(xs, times.expand(count).split(1), texts, strict=True))


def pictures_of(inputs: dict[str, Tensor]) -> Pictures:
    """Return the image rows of all samples of a case, those of several pictures in one row, and the extra channels."""
    if not {"clip_fea", "y"} & inputs.keys():
        return None, None
    image, extra = need(inputs, "clip_fea", "y")
    return image.reshape(1, -1, image.shape[-1]), _with_batch(extra, dims=5)


def _with_batch(tensor: Tensor, dims: int) -> Tensor:
    return tensor if tensor.dim() == dims else tensor[None]


def _one(net: WanTransformer, x: Tensor, t: Tensor, text: Tensor, pictures: Pictures, dtype: torch.dtype) -> Tensor:
    run = Run(dtype=dtype)
    return net(x[None], t, net.prompt(text[None], run, None, *pictures), run)


def _as_batch(net: WanTransformer, samples: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Run all samples at once, their texts filled up with zero rows."""
    xs, times, texts = zip(*samples, strict=True)
    rows = torch.stack([F.pad(text, (0, 0, 0, net.config.text_len - len(text))) for text in texts])
    run = Run()
    return net(torch.stack(xs), torch.cat(times), net.prompt(rows, run), run)


INNER = ("patch_embedding", "time_embedding", "time_projection")


def _inner(golden: Golden, case: str, name: str, reference: Tensor) -> Tensor:
    """Return what a module gave during the forward pass of a case of one sample, laid out as the reference is."""
    net = model(golden, torch.float32)
    (sample,) = _samples(golden, case)
    module: nn.Module = getattr(net, name) if name in INNER else net.blocks[int(name.removeprefix("block"))]
    seen: list[Tensor] = []
    # A copy: the next block works in place.
    handle = module.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    try:
        _one(net, *sample, pictures_of(golden.inputs(case)), torch.float32)
    finally:
        handle.remove()
    if name == "patch_embedding":  # tokens [1, L, E] -> the convolution's [1, E, t, h, w]
        return seen[0].transpose(1, 2).reshape(reference.shape)
    return seen[0].reshape(reference.shape)
