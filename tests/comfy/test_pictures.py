"""Wan from pictures in a real ComfyUI: our nodes and its own mix, and what does not belong together is said."""

import re

import pytest
import torch
from safetensors.torch import load_file

from .convert import DECODE, MODEL, PROMPT, SAMPLER, SIZE, VAE, of_type, read_workflow, to_prompt
from .test_qwen_image import pixels
from .test_workflows import clip_facts

IMAGE, EYE, PICTURE, SAVE = "20", "21", "22", "23"
ENCODE, IMAGE_SIZE, KEEP = "24", "25", "26"


@pytest.fixture
def from_picture(tiny):
    """Return the workflow with a picture in front of the sampler: its file, and a node that takes it."""

    def made(file: str, node: dict) -> dict:
        tiny[MODEL]["inputs"]["file"] = "tiny_i2v.safetensors"
        tiny[IMAGE] = {"class_type": "LoadImage", "inputs": {"image": file}}
        tiny[EYE] = {
            "class_type": "WanQwenLoadWanImageEncoder",
            "inputs": {"file": "tiny.safetensors", "precision": "auto"},
        }
        prompts = {"positive": [PROMPT, 0], "negative": [PROMPT, 1], "vae": [VAE, 0]}
        tiny[PICTURE] = {"class_type": node["class_type"], "inputs": prompts | node["inputs"]}
        tiny[SAMPLER]["inputs"] |= {"positive": [PICTURE, 0], "negative": [PICTURE, 1], "latent": [PICTURE, 2]}
        tiny[SAVE] = {"class_type": "SaveImage", "inputs": {"images": [DECODE, 0], "filename_prefix": "picture"}}
        tiny.pop(SIZE, None)
        return tiny

    return made


CLIP = {"width": 32, "height": 32, "batch_size": 1}
OURS = {
    "class_type": "WanQwenWanImageToVideo",
    "inputs": CLIP | {"image": [IMAGE, 0], "frames": 5, "fit": "cover", "clip_vision": [EYE, 0]},
}
STOCK = {
    "class_type": "WanImageToVideo",
    "inputs": CLIP | {"start_image": [IMAGE, 0], "length": 5, "clip_vision_output": [ENCODE, 0]},
}
CLIP_VISION_ENCODE = {
    "class_type": "CLIPVisionEncode",
    "inputs": {"clip_vision": [EYE, 0], "image": [IMAGE, 0], "crop": "none"},
}


def frames(server, prompt: dict) -> torch.Tensor:
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
    return torch.stack([pixels(file) for file in server.files(job, SAVE)])


def test_a_picture_becomes_a_video_of_the_size_that_fits_it(server, from_picture):
    prompt = from_picture("example.png", OURS)
    prompt[IMAGE_SIZE] = {
        "class_type": "WanQwenWanImageSize",
        "inputs": {"image": [IMAGE, 0], "area": "custom", "megapixels": 0.003},
    }
    prompt[PICTURE]["inputs"] |= {"width": [IMAGE_SIZE, 0], "height": [IMAGE_SIZE, 1]}
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
    assert server.outputs(job)[IMAGE_SIZE]["text"] == ["48 x 48, of a picture of 56 x 44"]
    told = server.outputs(job)[PICTURE]["text"]
    assert told == ["48 x 48, 5 frames, the first one given", "56 x 44 became 48 x 48: 21% of it is cut off."]
    assert torch.stack([pixels(file) for file in server.files(job, SAVE)]).shape == (5, 48, 48, 3)


def latent(server, prompt: dict) -> torch.Tensor:
    prompt[KEEP] = {"class_type": "SaveLatent", "inputs": {"samples": [SAMPLER, 0], "filename_prefix": "picture"}}
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
    [file] = server.files(job, KEEP)
    return load_file(file)["latent_tensor"]


WORKFLOWS = {
    "wan21_image_to_video": ("tiny_i2v.safetensors", (5, 48, 48, 16)),
    "wan21_first_last_frame": ("tiny_flf2v.safetensors", (5, 48, 48, 16)),
    "wan21_video_to_video": ("tiny.safetensors", (5, 48, 64, 16)),
    "wan21_video_to_video_4_steps": ("tiny.safetensors", (5, 48, 64, 16)),
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_from_pictures_run(server, object_info, name):
    """With random checkpoints, few steps and small clips."""
    prompt, (model, made) = to_prompt(read_workflow(name), object_info), WORKFLOWS[name]
    for node in prompt.values():
        inputs, kind = node["inputs"], node["class_type"]
        if kind.startswith("WanQwenLoad"):
            inputs["file"] = model if kind == "WanQwenLoadWanModel" else "tiny.safetensors"
        elif kind == "WanQwenLoRA":
            inputs["file"] = "style.safetensors"
        elif kind == "WanQwenSampler":
            inputs["steps"] = 2
        elif kind == "WanQwenWanImageSize":
            inputs |= {"area": "custom", "megapixels": 0.003}
        elif kind.startswith("WanQwenWan") and "frames" in inputs:
            inputs["frames"] = 5
        if kind == "WanQwenWanVideoToVideo":
            inputs |= {"width": 0, "height": 0}
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
    [save] = of_type(prompt, "SaveVideo")
    [file] = server.files(job, save)
    assert clip_facts(file) == made


def test_our_sampler_takes_comfyui_s_own_image_to_video(server, from_picture):
    """The picture has the clip's size, so neither node changes it."""
    ours = latent(server, from_picture("square.png", OURS))
    stock = from_picture("square.png", STOCK)
    stock[ENCODE] = CLIP_VISION_ENCODE
    assert torch.equal(latent(server, stock), ours)
    assert not torch.equal(latent(server, from_picture("example.png", OURS)), ours)


def test_comfyui_s_video_is_changed_by_our_sampler(server, from_picture):
    prompt = from_picture("example.png", OURS)
    prompt[MODEL]["inputs"]["file"] = "tiny.safetensors"
    prompt[PICTURE] = {
        "class_type": "WanQwenWanVideoToVideo",
        "inputs": {"images": [IMAGE, 0], "vae": [VAE, 0], "width": 0, "height": 0, "frames": 0, "fit": "cover"},
    }
    prompt[SAMPLER]["inputs"] |= {
        "positive": [PROMPT, 0], "negative": [PROMPT, 1], "latent": [PICTURE, 0], "denoise": 0.5,
    }  # fmt: skip
    assert frames(server, prompt).shape == (1, 32, 48, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((MODEL, {"file": "tiny.safetensors"}), "tiny.safetensors: this is Wan 2.1 custom.*choose a file of image"),
        ((PICTURE, {"clip_vision": None}), "tiny_i2v.safetensors: .*connect Load Wan Image Encoder"),
        ((SAMPLER, {"latent": [SIZE, 0]}), "tiny_i2v.safetensors: .*32 x 32 pixels, 5 frames, and the latent is 64"),
    ],
)
def test_what_does_not_belong_together_is_said_and_the_next_run_works(server, from_picture, change, said):
    node, values = change
    size = {"class_type": "WanQwenEmptyWanLatent", "inputs": CLIP | {"width": 64, "frames": 5}}
    prompt = from_picture("example.png", OURS) | {SIZE: size}
    whole = dict(prompt[node]["inputs"])
    prompt[node]["inputs"] = {name: value for name, value in (whole | values).items() if value is not None}
    job = server.run(prompt)
    assert job.end == "execution_error" and re.search(said, job.error), job.messages[-1]
    prompt[node]["inputs"] = whole
    prompt[SAMPLER]["inputs"]["seed"] += 1000
    assert frames(server, prompt).shape == (5, 32, 32, 3)
