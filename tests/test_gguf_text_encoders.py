"""Text encoders in GGUF, under llama.cpp's names, give the rows of the weights that their blocks mean."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from wanqwen.core.weights.keymap import Renamer
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.families import identify
from wanqwen.loading import load_text_encoder
from wanqwen.qwen_image.keymap import LANGUAGE_MODEL_GGUF
from wanqwen.qwen_image.tokenizer import EMBEDDED_NAME as FAST
from wanqwen.wan.keymap import TEXT_ENCODER_GGUF
from wanqwen.wan.tokenizer import EMBEDDED_NAME as SPIECE

from .gguf_files import meaning, quantised, write
from .nodes import tiny

KINDS = ("Q8_0", "Q5_1", "Q4_0")
# How a miniature is written, the name of its tokenizer inside and as a file, llama.cpp's names.
ENCODERS = {
    "umt5": (tiny.write_text_encoder, SPIECE, "spiece.model", TEXT_ENCODER_GGUF),
    "qwen": (tiny.write_qwen_text_encoder, FAST, "tokenizer.json", LANGUAGE_MODEL_GGUF),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ENCODERS)
def test_rows_are_those_of_what_the_blocks_mean(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("sentencepiece")
    make, embedded, file, table = ENCODERS[kind]
    original = make(tmp_path / "original.safetensors")
    tokenizer = tmp_path / file
    tokenizer.write_bytes(load_file(original)[embedded].numpy().tobytes())
    found = open_checkpoint(original)
    own, tensors, rename = found.metadata.get("wanqwen", "{}"), load_file(original), Renamer(table)
    packed, meant = {}, {}
    for official, name in identify(found).names.items():
        if (theirs := rename(official)) is not None:  # the tower is no part of these files
            tensor = tensors[name].float()
            is_matrix = tensor.dim() == 2 and tensor.shape[1] % 32 == 0
            packed[theirs] = quantised(tensor, KINDS[sum(map(ord, theirs)) % len(KINDS)]) if is_matrix else tensor
            # Wider than needed, so that it is converted: mapped memory rounds otherwise where it begins elsewhere.
            meant[name] = (meaning(packed[theirs]) if is_matrix else tensor).double()
    assert len({tensor[0] for tensor in packed.values() if isinstance(tensor, tuple)}) > 1
    facts = {"wanqwen": own} if json.loads(own) else {}
    save_file(meant, tmp_path / "meant.safetensors", facts)
    paths = write(tmp_path / "packed.gguf", packed, facts), tmp_path / "meant.safetensors"
    ours, plain = (load_text_encoder(path, dtype=dtype, device="cpu", tokenizer=tokenizer) for path in paths)
    assert ours.identity.spelling == "llama.cpp" and not ours.identity.missing
    prompts = ["a red star moving left", ""]
    for one, other in zip(ours.encode(prompts), plain.encode(prompts), strict=True):
        assert torch.equal(one.text, other.text) and one.text.std() > 0.01
