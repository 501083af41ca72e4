"""Wan VACE in a real ComfyUI: our node and its own mix, and what does not belong together is said."""

import pytest
import torch
from safetensors.torch import load_file

from .convert import MODEL, PROMPT, SAMPLER, SIZE, VAE

IMAGE, SQUARE, VIDEO, MASK, CONTROL, KEEP, TRIM = map(str, range(20, 27))


@pytest.fixture
def guided(tiny):
    """Return the workflow with a still picture of five frames, kept as it is, and a reference image."""

    def made(class_type: str, **inputs: object) -> dict:
        prompt = {node: {**tiny[node], "inputs": dict(tiny[node]["inputs"])} for node in tiny}
        prompt[MODEL]["inputs"]["file"] = "tiny_vace.safetensors"
        prompt[IMAGE] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
        scale = {"image": [IMAGE, 0], "upscale_method": "bilinear", "width": 32, "height": 32, "crop": "disabled"}
        prompt[SQUARE] = {"class_type": "ImageScale", "inputs": scale}
        prompt[VIDEO] = {"class_type": "RepeatImageBatch", "inputs": {"image": [SQUARE, 0], "amount": 5}}
        prompt[MASK] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 32, "height": 32}}
        common = {"positive": [PROMPT, 0], "negative": [PROMPT, 1], "vae": [VAE, 0], "width": 32, "height": 32}
        common |= {"batch_size": 1, "strength": 0.8, "control_video": [VIDEO, 0]}
        prompt[CONTROL] = {"class_type": class_type, "inputs": common | inputs}
        prompt[SAMPLER]["inputs"] |= {"positive": [CONTROL, 0], "negative": [CONTROL, 1], "latent": [CONTROL, 2]}
        for node in (SIZE, "8", "9"):
            prompt.pop(node, None)
        prompt[KEEP] = {"class_type": "SaveLatent", "inputs": {"samples": [SAMPLER, 0], "filename_prefix": "vace"}}
        return prompt

    return made


def latent(server, prompt: dict) -> torch.Tensor:
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
    [file] = server.files(job, KEEP)
    return load_file(file)["latent_tensor"]


def test_our_node_and_its_own_guide_our_sampler_alike(server, guided):
    ours = guided("WanQwenWanVACE", frames=5, mask=[MASK, 0], reference_images=[SQUARE, 0])
    made = latent(server, ours)
    assert made.shape == (1, 16, 2, 4, 4)
    stock = guided("WanVaceToVideo", length=5, control_masks=[MASK, 0], reference_image=[SQUARE, 0])
    # Of one mask and five frames ComfyUI's node takes four masks to be white.
    stock["27"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["28", 0], "amount": 5}}
    stock["28"] = {"class_type": "MaskToImage", "inputs": {"mask": [MASK, 0]}}
    stock["29"] = {"class_type": "ImageToMask", "inputs": {"image": ["27", 0], "channel": "red"}}
    stock[CONTROL]["inputs"]["control_masks"] = ["29", 0]
    stock[TRIM] = {
        "class_type": "TrimVideoLatent",
        "inputs": {"samples": [SAMPLER, 0], "trim_amount": [CONTROL, 3]},
    }
    stock[KEEP]["inputs"]["samples"] = [TRIM, 0]
    found = latent(server, stock)
    assert found.shape == made.shape and (found - made).abs().max() < 1e-3 * made.abs().max()


def test_what_was_made_is_said_on_the_node(server, guided):
    prompt = guided("WanQwenWanVACE", frames=9, mask=[MASK, 0], reference_images=[IMAGE, 0])
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
    assert server.outputs(job)[CONTROL]["text"] == [
        "32 x 32, 9 frames, 1 reference image(s)",
        "control_video has 5 frames: the other 4 are made anew.",
    ]


def test_two_nodes_of_both_kinds_in_a_row(server, guided):
    prompt = guided("WanQwenWanVACE", frames=5)
    first = {"width": 32, "height": 32, "length": 5, "batch_size": 1, "strength": 1.0, "control_video": [VIDEO, 0]}
    prompt["30"] = {
        "class_type": "WanVaceToVideo",
        "inputs": first | {"positive": [PROMPT, 0], "negative": [PROMPT, 1], "vae": [VAE, 0]},
    }
    alone = latent(server, prompt)
    prompt[CONTROL]["inputs"] |= {"positive": ["30", 0], "negative": ["30", 1], "reference_images": [SQUARE, 0]}
    both = latent(server, prompt)
    assert both.shape == alone.shape and not torch.equal(both, alone)


@pytest.mark.parametrize(
    ("file", "with_node", "said"),
    [
        ("tiny.safetensors", True, "tiny.safetensors: Wan 2.1 custom takes no control"),
        ("tiny_vace.safetensors", False, "tiny_vace.safetensors: Wan 2.1 vace-custom takes at least one control"),
    ],
)
def test_a_model_and_a_node_that_do_not_belong_together_are_named(server, guided, file, with_node, said):
    prompt = guided("WanQwenWanVACE", frames=5)
    prompt[MODEL]["inputs"]["file"] = file
    if not with_node:
        prompt[SAMPLER]["inputs"] |= {"positive": [PROMPT, 0], "negative": [PROMPT, 1]}
    job = server.run(prompt)
    assert job.end == "execution_error" and said in str(job.error), job.error


def test_a_clip_with_references_goes_on_and_is_never_cut(server, guided):
    """One of another length than the control's would come out without its first frames, and join short."""
    prompt = guided("WanQwenWanVACE", frames=5, reference_images=[SQUARE, 0])
    going_on = {"positive": [CONTROL, 0], "negative": [CONTROL, 1], "latent": [SAMPLER, 0], "overlap": 1}
    prompt["31"] = {"class_type": "WanQwenWanContinueClip", "inputs": going_on | {"frames": 9}}
    after = {"positive": ["31", 0], "negative": ["31", 1], "latent": ["31", 2], "seed": 3}
    prompt["32"] = {"class_type": "WanQwenSampler", "inputs": prompt[SAMPLER]["inputs"] | after}
    prompt["33"] = {"class_type": "WanQwenWanJoinClips", "inputs": {"before": [SAMPLER, 0], "after": ["32", 0]}}
    prompt[KEEP]["inputs"]["samples"] = ["33", 0]
    job = server.run(prompt)
    assert job.end == "execution_error" and "5 frames after 1 reference frame(s): connect" in job.error, job.messages[
        -1
    ]
    prompt["31"]["inputs"]["frames"] = 5
    job = server.run(prompt)
    assert job.end == "execution_success" and SAMPLER not in job.executed, "what was made is made again"
    assert server.outputs(job)["33"]["text"] == ["9 frames"]
    prompt["33"]["inputs"]["before"] = ["32", 0]
    job = server.run(prompt)
    assert "the video will jump" in server.outputs(job)["33"]["text"][1]


def test_nodes_in_a_row_for_different_clips_are_refused(server, guided):
    """The first is as long with its reference frame as the second is without."""
    prompt = guided("WanQwenWanVACE", frames=9)
    first = {**prompt[CONTROL]["inputs"], "frames": 5, "reference_images": [SQUARE, 0]}
    prompt["30"] = {"class_type": "WanQwenWanVACE", "inputs": first}
    prompt[CONTROL]["inputs"] |= {"positive": ["30", 0], "negative": ["30", 1]}
    job = server.run(prompt)
    assert job.end == "execution_error" and "32 x 32 pixels, 5 frames and 32 x 32 pixels, 9 frames" in job.error
    first["frames"] = 9
    assert latent(server, prompt).shape == (1, 16, 3, 4, 4)
