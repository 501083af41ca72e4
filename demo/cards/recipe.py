"""Train the miniature Qwen-Image and write its four files, in the key names of the published ones.

qwen_vae, qwen_text_encoder (its tokenizer inside), and two transformers: qwen_dit makes pictures from text,
qwen_edit_dit edits them.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ...core.weights.identity import METADATA_KEY
from ...core.weights.keymap import Renamer
from ...qwen_image.family import LATENT_FORMAT, keep_float32
from ...qwen_image.tokenizer import EMBEDDED_NAME, Tokenizer
from ...qwen_image.transformer import QwenImageTransformer
from ...wan.keymap import vae_spellings
from ...wan.vae import WanVAE
from .. import vae as shared
from ..training import Schedule, in_fp8, write
from . import text
from .train_dit import CONFIG, TASKS, draw_pairs, train_dit
from .train_text import train_text
from .train_vae import CONFIG as VAE_CONFIG
from .train_vae import pictures, refine_decoder, train_vae

VAE_SCHEDULE = Schedule(steps=2400, rate=2e-3, warmup=50)
DECODER_SCHEDULE = Schedule(steps=850, rate=1e-3, warmup=30)
TEXT_SCHEDULE = Schedule(steps=1500, rate=2e-3, warmup=50)
DIT_SCHEDULE = {"t2i": Schedule(steps=3400, rate=2.5e-3), "edit": Schedule(steps=5500, rate=2.5e-3)}
FILES = {"t2i": "qwen_dit", "edit": "qwen_edit_dit"}

# The modulation of each block and all that only text passes through: two thirds of the transformer.
SMALL = ("_mod.1", "txt_mlp.net.0.proj", "txt_mlp.net.2", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def train(work: Path, out: Path) -> None:
    """Train what `work` does not hold yet, then write the checkpoints to `out`."""
    mean, std = (torch.tensor(row) for row in (LATENT_FORMAT.mean, LATENT_FORMAT.std))

    def scaled_vae() -> WanVAE:
        vae = train_vae(work, VAE_SCHEDULE)
        shared.match_latent_statistics(vae, pictures(256, seed=2), mean, std)
        return vae

    vae = shared.load_or_train(VAE_CONFIG, work / "cards_vae_scaled.pt", scaled_vae)
    refine_decoder(vae, work / "cards_vae_refined.pt", DECODER_SCHEDULE, std)
    tokenizer = work / "tokenizer.json"
    if not tokenizer.exists():
        tokenizer.write_bytes(text.train_tokenizer())
    text_encoder = train_text(Tokenizer.from_json(tokenizer.read_bytes()), work / "cards_text.pt", TEXT_SCHEDULE)
    pairs = draw_pairs(vae, work / "pairs.pt")
    models = {
        task: train_dit(task, pairs, text_encoder, work / f"cards_{task}.pt", DIT_SCHEDULE[task]) for task in TASKS
    }
    write_checkpoints(out, vae, text_encoder, models, tokenizer.read_bytes())


def write_checkpoints(
    folder: Path,
    vae: WanVAE,
    text_encoder: text.VisionLanguage,
    models: dict[str, QwenImageTransformer],
    tokenizer: bytes,
) -> None:
    """Write the four files: matrices in bfloat16, two thirds of the transformers' in fp8, norms in float32."""
    to_diffusers = Renamer(vae_spellings(VAE_CONFIG.num_res_blocks)[1].table)
    rgb, bias = shared.latent_colours(vae, pictures(64, seed=4), LATENT_FORMAT)
    write(folder / "qwen_vae.safetensors", {to_diffusers(n): t.bfloat16() for n, t in vae.state_dict().items()}, {})
    encoder = {name: t.bfloat16() for name, t in text_encoder.state_dict().items()}
    encoder[EMBEDDED_NAME] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    write(folder / "qwen_text_encoder.safetensors", encoder, {METADATA_KEY: json.dumps(encoder_facts())})
    for task, model in models.items():
        # What the shapes don't tell: how a width of 192 splits into heads, and how this VAE's latents look.
        facts = {"num_heads": CONFIG.num_heads, "axes": CONFIG.axes, "variant": task, "rgb": rgb, "rgb_bias": bias}
        write(folder / f"{FILES[task]}.safetensors", stored(model), {METADATA_KEY: json.dumps(facts)})


def encoder_facts() -> dict[str, object]:
    """Return what the shapes of the text encoder don't tell."""
    config, vision = asdict(text.CONFIG), asdict(text.CONFIG.vision)
    told = {name: config[name] for name in ("num_heads", "num_kv_heads", "mrope_section", "max_pixels")}
    return told | {"vision_heads": vision["num_heads"]} | {k: vision[k] for k in ("window", "full_attention")}


def stored(model: QwenImageTransformer) -> dict[str, Tensor]:
    """Return the tensors of a transformer's file."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(tuple(f"{layer}.weight" for layer in SMALL)):
            tensors |= in_fp8(name, tensor)
        else:
            tensors[name] = tensor.float() if tensor.dim() == 1 and keep_float32(name) else tensor.bfloat16()
    return tensors
