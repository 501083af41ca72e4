"""What a Wan VACE run is guided by."""

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.conditioning import ComfyConditioning
from ..wan.controls import Source, encode, lead_of, with_control
from ..wan.family import LATENT_FORMAT, SIZE_STEP
from .types import CATEGORY, check_is_rgb, dropped_alpha, found_by, prompt_outputs, tell
from .wan import FRAMES_STEP, fitted


class WanVACE(io.ComfyNode):
    """A control of VACE: video, mask and reference images, added to both prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenWanVACE",
            display_name="Wan VACE",
            **found_by("control video", "pose", "depth", "inpaint video", "outpaint", "reference to video", "r2v"),
            category=CATEGORY,
            description="Guides a Wan VACE model. A control_video of poses, depth or lines is followed. With a mask "
            "the video is kept where it is black and made anew where it is white: paint a region to replace it; pad "
            "the video and mask the border to extend it sideways (Pad Image for Outpainting gives both). A short video "
            "with a black mask is gone on with. Reference images show who or what appears. Several of these nodes in "
            "a row guide together.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="From Wan Text Encode, or from another Wan VACE."),
                io.Conditioning.Input("negative", tooltip="From Wan Text Encode, or from another Wan VACE."),
                io.Vae.Input("vae", tooltip="From Load Wan / Qwen-Image VAE: the VAE of Wan 2.1."),
                io.Int.Input(
                    "width", default=832, min=16, max=16384, step=SIZE_STEP,
                    tooltip="Width of the result in pixels, in steps of 16. The video is made to cover it.",
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=16384, step=SIZE_STEP,
                    tooltip="Height of the result in pixels, in steps of 16.",
                ),
                io.Int.Input(
                    "frames", default=81, min=1, max=4097, step=FRAMES_STEP,
                    tooltip="Frames of the result: 1, 5, 9... (4n + 1). Those that control_video lacks are made anew.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many videos to make at once."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1000.0, step=0.01,
                    tooltip="How strongly this control guides. 0 leaves it out.",
                ),
                io.Image.Input(
                    "control_video", optional=True,
                    tooltip="The frames to follow, to change in part, or to go on from. None: all is made anew.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="White is made anew, black is kept as control_video has it. One mask for all of its "
                    "frames, or one for each. None: all is made anew, and control_video only guides.",
                ),
                io.Image.Input(
                    "reference_images", optional=True,
                    tooltip="Persons, things or places to show, best on white. A batch is so many pictures.",
                ),
            ],
            outputs=[
                *prompt_outputs(),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Empty, with one frame for each reference image before the clip: for the sampler.",
                ),
                io.Int.Output(
                    display_name="trim_latent",
                    tooltip="How many frames Trim Video Latent has to cut after ComfyUI's own sampler. Sampler "
                    "(WanQwen) leaves them out itself.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        positive: ComfyConditioning,
        negative: ComfyConditioning,
        vae: Any,
        width: int,
        height: int,
        frames: int,
        batch_size: int,
        strength: float,
        control_video: Tensor | None = None,
        mask: Tensor | None = None,
        reference_images: Tensor | None = None,
    ) -> io.NodeOutput:
        check_is_rgb(vae)
        (width, height, frames), notices = fitted(width, height, frames)
        references = () if reference_images is None else tuple(reference_images)
        encoded = encode(Source(video=control_video, mask=mask, references=references), vae, width, height, frames)
        alpha = [dropped_alpha(images, vae) for images in (control_video, reference_images) if images is not None]
        notices += max(alpha, default=[])
        made = f"{width} x {height}, {frames} frames, {len(references)} reference image(s)"
        samples = torch.zeros(LATENT_FORMAT.shape(batch_size, frames, height, width))
        prompts = [with_control(each, encoded, strength) for each in (positive, negative)]
        lead = max(map(lead_of, prompts))  # a node before this one may have more references
        before = samples[:, :, :1].expand(-1, -1, lead, -1, -1)
        return io.NodeOutput(
            *prompts,
            {"samples": torch.cat((before, samples), dim=2)},
            lead,
            ui=tell(cls.hidden.unique_id, [made, *notices, *encoded.notices]),
        )
