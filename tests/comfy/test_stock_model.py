"""Our models under ComfyUI's own samplers on its server, from pictures and with controls as well."""

import pytest
import torch
from safetensors.torch import load_file

from .convert import DECODE, MODEL, SAMPLER, SAVE, SIZE, VAE, VIDEO, of_type
from .test_pictures import OURS, from_picture  # noqa: F401 a fixture
from .test_qwen_image import tiny as qwen  # noqa: F401 a fixture
from .test_vace import SQUARE, guided  # noqa: F401 a fixture

STOCK, LEVELS, NOISE, SOLVER, GUIDER, RUN, KEEP, KEEP_STOCK, CUT = map(str, range(50, 59))
ROUNDING = 1e-4  # of the latents' spread


def beside(prompt: dict, sampler: str = SAMPLER) -> dict:
    """Return the prompt with a stock sampler beside ours, at the same noise levels, and both latents kept."""
    ours = prompt[sampler]["inputs"]
    ours |= {"sigmas": [LEVELS, 0], "solver": "euler", "guidance": 3.0, "seed": 11}
    prompts = {name: ours[name] for name in ("positive", "negative")}
    nodes = {
        STOCK: ("WanQwenComfyModel", {"model": ours["model"], "shift": 3.0}),
        LEVELS: ("BasicScheduler", {"model": [STOCK, 0], "scheduler": "simple", "steps": 3, "denoise": 1.0}),
        NOISE: ("RandomNoise", {"noise_seed": 11}),
        SOLVER: ("KSamplerSelect", {"sampler_name": "euler"}),
        GUIDER: ("CFGGuider", {"model": [STOCK, 0], "cfg": 3.0} | prompts),
        RUN: (
            "SamplerCustomAdvanced",
            {
                "noise": [NOISE, 0], "guider": [GUIDER, 0], "sampler": [SOLVER, 0], "sigmas": [LEVELS, 0],
                "latent_image": ours["latent"],
            },
        ),
        KEEP: ("SaveLatent", {"samples": [sampler, 0], "filename_prefix": "ours"}),
        KEEP_STOCK: ("SaveLatent", {"samples": [RUN, 0], "filename_prefix": "stock"}),
    }  # fmt: skip
    kept = {node: content for node, content in prompt.items() if content["class_type"] not in ENDS}
    return kept | {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in nodes.items()}


ENDS = ("SaveVideo", "SaveImage", "SaveLatent", "CreateVideo", "PreviewImage")


def both(server, prompt: dict) -> list[torch.Tensor]:
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
    return [load_file(server.files(job, node)[0])["latent_tensor"] for node in (KEEP, KEEP_STOCK)]


def assert_near(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.shape == other.shape and (one - other).abs().max() < ROUNDING * one.std()


def test_text_to_video(server, tiny):
    assert_near(*both(server, beside(tiny)))


def test_image_to_video(server, from_picture):  # noqa: F811
    assert_near(*both(server, beside(from_picture("example.png", OURS))))


def test_controls_of_vace_with_a_reference_frame_to_trim(server, guided):  # noqa: F811
    prompt = beside(guided("WanQwenWanVACE", frames=5, reference_images=[SQUARE, 0]))
    prompt[CUT] = {
        "class_type": "TrimVideoLatent",
        "inputs": {"samples": [RUN, 0], "trim_amount": [prompt[SAMPLER]["inputs"]["latent"][0], 3]},
    }
    prompt[KEEP_STOCK]["inputs"]["samples"] = [CUT, 0]
    assert_near(*both(server, prompt))


def test_an_edit_of_a_picture(server, qwen):  # noqa: F811
    prompt = qwen("qwen_image_edit")
    [sampler] = of_type(prompt, "WanQwenSampler")
    assert_near(*both(server, beside(prompt, sampler)))


def test_a_ksampler_with_its_previews_into_our_decode(server, tiny):
    """Progress and pictures are ComfyUI's own; what follows takes its latent as it takes ours."""
    tiny[STOCK] = {"class_type": "WanQwenComfyModel", "inputs": {"model": [MODEL, 0], "shift": 0.0}}
    ours = tiny.pop(SAMPLER)["inputs"]
    inputs = {"model": [STOCK, 0], "seed": 3, "steps": 3, "cfg": 4.0, "sampler_name": "uni_pc", "scheduler": "simple"}
    inputs |= {"positive": ours["positive"], "negative": ours["negative"], "latent_image": [SIZE, 0], "denoise": 1.0}
    tiny[RUN] = {"class_type": "KSampler", "inputs": inputs}
    tiny[DECODE]["inputs"]["latent"] = [RUN, 0]
    tiny["60"] = {"class_type": "VAEDecode", "inputs": {"samples": [RUN, 0], "vae": [VAE, 0]}}
    tiny["61"] = {"class_type": "SaveImage", "inputs": {"images": ["60", 0], "filename_prefix": "stock"}}
    job = server.run(tiny)
    assert job.end == "execution_success", job.error
    assert [data["value"] for data in job.of("progress") if data["node"] == RUN] == [1, 2, 3]
    assert len(server.files(job, "61")) == 5 and len(server.files(job, SAVE)) == 1 and VIDEO in job.executed


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        ("LoraLoaderModelOnly", {"lora_name": "style.safetensors", "strength_model": 1.0}, "LoRA (WanQwen)"),
        ("ModelSave", {"filename_prefix": "copy"}, "can't be saved"),
    ],
)
def test_nodes_that_need_its_weights_are_refused(server, tiny, node, inputs, message):
    tiny = beside(tiny)
    tiny["60"] = {"class_type": node, "inputs": inputs | {"model": [STOCK, 0]}}
    if node == "ModelSave":
        tiny = {name: tiny[name] for name in (MODEL, STOCK, "60")}
    else:
        tiny[GUIDER]["inputs"]["model"] = ["60", 0]
    job = server.run(tiny)
    assert job.end == "execution_error" and message in job.error
