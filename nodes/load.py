"""Loaders: from a file in a dropdown to a model, encoder or VAE. They read headers; weights wait for first use.

Their `validate_inputs` name the file alone: ComfyUI shows what is wrong at every input that they name.
"""

import torch
from comfy_api.latest import io

from ..families import recognised_by
from ..loading import HUB, load_image_encoder, load_model, load_text_encoder, load_vae
from ..qwen_image.config import VARIANTS
from ..qwen_image.files import NAME as QWEN_IMAGE
from ..wan.files import NAME as WAN
from .types import (
    CATEGORY,
    QwenTextEncoder,
    WanModel,
    WanTextEncoder,
    check_file,
    chosen,
    file_stamp,
    find_file,
    found_by,
    list_files,
    tell,
    verdict,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODEL_PRECISIONS = {"auto": None, **DTYPES}
VAE_PRECISIONS = {"auto": torch.float32, **DTYPES}
IMAGE_ENCODER_PRECISIONS = {"auto": None, **DTYPES}
TOKENIZERS = {"auto": None, "hub": HUB}
QWEN_PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}  # float16 overflows
QWEN_VARIANTS = {"auto": None} | {name: name for name in VARIANTS}
DEVICES = {name: name for name in ("auto", "cpu", "gpu")}
GIB = 1 << 30


class LoadWanModel(io.ComfyNode):
    """A Wan diffusion model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoadWanModel",
            display_name="Load Wan Model",
            **found_by("wan model loader", "unet loader", "diffusion model", "load checkpoint", "gguf"),
            category=CATEGORY,
            description="Opens a Wan 2.1 model: of text, of pictures or VACE. The weights are read when the sampler "
            "first runs.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files("diffusion_models", "wan_"),
                    tooltip="A Wan 2.1 file (T2V, I2V, FLF2V or VACE) from models/diffusion_models (or models/unet), "
                    "in the official, ComfyUI or diffusers naming: 16 bits, DFloat11, fp8, int8 or GGUF. demo/... are "
                    "the miniatures that come with this pack.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(MODEL_PRECISIONS),
                    default="auto",
                    tooltip="What the model computes in. auto: bf16 on GPUs that have it, else fp32. fp16 is for "
                    "GPUs without bf16; it can overflow.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model", tooltip="The diffusion model, for the Sampler.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return verdict(check_file("diffusion_models", file))

    @classmethod
    def fingerprint_inputs(cls, file: str | None, precision: str | None) -> str:
        return file_stamp("diffusion_models", file)

    @classmethod
    def execute(cls, file: str, precision: str) -> io.NodeOutput:
        return io.NodeOutput(
            load_model(find_file("diffusion_models", file), chosen("precision", precision, MODEL_PRECISIONS), WAN)
        )


class LoadWanTextEncoder(io.ComfyNode):
    """The text encoder of Wan, with its tokenizer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoadWanTextEncoder",
            display_name="Load Wan Text Encoder",
            **found_by("umt5", "t5", "clip loader", "text encoder loader"),
            category=CATEGORY,
            description="Opens the text encoder of Wan (UMT5-XXL). The weights are read when a new prompt comes; "
            "prompts seen before cost nothing.",
            inputs=_text_encoder_inputs(
                "wan_",
                file="A UMT5 file from models/text_encoders (or models/clip): bf16, DFloat11, fp16, fp8 or GGUF, or "
                "the official .pth; the last two with the tokenizer beside it. demo/... is the miniature that comes "
                "with this pack.",
                on_cpu="video model; umt5-xxl needs 12 GB of RAM there.",
                limit=" 0 is no limit; 2 is enough for umt5-xxl.",
                tokenizer="auto: the one inside the file or beside it. hub: download the published one (5 MB, from "
                "huggingface.co), for files that come without.",
            ),
            outputs=[WanTextEncoder.Output(display_name="text_encoder", tooltip="For Wan Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return verdict(check_file("text_encoders", file))

    @classmethod
    def fingerprint_inputs(
        cls, file: str | None, device: str | None, max_vram_gb: float | None, tokenizer: str | None
    ) -> str:
        return file_stamp("text_encoders", file)

    @classmethod
    def execute(cls, file: str, device: str, max_vram_gb: float, tokenizer: str) -> io.NodeOutput:
        return _open_text_encoder(WAN, file, device, max_vram_gb, tokenizer)


class LoadWanVAE(io.ComfyNode):
    """The VAE of Wan and of Qwen-Image; its output fits ComfyUI's own VAE nodes too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoadWanVAE",
            display_name="Load Wan / Qwen-Image VAE",
            **found_by("vae loader", "load vae"),
            category=CATEGORY,
            description="Opens the VAE of Wan 2.1 or of Qwen-Image. ComfyUI's own VAE nodes can use it as well.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files("vae"),
                    tooltip="A Wan 2.1 or Qwen-Image VAE from models/vae: the one that belongs to the model. demo/... "
                    "are the miniatures that come with this pack.",
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
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return verdict(check_file("vae", file))

    @classmethod
    def fingerprint_inputs(cls, file: str | None, precision: str | None) -> str:
        return file_stamp("vae", file)

    @classmethod
    def execute(cls, file: str, precision: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(find_file("vae", file), chosen("precision", precision, VAE_PRECISIONS)))


class LoadWanImageEncoder(io.ComfyNode):
    """The CLIP of Wan's image-to-video models; its output fits ComfyUI's own CLIP Vision nodes too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoadWanImageEncoder",
            display_name="Load Wan Image Encoder",
            **found_by("clip vision loader", "clip_vision_h", "image encoder"),
            category=CATEGORY,
            description="Opens the image encoder of Wan's image-to-video models (CLIP ViT-H). The weights are read "
            "when a new picture comes; pictures seen before cost nothing. ComfyUI's CLIP Vision Encode can use it.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files("clip_vision", "wan_"),
                    tooltip="A CLIP ViT-H file from models/clip_vision: clip_vision_h.safetensors or the official .pth "
                    "(open-clip-xlm-roberta-large-vit-huge-14). demo/... is the miniature that comes with this pack.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(IMAGE_ENCODER_PRECISIONS),
                    default="auto",
                    tooltip="What the encoder computes in. auto: on a GPU fp16, as the official code does (bf16 for a "
                    "file stored so), on a CPU fp32.",
                ),
            ],
            outputs=[
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip="For the nodes that make video from pictures, ours or ComfyUI's, and for CLIP Vision "
                    "Encode.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return verdict(check_file("clip_vision", file))

    @classmethod
    def fingerprint_inputs(cls, file: str | None, precision: str | None) -> str:
        return file_stamp("clip_vision", file)

    @classmethod
    def execute(cls, file: str, precision: str) -> io.NodeOutput:
        path = find_file("clip_vision", file)
        return io.NodeOutput(load_image_encoder(path, chosen("precision", precision, IMAGE_ENCODER_PRECISIONS)))


class LoadQwenImageModel(io.ComfyNode):
    """A Qwen-Image diffusion model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoadQwenImageModel",
            display_name="Load Qwen-Image Model",
            **found_by("qwen model loader", "unet loader", "diffusion model", "gguf"),
            category=CATEGORY,
            description="Opens a Qwen-Image model: text to image, or one of the Edit models. The weights are read when "
            "the sampler first runs.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files("diffusion_models", "qwen_"),
                    tooltip="A Qwen-Image file from models/diffusion_models (or models/unet): Qwen-Image, 2512, Edit, "
                    "Edit-2509 or Edit-2511; 16 bits, DFloat11, fp8, int8 or GGUF. demo/... are the miniatures "
                    "that come with this pack.",
                ),
                io.Combo.Input(
                    "variant",
                    options=list(QWEN_VARIANTS),
                    default="auto",
                    tooltip="Which of the models the file holds; they have the same weights' names. auto: from a mark "
                    "in the file, else from its name. The node says what was found. Choose if that is wrong: 2511 run "
                    "as 2509 gives plausible, but wrong edits.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(QWEN_PRECISIONS),
                    default="auto",
                    tooltip="What the model computes in. auto: bf16 on GPUs that have it, else fp32. There is no "
                    "fp16: this model overflows in it.",
                ),
            ],
            outputs=[
                WanModel.Output(display_name="model", tooltip="The diffusion model, for Sampler and Edit Encode.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return verdict(check_file("diffusion_models", file))

    @classmethod
    def fingerprint_inputs(cls, file: str | None, variant: str | None, precision: str | None) -> str:
        return file_stamp("diffusion_models", file)

    @classmethod
    def execute(cls, file: str, variant: str, precision: str) -> io.NodeOutput:
        named = chosen("variant", variant, QWEN_VARIANTS)
        path = find_file("diffusion_models", file)
        handle = load_model(path, chosen("precision", precision, QWEN_PRECISIONS), QWEN_IMAGE, named)
        source = "as chosen" if named else f"by {recognised_by(handle.checkpoint, handle.identity)}"
        line = f"{VARIANTS[handle.identity.variant].title}, {source}"
        return io.NodeOutput(handle, ui=tell(cls.hidden.unique_id, [line]))


class LoadQwenImageTextEncoder(io.ComfyNode):
    """The text encoder of Qwen-Image, with its tokenizer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoadQwenImageTextEncoder",
            display_name="Load Qwen-Image Text Encoder",
            **found_by("qwen2.5-vl", "clip loader", "text encoder loader"),
            category=CATEGORY,
            description="Opens the text encoder of Qwen-Image (Qwen2.5-VL-7B), which also looks at the pictures of an "
            "edit. The weights are read when a new prompt comes; prompts seen before cost nothing.",
            inputs=_text_encoder_inputs(
                "qwen_",
                file="A Qwen2.5-VL-7B file from models/text_encoders (or models/clip): bf16, DFloat11, fp8, or GGUF, "
                "which sees no pictures and so is not for edits. demo/... is the miniature that comes with this pack.",
                on_cpu="image model; the 7B encoder takes up to 17 GB of RAM there, and next to none on a GPU.",
                limit=" 0 is no limit; 2 is enough for prompts, 3 with pictures.",
                tokenizer="auto: the one inside the file, beside it, or ComfyUI's own. hub: download the published "
                "one (7 MB, from huggingface.co).",
            ),
            outputs=[
                QwenTextEncoder.Output(
                    display_name="text_encoder", tooltip="For Qwen-Image Text Encode and Edit Encode."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return verdict(check_file("text_encoders", file))

    @classmethod
    def fingerprint_inputs(
        cls, file: str | None, device: str | None, max_vram_gb: float | None, tokenizer: str | None
    ) -> str:
        return file_stamp("text_encoders", file)

    @classmethod
    def execute(cls, file: str, device: str, max_vram_gb: float, tokenizer: str) -> io.NodeOutput:
        return _open_text_encoder(QWEN_IMAGE, file, device, max_vram_gb, tokenizer)


def _text_encoder_inputs(demo: str, *, file: str, on_cpu: str, limit: str, tokenizer: str) -> list[io.Input]:
    """Return the inputs that all text encoders have; `demo` is how their miniatures' names begin."""
    return [
        io.Combo.Input("file", options=list_files("text_encoders", demo), tooltip=file),
        io.Combo.Input(
            "device",
            options=list(DEVICES),
            default="auto",
            tooltip=f"Where prompts are encoded. auto: the GPU if there is one. cpu leaves all VRAM to the {on_cpu}",
        ),
        io.Float.Input(
            "max_vram_gb",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.5,
            tooltip="The most VRAM that the text encoder may take, in GB; its layers then come and go one by one."
            + limit,
        ),
        io.Combo.Input("tokenizer", options=list(TOKENIZERS), default="auto", tooltip=tokenizer),
    ]


def _open_text_encoder(family: str, file: str, device: str, max_vram_gb: float, tokenizer: str) -> io.NodeOutput:
    encoder = load_text_encoder(
        find_file("text_encoders", file),
        family=family,
        device=chosen("device", device, DEVICES),
        max_vram_bytes=int(max_vram_gb * GIB) or None,
        tokenizer=chosen("tokenizer", tokenizer, TOKENIZERS),
    )
    return io.NodeOutput(encoder)
