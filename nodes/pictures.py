"""Wan from pictures: what image to video, first and last frame, and video to video start from."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.conditioning import ComfyConditioning
from ..wan.conditioning import SEEN, with_options
from ..wan.config import IMAGE_ROWS, SIZE_STEP
from ..wan.image_encoder import ImageRows, encode_with, rows_of
from ..wan.pictures import AREAS, COVER, FITS, Known, fitted_video, known_ends, seen_ends, size_for
from ..wan.vae import LATENT_FORMAT
from .types import CATEGORY, check_choice, check_is_rgb, dropped_alpha, found_by, prompt_outputs, tell, verdict
from .wan import FRAMES_STEP, fitted

CUSTOM = "custom"
SIZES = (*AREAS, CUSTOM)
MEGAPIXEL = 1_000_000
NO_ENCODER = (
    "No image encoder: the models of Wan 2.1 that start from a picture need one, so connect Load Wan Image Encoder to "
    "clip_vision."
)


class WanImageSize(io.ComfyNode):
    """The size that Wan makes of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenWanImageSize",
            display_name="Wan Size from Image",
            **found_by("resolution from image", "resize", "aspect ratio"),
            category=CATEGORY,
            description="Proposes a width and height in the shape of a picture, as Wan's own code does: of about as "
            "many pixels as the model was made for, in steps of 16.",
            inputs=[
                io.Image.Input("image", tooltip="The picture that the video starts from."),
                io.Combo.Input(
                    "area", options=list(SIZES), default=SIZES[0],
                    tooltip="How many pixels. 480p: as many as 832 x 480, for models of 480p and the 1.3B. 720p: as "
                    "1280 x 720. custom: megapixels below.",
                ),
                io.Float.Input(
                    "megapixels", default=0.4, min=0.001, max=16.0, step=0.01,
                    tooltip="Millions of pixels, for area: custom.",
                ),
            ],
            outputs=[
                io.Int.Output(display_name="width", tooltip="In pixels, a multiple of 16."),
                io.Int.Output(display_name="height", tooltip="In pixels, a multiple of 16."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, area: str | None = None) -> bool | str:
        return verdict(check_choice("area", area, SIZES))

    @classmethod
    def execute(cls, image: Tensor, area: str, megapixels: float) -> io.NodeOutput:
        pixels = AREAS.get(area, round(megapixels * MEGAPIXEL))
        width, height = size_for(image.shape[1], image.shape[2], pixels)
        made = f"{width} x {height}, of a picture of {image.shape[2]} x {image.shape[1]}"
        return io.NodeOutput(width, height, ui=tell(cls.hidden.unique_id, [made]))


class WanImageToVideo(io.ComfyNode):
    """A clip that begins with a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenWanImageToVideo",
            display_name="Wan Image to Video",
            **found_by("i2v", "animate image", "start image"),
            category=CATEGORY,
            description="Prepares a video that begins with a picture, for an I2V model. What the picture shows moves "
            "as the prompt says. ComfyUI's own samplers take the result too.",
            inputs=[
                *_prompt_and_vae(),
                io.Image.Input(
                    "image",
                    tooltip="What the video begins with, of any size. A batch is so many frames: 5 of them continue a "
                    "motion.",
                ),
                *_clip_inputs(),
                *_optional_inputs("the picture"),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, fit: str | None = None) -> bool | str:
        return verdict(check_choice("fit", fit, FITS))

    @classmethod
    def execute(
        cls,
        positive: ComfyConditioning,
        vae: Any,
        image: Tensor,
        width: int,
        height: int,
        frames: int,
        batch_size: int,
        fit: str,
        negative: ComfyConditioning | None = None,
        clip_vision: Any = None,
        clip_vision_output: Any = None,
    ) -> io.NodeOutput:
        check_is_rgb(vae)
        size, notices = fitted(width, height, frames)
        begun = image[: size[2]]
        known, said = known_ends(vae, begun, None, size, fit)
        seen = _seen(clip_vision, clip_vision_output, begun, None)
        given = "the first one given" if len(begun) == 1 else f"the first {len(begun)} given"
        if len(begun) < len(image):
            notices.append(f"{len(image)} pictures, of which the first {len(begun)} are used.")
        return _prepared(
            cls.hidden.unique_id, (positive, negative), known, seen, batch_size,
            [_made(size, given), *notices, *said, *dropped_alpha(image, vae)],
        )  # fmt: skip


class WanFirstLastFrameToVideo(io.ComfyNode):
    """A clip that begins with one picture and ends with another."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenWanFirstLastFrameToVideo",
            display_name="Wan First-Last Frame to Video",
            **found_by("flf2v", "start and end image", "interpolate"),
            category=CATEGORY,
            description="Prepares a video that begins with one picture and ends with another, for an FLF2V model; also "
            "one of them alone. ComfyUI's own samplers take the result too.",
            inputs=[
                *_prompt_and_vae(),
                *_clip_inputs(),
                io.Image.Input(
                    "first_image", optional=True,
                    tooltip="What the video begins with, of any size; a batch is its first frames.",
                ),
                io.Image.Input(
                    "last_image", optional=True,
                    tooltip="What the video ends with, of any size; a batch is its last frames.",
                ),
                *_optional_inputs("both pictures, the first before the last"),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, fit: str | None = None) -> bool | str:
        return verdict(check_choice("fit", fit, FITS))

    @classmethod
    def execute(
        cls,
        positive: ComfyConditioning,
        vae: Any,
        width: int,
        height: int,
        frames: int,
        batch_size: int,
        fit: str,
        first_image: Tensor | None = None,
        last_image: Tensor | None = None,
        negative: ComfyConditioning | None = None,
        clip_vision: Any = None,
        clip_vision_output: Any = None,
    ) -> io.NodeOutput:
        check_is_rgb(vae)
        if first_image is None and last_image is None:
            raise ValueError("Wan First-Last Frame to Video has no picture: connect first_image, last_image, or both.")
        size, notices = fitted(width, height, frames)
        known, said = known_ends(vae, first_image, last_image, size, fit)
        seen = _seen(clip_vision, clip_vision_output, first_image, last_image)
        ends = {"first": first_image, "last": last_image}
        given = " and ".join(
            f"the {name} one" if len(pictures) == 1 else f"the {name} {len(pictures)}"
            for name, pictures in ends.items()
            if pictures is not None
        )
        alpha = [line for pictures in ends.values() if pictures is not None for line in dropped_alpha(pictures, vae)]
        return _prepared(
            cls.hidden.unique_id, (positive, negative), known, seen, batch_size,
            [_made(size, f"{given} given"), *notices, *said, *alpha[:1]],
        )  # fmt: skip


class WanVideoToVideo(io.ComfyNode):
    """A clip to be made anew in part."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenWanVideoToVideo",
            display_name="Wan Video to Video",
            **found_by("v2v", "restyle video", "img2img"),
            category=CATEGORY,
            description="Encodes a video, or a picture, that the sampler changes towards the prompt: with denoise "
            "below 1, and any Wan model of text to video.",
            inputs=[
                io.Image.Input("images", tooltip="The frames of a video, 16 per second; or one picture."),
                io.Vae.Input("vae", tooltip="From Load Wan / Qwen-Image VAE, or ComfyUI's Load VAE."),
                io.Int.Input(
                    "width", default=0, min=0, max=16384, step=SIZE_STEP,
                    tooltip="In pixels, in steps of 16. 0: as the video has it, or as its shape has it with height.",
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=16384, step=SIZE_STEP,
                    tooltip="In pixels, in steps of 16. 0: as the video has it, or as its shape has it with width.",
                ),
                io.Int.Input(
                    "frames", default=0, min=0, max=4097,
                    tooltip="How many frames from the beginning on: 4n + 1 of them, what is too much is left out. 0: "
                    "all of them.",
                ),
                _fit_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For the sampler's latent input; denoise below 1.")
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, fit: str | None = None) -> bool | str:
        return verdict(check_choice("fit", fit, FITS))

    @classmethod
    def execute(cls, images: Tensor, vae: Any, width: int, height: int, frames: int, fit: str) -> io.NodeOutput:
        check_is_rgb(vae)
        pixels, notices = fitted_video(images, (width, height, frames), fit)
        made = f"{pixels.shape[2]} x {pixels.shape[1]}, {len(pixels)} frames. Lower denoise in the sampler."
        lines = [made, *notices, *dropped_alpha(images, vae)]
        return io.NodeOutput({"samples": vae.encode(pixels)}, ui=tell(cls.hidden.unique_id, lines))


def _prompt_and_vae() -> list[io.Input]:
    return [
        io.Conditioning.Input("positive", tooltip="From Wan Text Encode, or ComfyUI's own."),
        io.Vae.Input("vae", tooltip="From Load Wan / Qwen-Image VAE, or ComfyUI's Load VAE."),
    ]


def _clip_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "width", default=832, min=16, max=16384, step=SIZE_STEP,
            tooltip="Width in pixels, in steps of 16. Wan Size from Image gives what fits the picture.",
        ),
        io.Int.Input(
            "height", default=480, min=16, max=16384, step=SIZE_STEP,
            tooltip="Height in pixels, in steps of 16. Wan Size from Image gives what fits the picture.",
        ),
        io.Int.Input(
            "frames", default=81, min=1, max=4097, step=FRAMES_STEP,
            tooltip="Number of frames: 1, 5, 9... (4n + 1). 81 is what Wan is made for, 5 seconds at 16 per second.",
        ),
        io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many videos to make at once."),
        _fit_input(),
    ]  # fmt: skip


def _fit_input() -> io.Input:
    return io.Combo.Input(
        "fit",
        options=list(FITS),
        default=COVER,
        tooltip="What becomes of a picture of another shape. cover: it fills the frame, and what is too much is cut "
        "off evenly. official: it is stretched, as Wan's own code does.",
    )


def _optional_inputs(what: str) -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "negative", optional=True, tooltip="What to steer away from. Not needed where guidance is 1."
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip=f"From Load Wan Image Encoder, or ComfyUI's Load CLIP Vision with clip_vision_h: it sees {what}. "
            "The models of Wan 2.1 need it.",
        ),
        io.ClipVisionOutput.Input(
            "clip_vision_output",
            optional=True,
            tooltip=f"From ComfyUI's CLIP Vision Encode, instead of clip_vision: {what}, crop: none.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        *prompt_outputs(),
        io.Latent.Output(display_name="latent", tooltip="Empty, of the video's size: for the sampler's latent input."),
    ]


def _made(size: tuple[int, int, int], given: str) -> str:
    return "{} x {}, {} frames, {}".format(*size, given)


def _seen(clip_vision: Any, output: Any, first: Tensor | None, last: Tensor | None) -> ImageRows | None:
    """Return what the image encoder sees, from whichever of both inputs is connected."""
    if clip_vision is not None and output is not None:
        raise ValueError("clip_vision and clip_vision_output are both connected: disconnect one of them.")
    if output is not None:
        count, rows = sum(pictures is not None for pictures in (first, last)), rows_of(output)
        if len(rows) < count and rows.shape[1] < count * IMAGE_ROWS:
            raise ValueError(
                "clip_vision_output has seen one picture, and a first and a last one are given: encode both in a batch "
                "(Batch Images, CLIP Vision Encode), or connect the image encoder to clip_vision instead."
            )
        # ComfyUI's Wan takes the first entry of a batch alone.
        return ImageRows(rows[:count].flatten(0, 1)[None])
    if clip_vision is None:
        return None
    return ImageRows(seen_ends(partial(encode_with, clip_vision), first, last))


def _prepared(
    node_id: str | None,
    prompts: tuple[ComfyConditioning, ComfyConditioning | None],
    known: Known,
    seen: ImageRows | None,
    batch_size: int,
    lines: list[str],
) -> io.NodeOutput:
    """Return both prompts with the pictures, and an empty latent of the clip's size."""
    options: Mapping[str, Any] = known.options() | ({SEEN: seen} if seen else {})
    positive, negative = (None if prompt is None else with_options(prompt, options) for prompt in prompts)
    samples = torch.zeros(batch_size, LATENT_FORMAT.channels, *known.latents.shape[2:])
    return io.NodeOutput(
        positive, negative, {"samples": samples}, ui=tell(node_id, lines + ([] if seen else [NO_ENCODER]))
    )
