"""Train the miniature Wan and write its three files: wan_vae, wan_text_encoder (tokenizer inside) and wan_dit."""

import json
from pathlib import Path

import torch

from ...core.weights.identity import METADATA_KEY
from ...core.weights.keymap import Renamer, inverse, table
from ...wan.family import LATENT_FORMAT, keep_float32
from ...wan.keymap import TEXT_ENCODER
from ...wan.vae import WanVAE
from .. import vae as shared
from ..training import Schedule, write
from .train_dit import CONFIG as DIT_CONFIG
from .train_dit import TextToVideo, train_dit, train_tokenizer
from .train_vae import CONFIG as VAE_CONFIG
from .train_vae import sample_clips, train_vae

VAE_SCHEDULE = Schedule(steps=3050, rate=2e-3, warmup=50)
DIT_SCHEDULE = Schedule(steps=7000, rate=1.5e-3)


def train(work: Path, out: Path) -> None:
    """Train what `work` does not hold yet, then write the checkpoints to `out`."""

    def finished_vae() -> WanVAE:
        vae = train_vae(work, VAE_SCHEDULE)
        mean, std = (torch.tensor(row) for row in (LATENT_FORMAT.mean, LATENT_FORMAT.std))
        shared.match_latent_statistics(vae, sample_clips(128, seed=2), mean, std)
        return vae

    vae = shared.load_or_train(VAE_CONFIG, work / "clips_vae_scaled.pt", finished_vae)
    tokenizer = work / "spiece.model"
    if not tokenizer.exists():
        tokenizer.write_bytes(train_tokenizer())
    pair = train_dit(vae, LATENT_FORMAT, tokenizer.read_bytes(), work, DIT_SCHEDULE)
    _write_checkpoints(out, vae, pair, tokenizer.read_bytes())


def _write_checkpoints(folder: Path, vae: WanVAE, pair: TextToVideo, tokenizer: bytes) -> None:
    """Write the three files: large matrices in bfloat16, the VAE in float16, what must be exact in float32."""
    to_official = Renamer(inverse(table(TEXT_ENCODER)))
    text = {to_official(name): t.half() for name, t in pair.text_encoder.state_dict().items() if to_official(name)}
    text["spiece_model"] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    transformer = {
        name: t.float() if keep_float32(name) else t.bfloat16() for name, t in pair.transformer.state_dict().items()
    }
    rgb, bias = shared.latent_colours(vae, sample_clips(64, seed=4), LATENT_FORMAT)
    # What the shapes don't tell: how a width of 192 splits into heads, and how this VAE's latents look.
    facts = {METADATA_KEY: json.dumps({"num_heads": DIT_CONFIG.num_heads, "rgb": rgb, "rgb_bias": bias})}
    write(folder / "wan_vae.safetensors", {name: t.half() for name, t in vae.state_dict().items()}, {})
    write(folder / "wan_text_encoder.safetensors", text, {})
    write(folder / "wan_dit.safetensors", transformer, facts)
