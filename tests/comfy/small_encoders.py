"""A custom node pack of the tests alone, put beside ours: ComfyUI's own code builds text encoders of small sizes.

ComfyUI reads the size of its UMT5 and Qwen2.5-VL from no file. Here a file's metadata `sizes` tells them, and all else
(CLIPLoader, tokenizers, templates, masks, the networks' code) stays as it is. Further nodes show what was made.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.sd
import folder_paths
import torch
from comfy.text_encoders import llama, qwen_vl
from safetensors import safe_open
from safetensors.torch import save_file

load_full_size = comfy.sd.load_clip


def load_clip(ckpt_paths: list[str], *args: Any, model_options: dict[str, Any], **kwargs: Any) -> Any:
    """Load a text encoder, with the sizes that its file tells if it tells any."""
    sizes = None
    if ckpt_paths[0].endswith(".safetensors"):
        with safe_open(ckpt_paths[0], "pt") as file:
            sizes = json.loads((file.metadata() or {}).get("sizes", "null"))
    if sizes is None:
        return load_full_size(ckpt_paths, *args, model_options=model_options, **kwargs)
    detected = comfy.sd.TEModel[sizes["detected"]]  # it would be by the full size
    options = {f"{sizes['name']}_model_config": sizes["model"], "dtype": torch.float32}
    with ExitStack() as patched:
        patched.enter_context(patch.object(comfy.sd, "detect_te_model", lambda state: detected))
        if "vision" in sizes:
            patched.enter_context(patch.object(llama, "Qwen25_7BVLI_Config", _config(sizes["head"])))
            patched.enter_context(patch.object(qwen_vl, "Qwen2VLVisionTransformer", _tower(**sizes["vision"])))
        return load_full_size(ckpt_paths, *args, model_options=model_options | options, **kwargs)


comfy.sd.load_clip = load_clip


def _config(head: dict[str, Any]) -> type:
    """Return Qwen2.5-VL's config with heads of another width, which is no field of it."""
    return type("Small", (llama.Qwen25_7BVLI_Config,), head)


def _tower(full_attention: list[int], **sizes: int) -> type:
    """Return the vision tower with sizes that its caller does not give it."""
    original = qwen_vl.Qwen2VLVisionTransformer

    class Small(original):
        def __init__(self, **given: Any):
            super().__init__(**given | sizes)
            self.fullatt_block_indexes = full_attention

    return Small


class KeepRows:
    """Write a prompt's rows, and its attention mask if it has one, to a file in the output folder."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "tests", "keep", True, ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")  # differs from itself: never taken from ComfyUI's cache

    def keep(self, conditioning: list, name: str) -> dict[str, Any]:
        [[rows, options]] = conditioning
        mask = options.get("attention_mask")
        kept = {"rows": rows} if mask is None else {"rows": rows, "attention_mask": mask}
        save_file(
            {key: tensor.contiguous() for key, tensor in kept.items()},
            Path(folder_paths.get_output_directory()) / f"{name}.safetensors",
        )
        return {}


class TokenizerOption:
    """Set an option of a CLIP's tokenizer, as other packs do for theirs."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "change", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip": ("CLIP",), "name": ("STRING", {}), "value": ("INT", {"default": 0})}}

    def change(self, clip: Any, name: str, value: int) -> tuple[Any]:
        clip = clip.clone()
        clip.set_tokenizer_option(name, value)
        return (clip,)


NODE_CLASS_MAPPINGS = {"TestKeepRows": KeepRows, "TestTokenizerOption": TokenizerOption}
