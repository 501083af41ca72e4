"""Prompts to conditioning."""

from comfy_api.latest import io

from ..wan.conditioning import to_comfy
from ..wan.config import FLF2V_NEGATIVE_PREFIX, I2V_NEGATIVE_PREFIX, NEGATIVE_PROMPT, TEXT_LEN
from ..wan.text_encoder import TextEncoder
from .types import CATEGORY, WanTextEncoder, encode_prompts, found_by, prompt_inputs, prompt_outputs


class WanTextEncode(io.ComfyNode):
    """Both prompts of a run in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenWanTextEncode",
            display_name="Wan Text Encode",
            **found_by("prompt", "positive prompt", "negative prompt", "clip text encode", "wan prompt"),
            category=CATEGORY,
            description="Encodes what the video should show and what it should not. ComfyUI's own Wan samplers take "
            "the result too.",
            inputs=[
                WanTextEncoder.Input("text_encoder", tooltip="From Load Wan Text Encoder."),
                *prompt_inputs(
                    positive="What the video shows, in English or Chinese: subject, motion, scene, camera, style. At "
                    "most 511 tokens are read.",
                    negative="What to steer away from. The default is the official one of Wan: garish colours, "
                    "overexposure, stills, blur, subtitles, bad anatomy, walking backwards... For image to video its "
                    f"authors put {I2V_NEGATIVE_PREFIX} (a shaking camera) before it, for first and last frame "
                    f"{FLF2V_NEGATIVE_PREFIX} (cuts, a shaking camera).",
                    default_negative=NEGATIVE_PROMPT,
                ),
            ],
            outputs=prompt_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, text_encoder: TextEncoder, positive: str, negative: str) -> io.NodeOutput:
        return encode_prompts(cls.hidden.unique_id, text_encoder, positive, negative, to_comfy, TEXT_LEN - 1)
