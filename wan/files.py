"""What the files of Wan 2.1 diffusion models look like."""

from ..core.types import FamilyFiles, Preset
from . import shapes
from .config import PUBLISHED
from .keymap import DIFFUSION_MODEL_SPELLINGS, PARTS

NAME = "wan21"

# Distillations into few steps, one forward each. All visit even levels before the shift: 1000, 750, 500, 250.
PRESETS = {
    # LightX2V: configs/distill/wan21, and the straight steps of its step_distill scheduler.
    "lightx2v-4": Preset(steps=4, shift=5.0, guidance=1.0, solver="euler", words=("lightx2v",)),
    # Self-Forcing: configs/self_forcing_dmd.yaml; pipeline/bidirectional_inference.py adds fresh noise in every step.
    "self-forcing-4": Preset(steps=4, shift=5.0, guidance=1.0, solver="lcm", words=("self", "forcing")),
    # CausVid: configs/wan_causal_dmd_warp_4step_cfg2.yaml; its inference adds fresh noise too.
    "causvid-4": Preset(steps=4, shift=8.0, guidance=1.0, solver="lcm", words=("causvid",)),
}

FILES = FamilyFiles(
    name=NAME,
    parameters=shapes.transformer,
    spellings=DIFFUSION_MODEL_SPELLINGS,
    variants=PUBLISHED,
    presets=PRESETS,
    parts=PARTS,
)
