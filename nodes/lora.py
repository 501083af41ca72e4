"""LoRAs: small files that change what a model makes."""

from comfy_api.latest import io

from ..core.types import ModelHandle
from ..core.weights.lora import PEFT_CONFIG
from ..loading import with_lora
from .types import CATEGORY, WanModel, check_file, file_stamp, find_file, found_by, list_files, tell, verdict

FOLDER = "loras"
STRONGEST = 10.0


class LoRA(io.ComfyNode):
    """One LoRA on a model; several are several nodes in a row."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenLoRA",
            display_name="LoRA (WanQwen)",
            **found_by("lora loader", "lightning", "lightx2v", "causvid", "distill"),
            category=CATEGORY,
            description="Puts a LoRA on a Wan or Qwen-Image model, whatever tool it comes from and however the model "
            "is stored. The model's own weights are never changed, so that other branches of a workflow do without it. "
            "For several LoRAs put several of these nodes in a row.",
            inputs=_inputs(),
            outputs=[WanModel.Output(display_name="model", tooltip="The same model with this LoRA too, for Sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return verdict(check_file(FOLDER, file))

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str:
        return file_stamp(FOLDER, file, beside=PEFT_CONFIG)

    @classmethod
    def execute(
        cls, model: ModelHandle, file: str, strength: float, start_percent: float = 0.0, end_percent: float = 1.0
    ) -> io.NodeOutput:
        model, lines = with_lora(model, find_file(FOLDER, file), strength, start_percent, end_percent)
        return io.NodeOutput(model, ui=tell(cls.hidden.unique_id, lines))


def _inputs() -> list[io.Input]:
    return [
        WanModel.Input("model", tooltip="From a Load Model node, or from another LoRA node."),
        io.Combo.Input(
            "file", options=list_files(FOLDER),
            tooltip="A LoRA from models/loras: LoRA, LoHa, LoKr or DoRA, in the names of any of the usual tools.",
        ),
        io.Float.Input(
            "strength", default=1.0, min=-STRONGEST, max=STRONGEST, step=0.01,
            tooltip="How much of it: 1 as it was made, 0 nothing, below 0 the opposite.",
        ),
        io.Float.Input(
            "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, optional=True,
            tooltip="From which share of the sampler's steps on it works: 0 from the first, 0.5 from half way.",
        ),
        io.Float.Input(
            "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True,
            tooltip="Up to which share of the steps it works: 1 to the last.",
        ),
    ]  # fmt: skip
