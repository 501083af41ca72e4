"""Clips longer than a model makes at once: each goes on from the latents of the one before."""

from typing import Any

from comfy_api.latest import io

from ..core.conditioning import ComfyConditioning
from ..wan.clips import continued, is_seam, joined, overlap_of, starting_with
from ..wan.family import LATENT_FORMAT
from .types import CATEGORY, clip_of, found_by, prompt_outputs, tell

FRAMES_STEP = LATENT_FORMAT.temporal_factor
OVERLAP = "wanqwen_overlap"  # in a LATENT: how many of its first latent frames are another clip's last ones


class ContinueClip(io.ComfyNode):
    """Where a clip ended, as the start of the next."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenWanContinueClip",
            display_name="Wan Continue Clip",
            **found_by("extend video", "long video", "continue video"),
            category=CATEGORY,
            description="Starts a clip from the last latents of the one before, so that nothing flashes or drifts in "
            "colour where they meet. Sample it, then join both with Wan Join Clips. The prompts of the first clip will "
            "do, with their picture if the model is an I2V one; a new prompt says what happens next.",
            inputs=[
                io.Conditioning.Input(
                    "positive",
                    tooltip="What happens next. For I2V models from Wan Image to Video, with the same size and frames "
                    "as here: that of the first clip, or a new one.",
                ),
                io.Latent.Input("latent", tooltip="The clip before: from the sampler, or from Wan Join Clips."),
                io.Int.Input(
                    "frames",
                    default=81,
                    min=5,
                    max=4097,
                    step=FRAMES_STEP,
                    tooltip="Length of the new clip with the overlap: 4n + 1 frames.",
                ),
                io.Int.Input(
                    "overlap",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="How many latent frames of the clip before the new one sees, 4 frames each. More carry its "
                    "motion on better and leave fewer new frames. I2V models: 1; T2V models: 2 to 4.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="As positive, if there is guidance."),
            ],
            outputs=[
                *prompt_outputs(),
                io.Latent.Output(
                    display_name="latent", tooltip="For the sampler's latent input. Take another seed for each clip."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        positive: ComfyConditioning,
        latent: dict[str, Any],
        frames: int,
        overlap: int,
        negative: ComfyConditioning | None = None,
    ) -> io.NodeOutput:
        before, latent_frames = clip_of(latent), (frames - 1) // FRAMES_STEP + 1
        samples, mask = continued(before, latent_frames, overlap)
        start = samples[:, :, :overlap]
        prompts = [None if each is None else starting_with(each, start, latent_frames) for each in (positive, negative)]
        added, had = (latent_frames - overlap) * FRAMES_STEP, LATENT_FORMAT.pixel_frames(before.shape[2])
        made = f"{added} frames after {had}: {had + added} when joined"
        going_on = {"samples": samples, "noise_mask": mask, OVERLAP: overlap}
        return io.NodeOutput(*prompts, going_on, ui=tell(cls.hidden.unique_id, [made]))


class JoinClips(io.ComfyNode):
    """A clip and its continuation as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenWanJoinClips",
            display_name="Wan Join Clips",
            **found_by("concatenate videos", "join videos", "long video"),
            category=CATEGORY,
            description="Joins a clip with the one that continues it, as latents. Decode the whole, so that the VAE "
            "passes the join as any other frame; its memory does not grow with the length.",
            inputs=[
                io.Latent.Input("before", tooltip="The clip that was given to Wan Continue Clip."),
                io.Latent.Input("after", tooltip="What the sampler made of the latent of Wan Continue Clip."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The whole: for VAE Decode or Wan Continue Clip.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, before: dict[str, Any], after: dict[str, Any]) -> io.NodeOutput:
        clips = clip_of(before), clip_of(after)
        overlap = after.get(OVERLAP) or overlap_of(*clips)  # a latent that was saved and loaded does not say
        if not overlap:
            raise ValueError(
                "after does not continue another clip: connect what the sampler made of Wan Continue Clip's latent, "
                "and to before the clip that this node was given."
            )
        samples = joined(*clips, overlap)
        lines = [f"{LATENT_FORMAT.pixel_frames(samples.shape[2])} frames"]
        if not is_seam(*clips, overlap):
            lines.append(
                "after does not begin as before ends, so the video will jump: is before the clip that Wan Continue "
                "Clip was given, unchanged?"
            )
        return io.NodeOutput({"samples": samples}, ui=tell(cls.hidden.unique_id, lines))
