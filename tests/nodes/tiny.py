"""Random checkpoints of both families in a few hundred kilobytes, written as published files are."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from wanqwen.core.weights.keymap import Renamer
from wanqwen.qwen_image import text_encoder as qwen_text_encoder
from wanqwen.qwen_image.config import QwenImageConfig
from wanqwen.qwen_image.tokenizer import EMBEDDED_NAME
from wanqwen.qwen_image.transformer import QwenImageTransformer
from wanqwen.qwen_image.vl_config import VisionConfig, VLConfig
from wanqwen.tests.qwen_image.test_tokenizer import tiny_tokenizer
from wanqwen.wan import image_encoder, text_encoder
from wanqwen.wan.config import ImageEncoderConfig, TextEncoderConfig, VAEConfig, WanConfig
from wanqwen.wan.keymap import vae_spellings
from wanqwen.wan.transformer import WanTransformer
from wanqwen.wan.vae import WanVAE

TEXT = TextEncoderConfig(vocab_size=48, dim=32, dim_attn=32, dim_ffn=64, num_heads=2, num_layers=2)
MODEL = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=TEXT.dim, freq_dim=32)
IMAGE = ImageEncoderConfig(dim=24, dim_ffn=40, num_heads=2, num_layers=3, patch_size=4, num_positions=26)
VACE = replace(MODEL, vace_layers=(0, 1), vace_dim=96)
VAE = VAEConfig(dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
# Pictures are 56 x 56 pixels to this encoder, four rows each. Its width is another than that of Wan's above.
VL = VLConfig(
    hidden=48, intermediate=64, num_layers=2, num_heads=6, num_kv_heads=2, vocab_size=700, mrope_section=(1, 1, 2),
    max_pixels=56 * 56,
    vision=VisionConfig(
        depth=2, hidden=32, intermediate=40, num_heads=4, out_hidden=48, window=56, full_attention=(1,)
    ),
)  # fmt: skip
QWEN = QwenImageConfig(num_layers=2, num_heads=2, dim=48, ffn_dim=64, text_dim=VL.hidden, freq_dim=32, axes=(4, 10, 10))
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


def write_text_encoder(path: Path, config: TextEncoderConfig = TEXT) -> Path:
    """Write a text encoder with its tokenizer inside, in Hugging Face names, as ComfyUI's single file is."""
    state = filled(text_encoder.build(config)).state_dict()
    state = {name: tensor.clone() for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    return _write(path, state | {"spiece_model": torch.frombuffer(bytearray(_spiece()), dtype=torch.uint8)})


def write_image_encoder(path: Path) -> Path:
    """Write an image encoder in the names that the installed transformers gives it."""
    metadata = {"wanqwen": json.dumps({"num_heads": IMAGE.num_heads})}
    return _write(path, filled(image_encoder.build(IMAGE)).state_dict(), metadata)


def write_qwen_model(path: Path, variant: str = "t2i") -> Path:
    """Write a Qwen-Image diffusion model."""
    own = {"num_heads": QWEN.num_heads, "axes": QWEN.axes, "variant": variant}
    config = replace(QWEN, zero_cond_t=variant == "edit-2511")
    return _write(path, filled(QwenImageTransformer(config)).state_dict(), {"wanqwen": json.dumps(own)})


def write_qwen_text_encoder(path: Path, config: VLConfig = VL, has_tokenizer: bool = True) -> Path:
    """Write a Qwen2.5-VL, with its tokenizer inside or without one."""
    parts = {
        qwen_text_encoder.LANGUAGE: qwen_text_encoder.build_language(config),
        qwen_text_encoder.VISION: qwen_text_encoder.build_vision(config.vision),
    }
    state = {
        prefix + name: tensor
        for prefix, part in parts.items()
        for name, tensor in filled(part.to_empty(device="cpu")).state_dict().items()
    }
    told = ("num_heads", "num_kv_heads", "mrope_section", "max_pixels")
    own = {name: asdict(config)[name] for name in told} | {
        "vision_heads": config.vision.num_heads,
        "window": config.vision.window,
        "full_attention": config.vision.full_attention,
    }
    if has_tokenizer:
        state[EMBEDDED_NAME] = torch.frombuffer(bytearray(tiny_tokenizer()), dtype=torch.uint8)
    return _write(path, state, {"wanqwen": json.dumps(own)})


def write_qwen_vae(path: Path) -> Path:
    """Write a VAE in the names that Qwen-Image's has in diffusers."""
    [diffusers] = [spelling for spelling in vae_spellings(VAE.num_res_blocks) if spelling.name == "diffusers"]
    rename = Renamer(diffusers.table)
    return _write(path, {rename(name): tensor for name, tensor in filled(WanVAE(VAE)).state_dict().items()})


def write_all(folder: Path) -> Path:
    """Write model, vae, text, image, qwen_model, qwen_vae and qwen_text (.safetensors), and return the folder."""
    write_model(folder / "model.safetensors")
    write_vae(folder / "vae.safetensors")
    write_text_encoder(folder / "text.safetensors")
    write_image_encoder(folder / "image.safetensors")
    write_qwen_model(folder / "qwen_model.safetensors")
    write_qwen_vae(folder / "qwen_vae.safetensors")
    write_qwen_text_encoder(folder / "qwen_text.safetensors")
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
