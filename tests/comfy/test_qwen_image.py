"""Qwen-Image in a real ComfyUI: its workflows to a saved picture, stock nodes among ours, input that does not fit."""

from pathlib import Path

import pytest
import torch

from .conftest import painted_picture
from .convert import of_type, read_workflow, to_prompt

LOADER, ENCODER, VAE = "WanQwenLoadQwenImageModel", "WanQwenLoadQwenImageTextEncoder", "WanQwenLoadWanVAE"
EDIT, SAMPLER, DECODE = "WanQwenQwenImageEditEncode", "WanQwenSampler", "WanQwenVAEDecode"
TEXT, EMPTY, INPAINT = "WanQwenQwenImageTextEncode", "WanQwenEmptyQwenImageLatent", "WanQwenInpaintLatent"
LORA = "WanQwenLoRA"


def tiny_model(file: str) -> str:
    """Return the random model that stands for a published one."""
    variant = next((v for v in ("edit-2511", "edit-2509", "edit") if v.replace("-", "_") in file), "t2i")
    return f"qwen_{variant}.safetensors"


@pytest.fixture
def tiny(object_info):
    """One of our workflows with random checkpoints and few steps, small where its nodes can say so."""

    def read(name: str) -> dict:
        prompt = to_prompt(read_workflow(name), object_info)
        for node in prompt.values():
            inputs, kind = node["inputs"], node["class_type"]
            if kind in (ENCODER, VAE):
                inputs["file"] = "qwen.safetensors"
            elif kind == LOADER:
                inputs["file"] = tiny_model(inputs["file"])
            elif kind == SAMPLER:
                inputs["steps"] = 2
            elif kind == EMPTY:
                inputs |= {"aspect_ratio": "custom", "width": 48, "height": 32}
            elif kind == EDIT:
                inputs["size"] = "pixel_aligned"
        for lora in of_type(prompt, LORA):  # there is none for the random model
            before = prompt.pop(lora)["inputs"]["model"]
            prompt[only(prompt, SAMPLER)]["inputs"]["model"] = before
        return prompt

    return read


def only(prompt: dict, kind: str) -> str:
    [node] = of_type(prompt, kind)
    return node


def saved(server, prompt: dict):
    """Run a prompt with one Save Image, and return its job and its picture as numbers [H, W, 3]."""
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
    [file] = server.files(job, only(prompt, "SaveImage"))
    return job, pixels(file)


def pixels(file: Path) -> torch.Tensor:
    import numpy
    from PIL import Image

    with Image.open(file) as image:
        return torch.from_numpy(numpy.array(image))


def shown(server, job, prompt: dict, kind: str) -> list[str]:
    """Return what a node told its user."""
    return server.outputs(job)[only(prompt, kind)]["text"]


@pytest.mark.parametrize(
    ("name", "steps", "size"),
    [
        ("qwen_image_text_to_image", 2, (32, 48, 3)),
        ("qwen_image_edit", 2, (44, 56, 3)),
        ("qwen_image_text_to_image_4_steps", 4, (32, 48, 3)),
        ("demo_text_to_image", 2, (32, 48, 3)),
    ],
)
def test_workflow_makes_a_picture(server, tiny, name, steps, size):
    prompt = tiny(name)
    job, picture = saved(server, prompt)
    assert tuple(picture.shape) == size and picture.float().std() > 1
    assert {message["max"] for message in job.of("progress") if message["node"] == only(prompt, SAMPLER)} == {steps}


def test_workflow_of_two_pictures(server, tiny):
    """The second one is a reference of a million pixels, so one step without guidance will do."""
    prompt = tiny("qwen_image_edit_multiple")
    prompt[only(prompt, SAMPLER)]["inputs"] |= {"steps": 1, "guidance": 1.0}
    job, picture = saved(server, prompt)
    assert tuple(picture.shape) == (44, 56, 3)
    assert shown(server, job, prompt, EDIT) == ["2 picture(s), result 64 x 48"]
    assert shown(server, job, prompt, LOADER)[0].startswith("Qwen-Image-Edit-2509, by ")


def test_inpainting_keeps_every_pixel_outside_the_mask(server, tiny):
    prompt = tiny("qwen_image_inpaint")
    job, picture = saved(server, prompt)
    painted = torch.frombuffer(bytearray(painted_picture().tobytes()), dtype=torch.uint8).view(44, 56, 4)
    kept = painted[..., 3] == 255
    assert torch.equal(picture[kept], painted[..., :3][kept])
    assert (picture != painted[..., :3]).any(-1)[~kept].float().mean() > 0.5
    assert shown(server, job, prompt, INPAINT) == ["56 x 44, 16% of it made anew"]


def test_edit_demo_with_random_models(server, tiny):
    prompt = tiny("demo_edit")
    job, picture = saved(server, prompt)
    assert tuple(picture.shape) == (32, 48, 3)
    assert len(of_type(prompt, SAMPLER)) == 2 and set(of_type(prompt, SAMPLER)) <= job.executed


@pytest.mark.parametrize("name", ["demo_text_to_image", "demo_edit"])
def test_demo_workflow_makes_a_picture(server, object_info, name):
    _, picture = saved(server, to_prompt(read_workflow(name), object_info))
    assert tuple(picture.shape) == (112, 112, 3) and picture.float().std() > 10


# Stock nodes among ours


def test_stock_vae_decode_after_our_sampler_gives_the_same_picture(server, tiny):
    prompt = tiny("qwen_image_text_to_image")
    _, ours = saved(server, prompt)
    decode = prompt[only(prompt, DECODE)]
    decode["class_type"] = "VAEDecode"
    decode["inputs"] = {"samples": decode["inputs"]["latent"], "vae": decode["inputs"]["vae"]}
    _, stock = saved(server, prompt)
    assert torch.equal(ours, stock)


def test_stock_vae_encode_and_reference_latent_give_a_picture_to_edit(server, tiny):
    """The picture of 56 x 44 is no whole number of tokens, which these nodes don't see to."""
    prompt = tiny("qwen_image_text_to_image")
    prompt[only(prompt, LOADER)]["inputs"]["file"] = "qwen_edit.safetensors"
    job, without = saved(server, prompt)
    assert "it runs from text alone" in shown(server, job, prompt, SAMPLER)[0]
    vae, sampler = prompt[only(prompt, DECODE)]["inputs"]["vae"], prompt[only(prompt, SAMPLER)]["inputs"]
    prompt["30"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    prompt["31"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["30", 0], "vae": vae}}
    for node, which in (("32", "positive"), ("33", "negative")):
        prompt[node] = {
            "class_type": "ReferenceLatent",
            "inputs": {"conditioning": sampler[which], "latent": ["31", 0]},
        }
        sampler[which] = [node, 0]
    job, edited = saved(server, prompt)
    first, *_ = shown(server, job, prompt, SAMPLER)
    assert first.startswith("qwen_edit.safetensors: "), "nothing to warn of"
    assert edited.shape == without.shape and not torch.equal(edited, without)


def test_stock_latent_noise_mask_keeps_the_rest(server, tiny):
    """The whole picture is kept by a mask of nothing, and none of it by a mask of everything."""
    prompt = tiny("qwen_image_inpaint")
    given = prompt.pop(only(prompt, INPAINT))["inputs"]
    size = {"width": 48, "height": 32}
    scaling = {"image": given["image"], "upscale_method": "nearest-exact", "crop": "disabled"}
    prompt["30"] = {"class_type": "ImageScale", "inputs": scaling | size}
    prompt["31"] = {"class_type": "WanQwenVAEEncode", "inputs": {"images": ["30", 0], "vae": given["vae"]}}
    prompt["32"] = {"class_type": "SolidMask", "inputs": {"value": 0.0} | size}
    prompt["33"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["31", 0], "mask": ["32", 0]}}
    prompt[only(prompt, SAMPLER)]["inputs"]["latent"] = ["33", 0]
    _, kept = saved(server, prompt)
    prompt["32"]["inputs"]["value"] = 1.0
    _, remade = saved(server, prompt)
    prompt[only(prompt, DECODE)]["inputs"]["latent"] = ["31", 0]
    _, source = saved(server, prompt)
    assert torch.equal(kept, source)
    assert not torch.equal(remade, source)  # by little: what a random VAE makes of any latent is grey


# Input that does not fit


def refused(server, prompt: dict) -> str:
    job = server.run(prompt)
    assert job.end == "execution_error", job.messages[-1]
    return job.error


def test_an_edit_with_a_text_to_image_file_is_refused_and_the_next_run_works(server, tiny):
    prompt = tiny("qwen_image_edit")
    prompt[only(prompt, LOADER)]["inputs"]["file"] = "qwen_t2i.safetensors"
    prompt[only(prompt, SAMPLER)]["inputs"]["seed"] = 1
    error = refused(server, prompt)
    assert error.startswith(
        f"{EDIT}: This model is Qwen-Image, which makes pictures from text alone: load a Qwen-Image-E"
    )
    prompt[only(prompt, LOADER)]["inputs"]["variant"] = "edit"
    saved(server, prompt)


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        (LOADER, "tiny.safetensors", "tiny.safetensors belongs to wan21"),
        (LOADER, "a_vae.safetensors", "a_vae.safetensors is a VAE"),
        (ENCODER, "tiny.safetensors", "tiny.safetensors belongs to wan21"),
    ],
)
def test_a_file_of_another_kind_is_refused(server, tiny, kind, file, message):
    prompt = tiny("qwen_image_text_to_image")
    prompt[only(prompt, kind)]["inputs"]["file"] = file
    assert message in refused(server, prompt)


def test_a_wan_text_encoder_does_not_plug_into_our_qwen_nodes(server, tiny):
    prompt = tiny("qwen_image_text_to_image")
    encoder = only(prompt, ENCODER)
    prompt[encoder]["class_type"], prompt[encoder]["inputs"]["file"] = "WanQwenLoadWanTextEncoder", "tiny.safetensors"
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400 and answer["node_errors"][only(prompt, TEXT)]["errors"][0]["type"] == "return_type_mismatch"


def test_float16_is_not_offered(object_info):
    kind, options = object_info[LOADER]["input"]["required"]["precision"]
    assert (options["options"] if kind == "COMBO" else kind) == ["auto", "bf16", "fp32"]


def test_without_a_negative_the_node_says_that_guidance_is_off(server, tiny):
    prompt = tiny("qwen_image_text_to_image")
    del prompt[only(prompt, SAMPLER)]["inputs"]["negative"]
    job, _ = saved(server, prompt)
    assert shown(server, job, prompt, SAMPLER)[0].startswith("guidance 4 has no effect without a negative prompt")


def test_alpha_is_dropped_aloud(server, tiny):
    prompt = tiny("qwen_image_edit")
    edit = only(prompt, EDIT)
    load, _ = prompt[edit]["inputs"]["image_1"]
    prompt["30"] = {"class_type": "JoinImageWithAlpha", "inputs": {"image": [load, 0], "alpha": [load, 1]}}
    prompt[edit]["inputs"]["image_1"] = ["30", 0]
    job, picture = saved(server, prompt)
    assert picture.shape[-1] == 3 and any("alpha" in line for line in shown(server, job, prompt, EDIT))


def test_what_was_sampled_outlives_an_error_of_decoding(server, tiny):
    prompt = tiny("qwen_image_edit")
    sampler, decode = only(prompt, SAMPLER), only(prompt, DECODE)
    prompt[sampler]["inputs"]["seed"] = 2
    prompt["30"] = {"class_type": "LatentUpscaleBy", "inputs": {
        "samples": [sampler, 0], "upscale_method": "nearest-exact", "scale_by": 2.0}}  # fmt: skip
    prompt[decode]["inputs"]["latent"] = ["30", 0]
    assert "was it resized on the way?" in refused(server, prompt)
    prompt[decode]["inputs"]["latent"] = [sampler, 0]
    job, picture = saved(server, prompt)
    assert tuple(picture.shape) == (44, 56, 3) and sampler not in job.executed
