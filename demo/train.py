"""Train the miniature checkpoints from nothing but the corpus and write them in the official key names.

    python -m wanqwen.demo.train [--work FOLDER] [--out demo/checkpoints]

Three files, read by the same loaders as the published ones: wan_vae, wan_text_encoder (with its tokenizer inside, as
ComfyUI's files have it) and wan_dit. A run that was stopped goes on where it was.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..core.weights.keymap import Renamer, inverse, table
from ..wan.family import LATENT_FORMAT, LATENT_MEAN, LATENT_STD, keep_float32
from ..wan.identify import METADATA_KEY
from ..wan.keymap import TEXT_ENCODER
from ..wan.vae import WanVAE
from . import corpus
from .train_dit import CONFIG as DIT_CONFIG
from .train_dit import TextToVideo, train_dit, train_tokenizer
from .train_vae import CONFIG as VAE_CONFIG
from .train_vae import match_latent_statistics, train_vae
from .training import Schedule

log = logging.getLogger(__name__)

VAE_SCHEDULE = Schedule(steps=3050, rate=2e-3, warmup=50)
DIT_SCHEDULE = Schedule(steps=7000, rate=1.5e-3)


def main() -> None:
    """Train what `work` does not hold yet, then write the checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/training"), help="where to keep the state of training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoints")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    vae = finished_vae(options.work)
    tokenizer = options.work / "spiece.model"
    if not tokenizer.exists():
        tokenizer.write_bytes(train_tokenizer())
    pair = train_dit(vae, LATENT_FORMAT, tokenizer.read_bytes(), options.work, DIT_SCHEDULE)
    write_checkpoints(options.out, vae, pair, tokenizer.read_bytes())


def finished_vae(work: Path) -> WanVAE:
    """Return the VAE with its latents scaled to Wan's statistics, training it first where that is still to do."""
    path = work / "vae_scaled.pt"
    if not path.exists():
        vae = train_vae(work, VAE_SCHEDULE)
        match_latent_statistics(vae, torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD))
        torch.save(vae.state_dict(), path)
    vae = WanVAE(VAE_CONFIG)
    vae.load_state_dict(torch.load(path, weights_only=True))
    return vae


def write_checkpoints(folder: Path, vae: WanVAE, pair: TextToVideo, tokenizer: bytes) -> None:
    """Write the three files: large matrices in bfloat16, the VAE in float16, what must be exact in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    to_official = Renamer(inverse(table(TEXT_ENCODER)))
    text = {to_official(name): t.half() for name, t in pair.text_encoder.state_dict().items() if to_official(name)}
    text["spiece_model"] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    transformer = {
        name: t.float() if keep_float32(name) else t.bfloat16() for name, t in pair.transformer.state_dict().items()
    }
    rgb, bias = latent_colours(vae)
    # What the shapes don't tell: how a width of 192 splits into heads, and how this VAE's latents look.
    facts = {METADATA_KEY: json.dumps({"num_heads": DIT_CONFIG.num_heads, "rgb": rgb, "rgb_bias": bias})}
    _write(folder / "wan_vae.safetensors", {name: t.half() for name, t in vae.state_dict().items()}, {})
    _write(folder / "wan_text_encoder.safetensors", text, {})
    _write(folder / "wan_dit.safetensors", transformer, facts)


@torch.no_grad()
def latent_colours(vae: WanVAE) -> tuple[list[list[float]], list[float]]:
    """Return the map [C][3] and bias from normalised latents to the mean colour of their pixels, by least squares."""
    clips = corpus.render(corpus.scenes()[0][:64], torch.Generator().manual_seed(4))
    latents = LATENT_FORMAT.normalise(torch.cat([vae.encode_chunk(part, vae.new_past())[0] for part in clips.split(8)]))
    frames = torch.arange(latents.shape[2]) * LATENT_FORMAT.temporal_factor
    pixels = F.avg_pool2d(clips[:, :, frames].transpose(1, 2).flatten(0, 1), LATENT_FORMAT.spatial_factor)
    known = latents.movedim(1, -1).flatten(0, -2)
    known = torch.cat((known, torch.ones(len(known), 1)), dim=1)
    fit = torch.linalg.lstsq(known, pixels.movedim(1, -1).flatten(0, -2)).solution
    return fit[:-1].tolist(), fit[-1].tolist()


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt", **facts})
    log.info("%s: %.2f MB", path, path.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
