"""What a file is can be said before PyTorch is there: `inspect` never imports it, and so takes no second."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wanqwen.core.types import TensorInfo
from wanqwen.core.weights.lora import is_lora
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.families import identify
from wanqwen.inspection import describe, describe_lora
from wanqwen.tests import gguf_files
from wanqwen.tests.dfloat11_files import write_published
from wanqwen.tests.manifests import manifest, write_sparse

MANIFESTS = (
    *("wan21_official_t2v_1.3B", "wan21_official_vace_14B", "wan21_comfy_umt5_xxl_fp8_e4m3fn_scaled"),
    *("wan21_comfy_clip_vision_h", "wan21_diffusers_vae", "wan21_kijai_i2v_14B_fp8_e4m3fn_scaled_KJ"),
    *("qwen_comfy_edit_2511_fp8mixed", "qwen_comfy_qwen_2.5_vl_7b_bf16"),
    *("lora_wan_lightx2v_i2v_14B_480p_rank64_bf16", "lora_qwen_lightning_bf16"),
)
PROGRAM = """
import sys
sys.modules.update(torch=None, numpy=None, safetensors=None)
from wanqwen.__main__ import main
for path in sys.argv[1:]:
    assert main(["inspect", path, "--json"]) == 0
    print("---")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    found = [write_sparse(folder / f"{name}.safetensors", name) for name in MANIFESTS]
    vae, t2v = (manifest(f"wan21_official_{name}")["tensors"] for name in ("vae", "t2v_1.3B"))
    torch.save({name: torch.zeros(1).expand(shape) for name, (_, shape) in vae.items()}, folder / "vae.pth")
    halves = {name: TensorInfo("F16", tuple(shape)) for name, (_, shape) in t2v.items()}
    df11 = manifest("qwen_df11_transformer")
    [layers] = df11["config_json"]["dfloat11_config"]["pattern_dict"].values()
    (folder / "df11").mkdir()
    found.append(write_published(folder / "df11" / "Qwen-Image-DF11.safetensors", df11["tensors"], layers))
    return [*found, folder / "vae.pth", gguf_files.write_sparse(folder / "wan.gguf", halves)]


def test_files_are_described_without_pytorch_as_with_it(files: list[Path]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(text) for text in done.stdout.split("---\n")[:-1]]
    opened = [open_checkpoint(path) for path in files]
    assert said == [describe_lora(one) if is_lora(one) else describe(one, identify(one)) for one in opened]
    assert {facts["role"] for facts in said} == {"diffusion_model", "vae", "text_encoder", "image_encoder", "lora"}
