"""What a Qwen-Image run starts from: prompts, pictures to edit, sizes."""

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.types import ModelHandle
from ..qwen_image.conditioning import to_comfy
from ..qwen_image.config import BUCKETS, NEGATIVE_PROMPT, TOKEN_PIXELS, VARIANTS
from ..qwen_image.editing import SIZES, lay_out, on_grid
from ..qwen_image.family import LATENT_FORMAT, check_is_qwen_image
from ..qwen_image.text_encoder import TextEncoder
from ..qwen_image.tokenizer import MAX_TEXT_TOKENS
from .types import (
    CATEGORY,
    FINISH,
    QwenTextEncoder,
    WanModel,
    check_choice,
    check_is_rgb,
    encode_prompts,
    found_by,
    prompt_inputs,
    prompt_outputs,
    tell,
    verdict,
)

CUSTOM = "custom"
NEGATIVE = {
    "negative": "What to steer away from. A single space is what the model was published with.",
    "default_negative": NEGATIVE_PROMPT,
}
ASPECTS = {f"{ratio} ({width}x{height})": (width, height) for ratio, (width, height) in BUCKETS.items()}


class QwenImageTextEncode(io.ComfyNode):
    """Both prompts of a picture in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenQwenImageTextEncode",
            display_name="Qwen-Image Text Encode",
            **found_by("prompt", "positive prompt", "negative prompt", "clip text encode", "qwen prompt"),
            category=CATEGORY,
            description="Encodes what the picture should show and what it should not. ComfyUI's own samplers take the "
            "result too.",
            inputs=[
                QwenTextEncoder.Input("text_encoder", tooltip="From Load Qwen-Image Text Encoder."),
                *prompt_inputs(
                    positive="What the picture shows, in English or Chinese; text to be written goes in quotes. At "
                    "most 1024 tokens are read. The authors end prompts with ', Ultra HD, 4K, cinematic composition.'",
                    **NEGATIVE,
                ),
            ],
            outputs=prompt_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, text_encoder: TextEncoder, positive: str, negative: str) -> io.NodeOutput:
        return encode_prompts(cls.hidden.unique_id, text_encoder, positive, negative, to_comfy, MAX_TEXT_TOKENS)


class QwenImageEditEncode(io.ComfyNode):
    """An instruction and the pictures it is about."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenQwenImageEditEncode",
            display_name="Qwen-Image Edit Encode",
            **found_by("edit image", "instruction", "qwen edit", "text encode qwen image edit", "reference image"),
            category=CATEGORY,
            description="Encodes an instruction together with the pictures it is about, and makes the latent of the "
            "right size for the result.",
            inputs=[
                WanModel.Input("model", tooltip="From Load Qwen-Image Model; it decides how pictures are shown to it."),
                QwenTextEncoder.Input("text_encoder", tooltip="From Load Qwen-Image Text Encoder."),
                io.Vae.Input("vae", tooltip="From Load VAE: the VAE of Qwen-Image."),
                io.Image.Input(
                    "image_1",
                    tooltip="The picture to edit ('Picture 1' of Edit-2509 and 2511). A batch is so many pictures.",
                ),
                *prompt_inputs(
                    positive="What to do, in English or Chinese: 'make the text green'. With several pictures say "
                    "which: 'the cat of Picture 1 on the sofa of Picture 2'.",
                    **NEGATIVE,
                ),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default="published",
                    tooltip="published: about a million pixels, in the shape of the last picture. pixel_aligned: the "
                    "result lies on the very pixels of image_1; what is not edited stays where it was, no zoom and no "
                    "shift. custom: width and height below.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=16384,
                    step=TOKEN_PIXELS,
                    tooltip="Of the result, for size: custom.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=16384,
                    step=TOKEN_PIXELS,
                    tooltip="Of the result, for size: custom.",
                ),
                io.Image.Input("image_2", optional=True, tooltip="'Picture 2', for Edit-2509 and Edit-2511."),
                io.Image.Input("image_3", optional=True, tooltip="'Picture 3', for Edit-2509 and Edit-2511."),
            ],
            outputs=[
                *prompt_outputs(),
                io.Latent.Output(display_name="latent", tooltip="Empty, of the size of the result: for the sampler."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, size: str | None = None) -> bool | str:
        return verdict(check_choice("size", size, SIZES))

    @classmethod
    def execute(
        cls,
        model: ModelHandle,
        text_encoder: TextEncoder,
        vae: Any,
        image_1: Tensor,
        positive: str,
        negative: str,
        size: str,
        width: int,
        height: int,
        image_2: Tensor | None = None,
        image_3: Tensor | None = None,
    ) -> io.NodeOutput:
        check_is_qwen_image(model.identity)
        check_is_rgb(vae)
        pictures = [picture for images in (image_1, image_2, image_3) if images is not None for picture in images]
        edit = lay_out(pictures, VARIANTS[model.identity.variant], size, (width, height))
        prompts = edit.encode([positive, negative], text_encoder, vae)
        samples = torch.zeros(LATENT_FORMAT.shape(1, 1, edit.height, edit.width))
        made = f"{len(pictures)} picture(s), result {edit.width} x {edit.height}"
        return io.NodeOutput(
            *(to_comfy([prompt]) for prompt in prompts),
            {"samples": samples} | ({FINISH: edit.finish} if edit.finish else {}),
            ui=tell(cls.hidden.unique_id, [made, *edit.notices]),
        )


class EmptyQwenImageLatent(io.ComfyNode):
    """An empty picture of a size that Qwen-Image was made for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenEmptyQwenImageLatent",
            display_name="Empty Qwen-Image Latent",
            **found_by("empty latent image", "image size", "aspect ratio", "resolution"),
            category=CATEGORY,
            description="Says how large the picture will be: one of the sizes that Qwen-Image was made for, or any.",
            inputs=[
                io.Combo.Input(
                    "aspect_ratio",
                    options=[*ASPECTS, CUSTOM],
                    default=next(iter(ASPECTS)),
                    tooltip="The sizes that Qwen-Image was made for; custom takes width and height.",
                ),
                io.Int.Input(
                    "width", default=1328, min=16, max=16384, step=TOKEN_PIXELS,
                    tooltip="Width in pixels, in steps of 16, for aspect_ratio: custom.",
                ),
                io.Int.Input(
                    "height", default=1328, min=16, max=16384, step=TOKEN_PIXELS,
                    tooltip="Height in pixels, in steps of 16, for aspect_ratio: custom.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures to make at once."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler's latent input.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, aspect_ratio: str | None = None) -> bool | str:
        return verdict(check_choice("aspect_ratio", aspect_ratio, [*ASPECTS, CUSTOM]))

    @classmethod
    def execute(cls, aspect_ratio: str, width: int, height: int, batch_size: int) -> io.NodeOutput:
        asked = ASPECTS.get(aspect_ratio, (width, height))
        width, height, notices = on_grid(*asked)
        lines = [f"{width} x {height}", *notices]
        samples = torch.zeros(LATENT_FORMAT.shape(batch_size, 1, height, width))
        return io.NodeOutput({"samples": samples}, ui=tell(cls.hidden.unique_id, lines))
