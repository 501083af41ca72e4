"""The LoRA node: what it tells, what it refuses, and that it changes nobody else's model."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from wanqwen.core.types import ModelHandle

from .. import loras


@pytest.fixture
def file(nodes, models: Path, model: ModelHandle) -> str:
    written = loras.low_rank(loras.official(model.checkpoint.path), loras.DIALECTS["kohya"])
    return loras.write(models / "loras" / "wan_lightx2v.safetensors", written).name


@pytest.fixture
def latent() -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(1, 16, 1, 4, 4)}


def test_it_tells_what_is_used_and_which_preset_to_take(nodes, model: ModelHandle, file: str) -> None:
    out = nodes.LoRA.execute(model, file, 0.8, 0.25, 0.5)
    [lora] = out.values[0].loras
    assert (lora.strength, lora.start, lora.end) == (0.8, 0.25, 0.5)
    assert out.values[0].weights is model.weights and not model.loras
    used, preset = out.ui["text"]
    assert used.startswith("wan_lightx2v.safetensors: ") and used.endswith("lora_down, lora_up, alpha; rank 3")
    assert preset == (
        "A distilled LoRA: choose preset lightx2v-4 in the Sampler (4 steps of euler, shift 5, guidance 1)."
    )


def test_nodes_in_a_row_add_up(nodes, model: ModelHandle, file: str) -> None:
    twice = nodes.LoRA.execute(nodes.LoRA.execute(model, file, 0.8).values[0], file, -0.3).values[0]
    assert [lora.strength for lora in twice.loras] == [0.8, -0.3]


def test_the_report_is_what_the_node_shows(
    nodes, model: ModelHandle, file: str, prompts, latent, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = nodes.LoRA.execute(model, file, 0.5, 0.5, 1.0).values[0]
    shown: list[str] = []
    server = SimpleNamespace(send_progress_text=lambda text, node: shown.append(text))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    out = nodes.Sampler.execute(lora, prompts[0], latent, 3, 2, 3.0, 0.0, "euler", 1.0, prompts[1])
    report = out.values[1]
    assert report == "\n".join(out.ui["text"])
    assert shown[-1] == report
    steps = [text.splitlines()[-1] for text in shown if "s left" in text]
    assert [re.sub(r"[\d.]+ s", "? s", line) for line in steps] == [
        "sampling 1/2, ? s gone, ? s left",
        "sampling 2/2, ? s gone, ? s left",
    ], "while it runs, not in the end"
    what, how, used, spent, *rest = report.splitlines()
    assert what.startswith(
        "tiny.safetensors: wan21 custom, 2 blocks of width 48; weights fp32, computed in float32; attention by PyTorch"
    )
    assert how == "32 x 32; 2 steps of euler, guidance 3; seed 3"
    assert used == f"LoRA {file} at 0.5, from 50% to 100% of the steps: 78 of 78 tensors used"
    assert re.fullmatch(r"\d+\.\d s: opening the model .* s, the first step .* s, the others .* s each", spent)
    assert all(line.startswith("RAM kept for the next run") for line in rest)


def test_branches_of_a_graph_sample_as_if_alone(nodes, model: ModelHandle, file: str, prompts, latent) -> None:
    def sample(handle: ModelHandle, preset: str = "none") -> torch.Tensor:
        out = nodes.Sampler.execute(handle, prompts[0], latent, 0, 2, 3.0, 0.0, "euler", 1.0, prompts[1], preset=preset)
        return out.values[0]["samples"]

    lora = nodes.LoRA.execute(model, file, 1.0).values[0]
    plain, changed = sample(model), sample(lora)
    assert not torch.equal(plain, changed)
    assert torch.equal(sample(model), plain) and torch.equal(sample(lora), changed)
    assert not torch.equal(sample(lora, "lightx2v-4"), changed)


def test_what_cannot_be_is_refused(nodes, model: ModelHandle, models: Path, file: str) -> None:
    assert nodes.LoRA.validate_inputs(file) is True and nodes.LoRA.validate_inputs(None) is True
    assert str(models / "loras") in nodes.LoRA.validate_inputs("gone.safetensors")
    with pytest.raises(ValueError, match=r"start 0\.5 and end 0\.2"):
        nodes.LoRA.execute(model, file, 1.0, 0.5, 0.2)
    qwen = nodes.LoadQwenImageModel.execute("qwen_t2i.safetensors", "auto", "auto").values[0]
    with pytest.raises(ValueError, match=r"wan_lightx2v.* does not fit this model, qwen_t2i.* wan21"):
        nodes.LoRA.execute(qwen, file, 1.0)


def test_a_replaced_file_is_read_again(nodes, models: Path, file: str) -> None:
    before = nodes.LoRA.fingerprint_inputs(file)
    assert before == nodes.LoRA.fingerprint_inputs(file)
    (models / "loras" / "adapter_config.json").write_text('{"lora_alpha": 2}')
    beside = nodes.LoRA.fingerprint_inputs(file)
    assert beside != before
    (models / "loras" / file).write_bytes(b"another")
    assert nodes.LoRA.fingerprint_inputs(file) not in (before, beside)


def test_a_file_replaced_between_node_and_sampler_is_refused(
    nodes, models: Path, model: ModelHandle, file: str, prompts, latent
) -> None:
    changed = nodes.LoRA.execute(model, file, 1.0).values[0]
    path = models / "loras" / file
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"wan_lightx2v\.safetensors has changed since it was opened: run again"):
        nodes.Sampler.execute(changed, prompts[0], latent, 0, 2, 3.0, 0.0, "euler", 1.0, prompts[1])
    path.unlink()
    with pytest.raises(ValueError, match=r"wan_lightx2v\.safetensors can't be read any more"):
        nodes.Sampler.execute(changed, prompts[0], latent, 0, 2, 3.0, 0.0, "euler", 1.0, prompts[1])
