"""Train the miniature text encoder and diffusion transformer together, on latents of the miniature VAE."""
# B clips, S text rows, E text width

import io
import logging
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.blocks import Run
from ...core.types import LatentFormat
from ...wan.config import TEXT_LEN, WanConfig
from ...wan.transformer import WanTransformer
from ...wan.vae import WanVAE
from ...wan.vae_layers import Past
from .. import flow
from ..training import Schedule
from . import corpus

log = logging.getLogger(__name__)

TEXT_WIDTH = 96
CONFIG = WanConfig(dim=192, ffn_dim=768, num_heads=3, num_layers=4, freq_dim=128, text_dim=TEXT_WIDTH)
BATCH = 64
CLIPS_PER_SCENE = 22


def text_config(vocab_size: int):
    """Return the transformers configuration of the miniature UMT5 encoder."""
    from transformers import UMT5Config

    return UMT5Config(
        vocab_size=vocab_size, d_model=TEXT_WIDTH, d_kv=32, d_ff=192, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


def train_tokenizer() -> bytes:
    """Return a sentencepiece model of the captions, with T5's special ids (pad 0, end 1, unknown 2)."""
    import sentencepiece

    rng, lines = random.Random(0), []
    for scene in (scene for part in corpus.scenes() for scene in part):
        lines += [scene.caption(rng, chinese) for chinese in (False, True) for _ in range(4)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=320, hard_vocab_limit=False,
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


class TextToVideo(nn.Module):
    """The two networks that learn together."""

    def __init__(self, vocab_size: int):
        super().__init__()
        from transformers import UMT5EncoderModel

        self.text_encoder = UMT5EncoderModel(text_config(vocab_size))
        self.transformer = WanTransformer(CONFIG)
        initialise(self.transformer)

    def forward(self, x: Tensor, timestep: Tensor, ids: list[list[int]], run: Run) -> Tensor:
        """Return velocities [B, C, T, h, w] for captions given as token ids."""
        lengths = torch.tensor([len(row) for row in ids])
        longest = int(lengths.max())
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        valid = torch.arange(longest) < lengths[:, None]
        rows = self.text_encoder(input_ids=padded, attention_mask=valid.long()).last_hidden_state
        rows, bias = with_zeros([row[:length].float() for row, length in zip(rows, lengths, strict=True)])
        return self.transformer(x, timestep, self.transformer.prompt(rows, run, bias), run)


def with_zeros(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of texts [S, E] as one batch, and the bias [B, S] of each row's key.

    The model attends 512 - S zero rows; the few that are here stand for all of them, each for its share.
    """
    lengths = torch.tensor([len(text) for text in texts])
    rows = nn.utils.rnn.pad_sequence([F.pad(text, (0, 0, 0, 1)) for text in texts], batch_first=True)
    absent = torch.arange(rows.shape[1]) >= lengths[:, None]
    return rows, torch.log((TEXT_LEN - lengths) / absent.sum(dim=1))[:, None] * absent


@torch.no_grad()
def initialise(transformer: WanTransformer) -> None:
    """Xavier for the products, small modulation, and a head that starts at zero velocity."""
    for name, parameter in transformer.named_parameters():
        if parameter.dim() >= 2 and "modulation" not in name:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
        elif name.endswith("bias"):
            parameter.zero_()
        elif "modulation" in name:
            parameter.normal_(std=CONFIG.dim**-0.5)
    for name in ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"):
        transformer.get_submodule(name).weight.normal_(std=0.02)
    transformer.head.head.weight.zero_()


def train_dit(
    vae: WanVAE, latent_format: LatentFormat, tokenizer: bytes, work: Path, schedule: Schedule
) -> TextToVideo:
    """Return the trained pair (its moving average); resumes from `work` and saves there as it goes."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    torch.manual_seed(0)
    latents, owners = _cached_latents(vae, latent_format, work)
    training, _ = corpus.scenes()
    run = Run(dtype=torch.bfloat16)

    def errors(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        generator, rng = torch.Generator().manual_seed(step), random.Random(step)
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        captions = [training[owners[i]].caption(rng, chinese=rng.random() < 0.4) for i in chosen.tolist()]
        ids = [[*pieces.encode("" if rng.random() < flow.CAPTION_DROPOUT else caption), 1] for caption in captions]
        noisy, sigma, wanted = flow.add_noise(latents[chosen].float(), generator)
        return sigma, flow.squared_errors(model(noisy, 1000 * sigma, ids, run), wanted)

    return flow.train(TextToVideo(pieces.vocab_size()), work / "clips_dit.pt", schedule, errors)


@torch.no_grad()
def _cached_latents(vae: WanVAE, latent_format: LatentFormat, work: Path) -> tuple[Tensor, list[int]]:
    """Return normalised latents of many clips of every training scene, and the scene of each."""
    training, _ = corpus.scenes()
    owners = [i % len(training) for i in range(CLIPS_PER_SCENE * len(training))]
    path = work / "clips_latents.pt"
    if not path.exists():
        vae.channels_last()
        parts, generator = [], torch.Generator().manual_seed(3)
        for first in range(0, len(owners), 4):
            clips = corpus.render([training[i] for i in owners[first : first + 4]], generator)
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(latent_format.normalise(vae.encode_chunk(clips, Past())[0].float()).half())
            if first % 1024 == 0:
                log.info("latents %d/%d", first, len(owners))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(parts), path)
    return torch.load(path, weights_only=True), owners
