"""Copy golden files into tests/fixtures/goldens, without the cases of models that this pack does not have yet.

`python tests/goldens/make_fixtures.py FOLDER`, where FOLDER holds the reference goldens.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "goldens"
WHOLE = (
    "wan_dit_t2v_tiny",
    "wan_vae_tiny",
    "umt5_encoder_tiny",
    "schedulers",
    "qwen_image_mmdit_tiny",
    "qwen_image_vae_tiny",
    "qwen_cfg_loop_tiny",
)
# File -> its cases to keep, and the file that holds their weights. The loop's case i2v needs the I2V model.
PARTLY = {"wan_cfg_loop_tiny": (("t2v",), "wan_dit_t2v_tiny.safetensors")}


def main(source: Path) -> None:
    """Write all fixtures; existing ones are replaced."""
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name in WHOLE:
        shutil.copyfile(source / f"{name}.safetensors", FIXTURES / f"{name}.safetensors")
    for name, (cases, weights_file) in PARTLY.items():
        copy_cases(source / f"{name}.safetensors", FIXTURES / f"{name}.safetensors", cases, weights_file)


def copy_cases(source: Path, target: Path, cases: tuple[str, ...], weights_file: str) -> None:
    """Write a golden file with some of its cases only, its metadata fitted to them."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        kept = {key: file.get_tensor(key) for key in file.keys() if key.split("/")[1] in cases}  # noqa: SIM118
    metadata["cases"] = json.dumps({case: json.loads(metadata["cases"])[case] for case in cases})
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"weights_file": weights_file})
    save_file(kept, target, metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
