"""Train the miniature Wan and write its six files: wan_vae, wan_text_encoder (tokenizer inside) and wan_dit; and of
the models of pictures wan_image_encoder, wan_i2v_dit and wan_flf2v_dit.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.weights.assemble import assemble
from ...core.weights.identity import METADATA_KEY
from ...core.weights.keymap import Renamer, inverse, table
from ...loading import load_model, load_text_encoder, load_vae
from ...wan.config import WanConfig
from ...wan.family import LATENT_FORMAT, keep_float32
from ...wan.keymap import TEXT_ENCODER
from ...wan.transformer import WanTransformer
from ...wan.vae import WanVAE
from .. import vae as shared
from ..training import Schedule, in_fp8, write
from .pictures import SHOWN, draw_clips, image_rows
from .train_dit import CONFIG as DIT_CONFIG
from .train_dit import TextToVideo, train_dit, train_tokenizer
from .train_image_encoder import CONFIG as IMAGE_ENCODER
from .train_image_encoder import train_image_encoder
from .train_pictures import FLF2V, I2V, train_from_pictures
from .train_vae import CONFIG as VAE_CONFIG
from .train_vae import sample_clips, train_vae

VAE_SCHEDULE = Schedule(steps=3050, rate=2e-3, warmup=50)
DIT_SCHEDULE = Schedule(steps=7000, rate=1.5e-3)
IMAGE_ENCODER_SCHEDULE = Schedule(steps=800, rate=2e-3, warmup=50)
I2V_SCHEDULE = Schedule(steps=5000, rate=1.5e-3)
FLF2V_SCHEDULE = Schedule(steps=1000, rate=7e-4)

TEXT_TO_VIDEO = ("wan_vae", "wan_text_encoder", "wan_dit")
FROM_PICTURES = ("wan_image_encoder", "wan_i2v_dit", "wan_flf2v_dit")


def train(work: Path, out: Path) -> None:
    """Train what neither `out` nor `work` holds yet, and write the checkpoints to `out`."""
    if not all((out / f"{name}.safetensors").exists() for name in TEXT_TO_VIDEO):
        _train_text_to_video(work, out)
    if not all((out / f"{name}.safetensors").exists() for name in FROM_PICTURES):
        _train_from_pictures(work, out)


def _train_text_to_video(work: Path, out: Path) -> None:
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
    _write_text_to_video(out, vae, pair, tokenizer.read_bytes())


def _write_text_to_video(folder: Path, vae: WanVAE, pair: TextToVideo, tokenizer: bytes) -> None:
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


def _train_from_pictures(work: Path, out: Path) -> None:
    """Train the models of pictures, which start from the files of text to video."""
    vae = load_vae(out / "wan_vae.safetensors").first_stage_model
    text_encoder = load_text_encoder(out / "wan_text_encoder.safetensors")
    model = load_model(out / "wan_dit.safetensors")
    t2v = assemble(
        lambda: WanTransformer(DIT_CONFIG), model.identity.names, model.checkpoint, float32=keep_float32,
        dtype=torch.float32,
    )  # fmt: skip
    clips = draw_clips(vae, work / "clips_from_pictures.pt")
    pictures, scenes = clips.pictures.flatten(0, 1), [scene for scene in clips.scenes for _ in SHOWN]
    encoder = train_image_encoder(pictures, scenes, work / "clips_image_encoder.pt", IMAGE_ENCODER_SCHEDULE)
    rows = image_rows(encoder, clips, work / "clips_image_rows.pt")

    def trained(config: WanConfig, before: WanTransformer, name: str, schedule: Schedule) -> WanTransformer:
        def encode(text: str) -> Tensor:
            return text_encoder.encode([text])[0].text[0]

        return train_from_pictures(config, before, clips, rows, encode, work / f"clips_{name}.pt", schedule)

    i2v = trained(I2V, t2v, "i2v", I2V_SCHEDULE)
    flf2v = trained(FLF2V, i2v, "flf2v", FLF2V_SCHEDULE)
    _write_from_pictures(out, encoder, {"i2v": i2v, "flf2v": flf2v}, model.checkpoint.metadata)


def _write_from_pictures(
    folder: Path, encoder: nn.Module, transformers: dict[str, WanTransformer], facts: Mapping[str, str]
) -> None:
    """Write the three files: matrices of the blocks in fp8, those around them as the other files have them.

    `facts` are the metadata of the transformer that these began as.
    """
    # As ComfyUI's clip_vision_h has them; newer versions of transformers leave the first part of the names out.
    tensors = {
        f"vision_model.{name.removeprefix('vision_model.')}": tensor.half()
        for name, tensor in encoder.state_dict().items()
    }
    write(
        folder / "wan_image_encoder.safetensors",
        tensors,
        {METADATA_KEY: json.dumps({"num_heads": IMAGE_ENCODER.num_heads})},
    )
    for kind, transformer in transformers.items():
        write(folder / f"wan_{kind}_dit.safetensors", stored(transformer), facts)


def stored(transformer: WanTransformer) -> dict[str, Tensor]:
    """Return the tensors of the file of a transformer of pictures."""
    tensors = {}
    for name, tensor in transformer.state_dict().items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.dim() == 2:
            tensors |= in_fp8(name, tensor)
        else:
            tensors[name] = tensor.float() if keep_float32(name) else tensor.bfloat16()
    return tensors
