"""Our models for ComfyUI's own samplers."""

from typing import Any

from comfy_api.latest import io

from ..core.types import ModelHandle
from ..qwen_image.files import NAME as QWEN_IMAGE
from ..wan.files import NAME as WAN
from .types import CATEGORY, WanModel, clip_of, found_by, tell

PUBLISHED = 0.0
USUAL_SIZES = {WAN: (81, 480, 832), QWEN_IMAGE: (1, 1328, 1328)}  # frames, height and width in pixels


class ComfyModel(io.ComfyNode):
    """A model of ours as ComfyUI's MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenComfyModel",
            display_name="Model for ComfyUI's Samplers (WanQwen)",
            **found_by("ksampler", "model", "custom sampler", "scheduler", "guider"),
            category=CATEGORY,
            description="Makes a MODEL of a model of this pack, for KSampler, SamplerCustomAdvanced and any scheduler, "
            "guider and sampler. Its blocks stream as for our own Sampler, and LoRAs put on before go with it. Nodes "
            "that change a model's inside (ComfyUI's LoRA loaders, attention patches, ControlNet) are refused.",
            inputs=[
                WanModel.Input("model", tooltip="From a Load Model node, LoRA or Block Swap of this pack."),
                io.Float.Input(
                    "shift", default=PUBLISHED, min=PUBLISHED, max=100.0, step=0.1,
                    tooltip="More shift spends more of the steps on layout and motion, less on detail. 0: as the model "
                    "was published, for the size of latent. ModelSamplingSD3 after this node changes it too.",
                ),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="What will be sampled: its size decides about shift 0. Without it, 832 x 480 for Wan and "
                    "1328 x 1328 for Qwen-Image.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For ComfyUI's own samplers and schedulers.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: ModelHandle, shift: float, latent: dict[str, Any] | None = None) -> io.NodeOutput:
        from .stock_model import stock_model  # needs all of ComfyUI, which only runs have

        latent_format = model.family.latent_format
        shape = latent_format.shape(1, *USUAL_SIZES[model.family.name])
        if latent is not None:
            shape = tuple(clip_of(latent).shape)
        if shift == PUBLISHED:
            shift = model.family.schedule(model.identity.config, shape).shift
        return io.NodeOutput(stock_model(model, shift), ui=tell(cls.hidden.unique_id, [f"shift {shift:.4g}"]))
