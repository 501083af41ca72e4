"""Our workflows and nodes in a real ComfyUI: what a user does on a good day."""

import io
import json
import time
from pathlib import Path

import numpy
import pytest
from PIL import Image

from .convert import (
    DECODE,
    MODEL,
    PROMPT,
    SAMPLER,
    SAVE,
    SIZE,
    TEXT_ENCODER,
    TINY,
    VAE,
    VIDEO,
    of_type,
    read_workflow,
    to_prompt,
)

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SNAPSHOT = json.loads((ROOT / "tests" / "fixtures" / "schema_snapshot.json").read_text(encoding="utf-8"))
DEMO = ROOT / "demo" / "checkpoints" / "wan_dit.safetensors"
BLOCKS = 16  # of deep.safetensors, see conftest.py


def test_every_node_is_there_as_the_snapshot_says(server, object_info):
    assert "IMPORT FAILED" not in server.log()
    for node_id, saved in SNAPSHOT.items():
        info = object_info[node_id]
        assert info["display_name"] and info["description"] and info["category"] == "WanQwen"
        for kind in ("required", "optional"):
            listed = [[name, entry[0]] for name, entry in info["input"].get(kind, {}).items()]
            assert listed == saved[kind], (node_id, kind)
            silent = [name for name, entry in info["input"].get(kind, {}).items() if not entry[1].get("tooltip")]
            assert not silent, f"{node_id}: no tooltip on {silent}"
        outputs = [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)]
        assert outputs == saved["outputs"], node_id


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_uses_our_nodes_and_stock_ones_that_exist(path, object_info):
    """Converting fails for a node that the server lacks and for a value too many or too few."""
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), object_info)
    for node in prompt.values():
        info = object_info[node["class_type"]]
        ours = info["python_module"].startswith("custom_nodes.wanqwen")
        assert ours or info["python_module"].split(".")[0] in ("nodes", "comfy_extras"), node["class_type"]
        assert set(node["inputs"]) >= set(info["input"]["required"]), node["class_type"]


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS if not path.stem.startswith("demo")])
def test_workflow_without_its_files_names_them(server, object_info, name):
    prompt = to_prompt(read_workflow(name), object_info)
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    problems = {node: error["errors"][0]["details"] for node, error in answer["node_errors"].items()}
    assert set(problems) == {
        node for node in prompt if prompt[node]["class_type"].startswith("WanQwen") and "file" in prompt[node]["inputs"]
    }
    for node, details in problems.items():
        assert prompt[node]["inputs"]["file"] in details and "was not found: put the file into" in details


@pytest.mark.skipif(
    not DEMO.is_file(), reason="the miniature has not been trained: no demo/checkpoints/wan_dit.safetensors"
)
def test_demo_workflow_makes_a_video(server, demo):
    job = server.run(demo)
    assert job.end == "execution_success", job.error
    [file] = server.files(job, SAVE)
    assert clip_facts(file) == (9, 64, 64, 8)
    progress = [message for message in job.of("progress") if message["node"] == SAMPLER]
    assert [message["value"] for message in progress][-12:] == list(range(1, 13))
    assert {message["max"] for message in progress} == {12}
    pictures = [preview(content) for content in job.previews]
    assert len(pictures) == 12 and all(picture.shape[0] == picture.shape[1] for picture in pictures)
    assert preview(job.previews[-1]).std() > 10, "something is to be seen in the end"


def preview(content: bytes) -> numpy.ndarray:
    """Return a preview as the browser shows it."""
    with Image.open(io.BytesIO(content)) as image:
        return numpy.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("name", "frames"),
    [("demo_image_to_video", 9), ("demo_first_last_frame", 9), ("demo_long_video", 17), ("demo_video_to_video", 9)],
)
def test_demo_workflows_of_pictures_make_videos(server, object_info, name, frames):
    prompt = to_prompt(read_workflow(name), object_info)
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
    [save] = of_type(prompt, "SaveVideo")
    [file] = server.files(job, save)
    assert clip_facts(file) == (frames, 64, 64, 8)


def clip_facts(file: Path) -> tuple[int, int, int, float]:
    """Return the number of frames, height, width and frames per second of a video file."""
    import av

    with av.open(file) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert all(frame.std() > 1 for frame in frames), "an empty picture"
        return len(frames), stream.height, stream.width, float(stream.average_rate)


def test_a_lora_changes_its_own_branch_and_no_other(server, tiny):
    """Two samplers on one model, one of them through a LoRA; with strength 0 it gives what the other does."""
    for node in (VIDEO, SAVE):
        del tiny[node]
    lora = {"model": [MODEL, 0], "file": "style.safetensors", "strength": 1.0, "start_percent": 0.5}
    tiny["20"] = {"class_type": "WanQwenLoRA", "inputs": lora}
    tiny["21"] = {"class_type": "WanQwenSampler", "inputs": tiny[SAMPLER]["inputs"] | {"model": ["20", 0]}}
    tiny["22"] = {"class_type": "WanQwenVAEDecode", "inputs": tiny[DECODE]["inputs"] | {"latent": ["21", 0]}}
    for node, source in (("23", DECODE), ("24", "22")):
        tiny[node] = {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": f"lora_{source}"}}
    job = server.run(tiny)
    assert job.end == "execution_success", job.error
    assert "78 of 78 tensors used" in server.outputs(job)["20"]["text"][0]
    with Image.open(server.files(job, "23")[0]) as image:
        settings = json.loads(image.info["prompt"])
    assert settings[SAMPLER]["inputs"] == tiny[SAMPLER]["inputs"], "seed and all settings go with the picture"
    plain, changed = ([pixels(file) for file in server.files(job, node)] for node in ("23", "24"))
    assert len(plain) == len(changed) == 5 and plain != changed
    lora["strength"] = 0.0
    job = server.run(tiny)
    assert job.end == "execution_success", job.error
    assert [pixels(file) for file in server.files(job, "24")] == plain


def test_a_changed_prompt_runs_only_what_depends_on_it(server, tiny):
    assert server.run(tiny).end == "execution_success"
    again = server.run(tiny)
    assert again.executed == set()
    tiny[PROMPT]["inputs"]["positive"] = "a blue disc moving left on a black background"
    changed = server.run(tiny)
    assert changed.end == "execution_success"
    assert set(changed.of("execution_cached")[0]["nodes"]) == {MODEL, TEXT_ENCODER, VAE, SIZE}
    assert changed.executed == {PROMPT, SAMPLER, DECODE, VIDEO, SAVE}


def test_after_models_and_cache_were_freed_everything_comes_again(server, tiny):
    tiny["20"] = {"class_type": "SaveImage", "inputs": {"images": [DECODE, 0], "filename_prefix": "freed"}}
    first = server.run(tiny)
    assert first.end == "execution_success", first.error
    assert server.post("/free", {"unload_models": True, "free_memory": True})[0] == 200
    time.sleep(1)  # the server looks at this between two prompts
    again = server.run(tiny)
    assert again.end == "execution_success", again.error
    assert {MODEL, TEXT_ENCODER, VAE, PROMPT, SAMPLER, DECODE} <= again.executed
    pairs = zip(server.files(first, "20"), server.files(again, "20"), strict=True)
    assert all(pixels(one) == pixels(other) for one, other in pairs)


def test_interrupt_stops_within_a_block(server, tiny):
    """A step takes 16 blocks; after the interrupt a run goes on for less than four (one, and what is around it)."""
    tiny[MODEL]["inputs"]["file"] = "deep.safetensors"
    tiny[SIZE]["inputs"] |= {"width": 384, "height": 384, "frames": 33}
    tiny[SAMPLER]["inputs"] |= {"steps": 500, "guidance": 1.0}
    job = server.start(tiny)
    ticks = []
    for kind, data in server.follow(job):
        if kind == "progress" and data["node"] == SAMPLER:
            ticks.append(job.times[-1])
            if len(ticks) == 3:
                server.post("/interrupt", {})
    step = ticks[2] - ticks[1]
    assert job.end == "execution_interrupted" and len(ticks) == 3
    assert step > 0.8, f"a step of {step:.2f} s is too short to tell a block from it: make the clip larger"
    assert job.times[-1] - ticks[2] < step * 4 / BLOCKS
    tiny[MODEL]["inputs"]["file"] = TINY
    tiny[SIZE]["inputs"] |= {"width": 32, "height": 32, "frames": 5}
    tiny[SAMPLER]["inputs"]["steps"] = 2
    assert server.run(tiny).end == "execution_success"


def test_stock_vae_decode_with_our_vae_gives_the_same_picture(server, tiny):
    for node in (VIDEO, SAVE):
        del tiny[node]
    tiny["20"] = {"class_type": "VAEDecode", "inputs": {"samples": [SAMPLER, 0], "vae": [VAE, 0]}}
    for node, source in (("21", DECODE), ("22", "20")):
        inputs = {"images": [source, 0], "filename_prefix": f"from_{source}"}
        tiny[node] = {"class_type": "SaveImage", "inputs": inputs}
    job = server.run(tiny)
    assert job.end == "execution_success", job.error
    ours, stock = server.files(job, "21"), server.files(job, "22")
    assert len(ours) == len(stock) == 5
    for a, b in zip(ours, stock, strict=True):
        assert pixels(a) == pixels(b)
    assert pixels(ours[0]) != pixels(ours[-1])


def test_stock_tiled_decode_and_encode_take_our_vae(server, tiny):
    sizes = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
    tiny["20"] = {"class_type": "VAEDecodeTiled", "inputs": {"samples": [SAMPLER, 0], "vae": [VAE, 0]} | sizes}
    tiny["21"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["20", 0], "vae": [VAE, 0]}}
    tiny["22"] = {"class_type": "VAEEncodeTiled", "inputs": {"pixels": ["20", 0], "vae": [VAE, 0]} | sizes}
    tiny["23"] = {"class_type": "WanQwenVAEDecode", "inputs": tiny[DECODE]["inputs"] | {"latent": ["22", 0]}}
    tiny[DECODE]["inputs"]["latent"] = ["21", 0]
    tiny["24"] = {"class_type": "SaveImage", "inputs": {"images": ["23", 0], "filename_prefix": "round"}}
    job = server.run(tiny)
    assert job.end == "execution_success", job.error
    assert len(server.files(job, "24")) == 5 and len(server.files(job, SAVE)) == 1


def test_sigmas_of_a_stock_node_drive_our_sampler(server, tiny):
    levels = {"steps": 4, "sigma_max": 0.99, "sigma_min": 0.02, "rho": 7.0}
    tiny["20"] = {"class_type": "KarrasScheduler", "inputs": levels}
    tiny["21"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": ["20", 0], "step": 2}}
    tiny[SAMPLER]["inputs"]["sigmas"] = ["21", 0]
    job = server.run(tiny)
    assert job.end == "execution_success", job.error
    assert {message["max"] for message in job.of("progress") if message["node"] == SAMPLER} == {2}


SWAP = {
    "blocks_to_swap": 1, "slots": 0, "source": "disk", "interleave": "auto", "chunk_rows": 0, "headroom_gb": -1.0,
    "max_vram_gb": 0.0, "max_pinned_gb": -1.0,
}  # fmt: skip


def test_block_swap_between_loader_and_sampler_changes_nothing(server, tiny):
    """On a CPU nothing streams, which the node says."""
    tiny["20"] = {"class_type": "SaveImage", "inputs": {"images": [DECODE, 0], "filename_prefix": "swap"}}
    without = server.run(tiny)
    assert without.end == "execution_success", without.error
    inputs = SWAP | {"model": [MODEL, 0], "latent": [SIZE, 0]}
    tiny["21"] = {"class_type": "WanQwenBlockSwap", "inputs": inputs}
    tiny[SAMPLER]["inputs"]["model"] = ["21", 0]
    job = server.run(tiny)
    assert job.end == "execution_success", job.error
    assert {"21", SAMPLER, SAVE} <= job.executed
    pairs = zip(server.files(without, "20"), server.files(job, "20"), strict=True)
    assert all(pixels(before) == pixels(after) for before, after in pairs)
    [said] = server.get(f"/history/{job.prompt_id}")[job.prompt_id]["outputs"]["21"]["text"]
    assert said == "This machine computes on its cpu: the weights stay in RAM, nothing has to stream."
    tiny["21"]["inputs"]["source"] = "tape"
    _, answer = server.post("/prompt", {"prompt": tiny})
    assert "source is 'tape': choose one of auto, pinned, staged, disk." in str(answer)


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()
