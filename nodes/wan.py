"""What a Wan run starts from."""

import logging

import torch
from comfy_api.latest import io

from ..wan.family import LATENT_FORMAT, SIZE_STEP, fit_clip
from .types import CATEGORY, found_by, tell

log = logging.getLogger(__name__)

FRAMES_STEP = LATENT_FORMAT.temporal_factor  # after the first frame, which stands alone


class EmptyWanLatent(io.ComfyNode):
    """An empty clip of a size that Wan can make."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenEmptyWanLatent",
            display_name="Empty Wan Latent",
            **found_by("empty latent video", "video size", "frames", "resolution"),
            category=CATEGORY,
            description="Says how large and how long the video will be. What Wan can't make is changed to the nearest "
            "it can, and a message on the node says so.",
            inputs=[
                io.Int.Input(
                    "width", default=832, min=16, max=16384, step=SIZE_STEP,
                    tooltip="Width in pixels, in steps of 16. The 1.3B model is made for 832 x 480.",
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=16384, step=SIZE_STEP,
                    tooltip="Height in pixels, in steps of 16. The 14B model can also make 1280 x 720.",
                ),
                io.Int.Input(
                    "frames", default=81, min=1, max=4097, step=FRAMES_STEP,
                    tooltip="Number of frames: 1, 5, 9... (4n + 1). 81 is what Wan is made for, 5 seconds at 16 per "
                    "second; 1 is a still picture.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many videos to make at once."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler's latent input.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, width: int, height: int, frames: int, batch_size: int) -> io.NodeOutput:
        (width, height, frames), notices = fitted(width, height, frames)
        latent = {"samples": torch.zeros(LATENT_FORMAT.shape(batch_size, frames, height, width))}
        made = f"{width} x {height}, {frames} frames"
        return io.NodeOutput(latent, ui=tell(cls.hidden.unique_id, [made, *notices]))


def fitted(width: int, height: int, frames: int) -> tuple[tuple[int, int, int], list[str]]:
    """Return the nearest width, height and frames that Wan can make, and what was changed, which the log says too."""
    names, asked = ("width", "height", "frames"), (width, height, frames)
    made = fit_clip(*asked)
    notices = [
        f"{name} {wanted} changed to {found}: {RULES[name]}."
        for name, wanted, found in zip(names, asked, made, strict=True)
        if wanted != found
    ]
    for notice in notices:
        log.warning(notice)
    return made, notices


RULES = {
    "width": f"Wan needs a multiple of {SIZE_STEP}",
    "height": f"Wan needs a multiple of {SIZE_STEP}",
    "frames": f"Wan makes {FRAMES_STEP}n + 1 frames",
}
