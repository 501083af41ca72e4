"""Copy golden files into tests/fixtures/goldens, without those of models that this pack does not have yet.

`python tests/goldens/make_fixtures.py FOLDER`, where FOLDER holds the reference goldens.
"""

import shutil
import sys
from pathlib import Path

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "goldens"
NAMES = (
    "wan_dit_t2v_tiny",
    "wan_dit_i2v_tiny",
    "wan_dit_flf2v_tiny",
    "wan_cfg_loop_tiny",
    "wan_vae_tiny",
    "umt5_encoder_tiny",
    "clip_visual_tiny",
    "schedulers",
    "qwen_image_mmdit_tiny",
    "qwen_image_vae_tiny",
    "qwen_cfg_loop_tiny",
)


def main(source: Path) -> None:
    """Write all fixtures; existing ones are replaced."""
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shutil.copyfile(source / f"{name}.safetensors", FIXTURES / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
