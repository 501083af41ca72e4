"""Random checkpoints of the three kinds in a few hundred kilobytes, written as published files are."""

import io
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from wanqwen.wan import text_encoder
from wanqwen.wan.config import TextEncoderConfig, VAEConfig, WanConfig
from wanqwen.wan.transformer import WanTransformer
from wanqwen.wan.vae import WanVAE

TEXT = TextEncoderConfig(vocab_size=48, dim=32, dim_attn=32, dim_ffn=64, num_heads=2, num_layers=2)
MODEL = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=TEXT.dim, freq_dim=32)
VAE = VAEConfig(dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
CORPUS = [
    f"a {colour} {shape} moving {way} on a {ground} background"
    for colour, ground in (("red", "white"), ("blue", "green"), ("yellow", "black"))
    for shape in ("star", "disc", "square", "triangle")
    for way in ("left", "right", "up", "down")
]


def write_model(path: Path, config: WanConfig = MODEL) -> Path:
    """Write a diffusion model; what its shapes don't tell goes into the metadata."""
    metadata = {"wanqwen": json.dumps({"num_heads": config.num_heads})}
    return _write(path, filled(WanTransformer(config)).state_dict(), metadata)


def write_vae(path: Path) -> Path:
    """Write a VAE."""
    return _write(path, filled(WanVAE(VAE)).state_dict())


def write_text_encoder(path: Path) -> Path:
    """Write a text encoder with its tokenizer inside, in Hugging Face names, as ComfyUI's single file is."""
    state = filled(text_encoder.build(TEXT)).state_dict()
    state = {name: tensor.clone() for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    return _write(path, state | {"spiece_model": torch.frombuffer(bytearray(_spiece()), dtype=torch.uint8)})


def write_all(folder: Path) -> Path:
    """Write model.safetensors, vae.safetensors and text.safetensors, and return the folder."""
    write_model(folder / "model.safetensors")
    write_vae(folder / "vae.safetensors")
    write_text_encoder(folder / "text.safetensors")
    return folder


def filled(module: nn.Module) -> nn.Module:
    """Give every parameter small random values, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def _spiece() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=TEXT.vocab_size, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
