"""Prompts to conditioning."""

from comfy_api.latest import io

from ..wan.conditioning import to_comfy
from ..wan.config import NEGATIVE_PROMPT, TEXT_LEN
from ..wan.text_encoder import TextEncoder
from ..wan.tokenizer import Tokens
from .types import CATEGORY, WanTextEncoder, prompt_inputs, prompt_outputs, tell


class WanTextEncode(io.ComfyNode):
    """Both prompts of a run in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenWanTextEncode",
            display_name="Wan Text Encode",
            category=CATEGORY,
            description="Encodes what the video should show and what it should not. ComfyUI's own Wan samplers take "
            "the result too.",
            inputs=[
                WanTextEncoder.Input("text_encoder", tooltip="From Load Wan Text Encoder."),
                *prompt_inputs(
                    positive="What the video shows, in English or Chinese: subject, motion, scene, camera, style. At "
                    "most 512 tokens are read.",
                    negative="What to steer away from. The default is the official one of Wan: garish colours, "
                    "overexposure, stills, blur, subtitles, bad anatomy, walking backwards...",
                    default_negative=NEGATIVE_PROMPT,
                ),
            ],
            outputs=prompt_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, text_encoder: TextEncoder, positive: str, negative: str) -> io.NodeOutput:
        texts = {"positive": positive, "negative": negative}
        prompts = text_encoder.encode(list(texts.values()))
        lines = [_size(name, text_encoder.tokenise(text)) for name, text in texts.items()]
        return io.NodeOutput(*(to_comfy([prompt]) for prompt in prompts), ui=tell(cls.hidden.unique_id, lines))


def _size(name: str, tokens: Tokens) -> str:
    return f"{name}: {tokens.notice or f'{len(tokens.ids)} of {TEXT_LEN} tokens'}"
