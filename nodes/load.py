"""Loaders: from a file in a dropdown to a model, text encoder or VAE. They read headers; weights wait for first use."""

import torch
from comfy_api.latest import io

from ..loading import HUB, load_model, load_text_encoder, load_vae
from .types import (
    CATEGORY,
    WanModel,
    WanTextEncoder,
    check_choice,
    check_file,
    file_stamp,
    find_file,
    list_files,
    verdict,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODEL_PRECISIONS = {"auto": None, **DTYPES}
VAE_PRECISIONS = {"auto": torch.float32, **DTYPES}
TOKENIZERS = {"auto": None, "hub": HUB}
DEVICES = ("auto", "cpu", "gpu")
GIB = 1 << 30


class LoadWanModel(io.ComfyNode):
    """A Wan diffusion model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoadWanModel",
            display_name="Load Wan Model",
            category=CATEGORY,
            description="Opens a Wan 2.1 text-to-video model. The weights are read when the sampler first runs.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files("diffusion_models"),
                    tooltip="A Wan 2.1 T2V file from models/diffusion_models (or models/unet), in the official, "
                    "ComfyUI or diffusers naming. demo/... is the miniature that comes with this pack.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(MODEL_PRECISIONS),
                    default="auto",
                    tooltip="What the model computes in. auto: bf16 on a GPU, fp32 on a CPU. fp16 is for GPUs without "
                    "bf16; it can overflow.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model", tooltip="The diffusion model, for the Sampler.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None, precision: str | None) -> bool | str:
        return verdict(
            check_file("diffusion_models", file),
            check_choice("precision", precision, MODEL_PRECISIONS),
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None, precision: str | None) -> str:
        return file_stamp("diffusion_models", file)

    @classmethod
    def execute(cls, file: str, precision: str) -> io.NodeOutput:
        return io.NodeOutput(load_model(find_file("diffusion_models", file), MODEL_PRECISIONS[precision]))


class LoadWanTextEncoder(io.ComfyNode):
    """The text encoder of Wan, with its tokenizer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoadWanTextEncoder",
            display_name="Load Wan Text Encoder",
            category=CATEGORY,
            description="Opens the text encoder of Wan (UMT5-XXL). The weights are read when a new prompt comes; "
            "prompts seen before cost nothing.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files("text_encoders"),
                    tooltip="A UMT5 file from models/text_encoders (or models/clip): bf16, fp16 or fp8, or the "
                    "official .pth with its tokenizer beside it. demo/... is the miniature that comes with this pack.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICES),
                    default="auto",
                    tooltip="Where prompts are encoded. auto: the GPU if there is one. cpu leaves all VRAM to the "
                    "video model; umt5-xxl needs 12 GB of RAM there.",
                ),
                io.Float.Input(
                    "max_vram_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="The most VRAM that the text encoder may take, in GB; its layers then come and go one by "
                    "one. 0 is no limit; 2 is enough for umt5-xxl.",
                ),
                io.Combo.Input(
                    "tokenizer",
                    options=list(TOKENIZERS),
                    default="auto",
                    tooltip="auto: the one inside the file or beside it. hub: download the published one (5 MB, from "
                    "huggingface.co), for files that come without.",
                ),
            ],
            outputs=[WanTextEncoder.Output(display_name="text_encoder", tooltip="For Wan Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None, device: str | None, tokenizer: str | None) -> bool | str:
        return verdict(
            check_file("text_encoders", file),
            check_choice("device", device, DEVICES),
            check_choice("tokenizer", tokenizer, TOKENIZERS),
        )

    @classmethod
    def fingerprint_inputs(
        cls, file: str | None, device: str | None, max_vram_gb: float | None, tokenizer: str | None
    ) -> str:
        return file_stamp("text_encoders", file)

    @classmethod
    def execute(cls, file: str, device: str, max_vram_gb: float, tokenizer: str) -> io.NodeOutput:
        limit = int(max_vram_gb * GIB) or None
        path = find_file("text_encoders", file)
        chosen = TOKENIZERS[tokenizer]
        return io.NodeOutput(load_text_encoder(path, device=device, max_vram_bytes=limit, tokenizer=chosen))


class LoadWanVAE(io.ComfyNode):
    """The video VAE of Wan; its output fits ComfyUI's own VAE nodes too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoadWanVAE",
            display_name="Load Wan VAE",
            category=CATEGORY,
            description="Opens the Wan 2.1 video VAE. ComfyUI's own VAE nodes can use it as well.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files("vae"),
                    tooltip="A Wan 2.1 VAE from models/vae. demo/... is the miniature that comes with this pack.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(VAE_PRECISIONS),
                    default="auto",
                    tooltip="What the VAE computes in. auto is fp32, the most exact; bf16 and fp16 take half the "
                    "memory and less time on a GPU.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For VAE Decode and VAE Encode, ours or ComfyUI's.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None, precision: str | None) -> bool | str:
        return verdict(check_file("vae", file), check_choice("precision", precision, VAE_PRECISIONS))

    @classmethod
    def fingerprint_inputs(cls, file: str | None, precision: str | None) -> str:
        return file_stamp("vae", file)

    @classmethod
    def execute(cls, file: str, precision: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(find_file("vae", file), VAE_PRECISIONS[precision]))
