"""What the files of Qwen-Image diffusion models look like."""

from ..core.types import FamilyFiles, Preset
from . import shapes
from .config import QwenImageConfig
from .keymap import DIFFUSION_MODEL_SPELLINGS

NAME = "qwen-image"

# Lightning distillations: one forward a step. Source: their example scripts, base_shift = max_shift = ln 3.
PRESETS = {
    "lightning-4": Preset(steps=4, shift=3.0, guidance=1.0, solver="euler", words=("lightning", "4step")),
    "lightning-8": Preset(steps=8, shift=3.0, guidance=1.0, solver="euler", words=("lightning", "8step")),
}

FILES = FamilyFiles(
    name=NAME,
    parameters=shapes.transformer,
    spellings=DIFFUSION_MODEL_SPELLINGS,
    variants={"all but layered": QwenImageConfig(), "layered": QwenImageConfig(layered=True)},
    presets=PRESETS,
)
