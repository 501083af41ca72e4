"""Wrong files and impossible settings in a real ComfyUI: one clear error or a stated correction; the next run works."""

import pytest

from .convert import DECODE, MODEL, PROMPT, SAMPLER, SIZE, TEXT_ENCODER, VAE

BAD_FILES = [
    (MODEL, "a_vae.safetensors", "a_vae.safetensors is a VAE"),
    (MODEL, "tiny_i2v.safetensors", "put Wan Image to Video or Wan First-Last Frame to Video before the sampler"),
    (MODEL, "truncated.safetensors", "is cut off"),
    (MODEL, "missing.safetensors", "blocks.1.ffn.2.weight"),
    (MODEL, "extra.safetensors", "blocks.1.surprise.weight"),
    (MODEL, "code.pth", "would run code"),
    (VAE, "an_encoder.safetensors", "an_encoder.safetensors is a text encoder"),
]


@pytest.mark.parametrize(("node", "file", "message"), BAD_FILES, ids=[row[1] for row in BAD_FILES])
def test_a_bad_file_gives_one_clear_error_and_the_next_run_works(server, tiny, node, file, message):
    good = tiny[node]["inputs"]["file"]
    tiny[node]["inputs"]["file"] = file
    job = server.run(tiny)
    assert job.end == "execution_error" and message in job.error, job.messages[-1]
    assert file in job.error and "Traceback" not in job.error
    assert not (server.base / "code_ran").exists()
    tiny[node]["inputs"]["file"] = good
    assert_runs(server, tiny)


@pytest.mark.parametrize("broken", [SAMPLER, DECODE])
def test_a_latent_of_nan_is_refused(server, tiny, broken):
    whole = tiny[broken]["inputs"]["latent"]
    tiny["20"] = {"class_type": "LoadLatent", "inputs": {"latent": "nan.latent"}}
    tiny[broken]["inputs"]["latent"] = ["20", 0]
    tiny[SAMPLER]["inputs"]["denoise"] = 0.5
    job = server.run(tiny)
    assert job.end == "execution_error" and "NaN" in job.error
    tiny[broken]["inputs"]["latent"] = whole
    assert_runs(server, tiny)


@pytest.mark.parametrize("node", [MODEL, TEXT_ENCODER, VAE])
def test_a_missing_file_is_said_once_and_at_the_input_that_names_it(server, tiny, node):
    tiny[node]["inputs"]["file"] = "gone.safetensors"
    status, answer = server.post("/prompt", {"prompt": tiny})
    assert status == 400 and set(answer["node_errors"]) == {node}
    [error] = answer["node_errors"][node]["errors"]
    assert error["extra_info"]["input_name"] == "file"
    assert error["details"].startswith("file - gone.safetensors was not found: put the file into")


@pytest.mark.parametrize(
    ("node", "name", "value", "message"),
    [
        (SAMPLER, "solver", "heun", "solver is 'heun': choose one of unipc"),
        (DECODE, "tiling", "on", "tiling is 'on': choose one of auto, tiled"),
    ],
)
def test_a_value_that_is_not_in_its_list_is_refused_before_anything_runs(server, tiny, node, name, value, message):
    tiny[node]["inputs"][name] = value
    status, answer = server.post("/prompt", {"prompt": tiny})
    assert status == 400 and set(answer["node_errors"]) == {node}
    assert all(message in error["details"] for error in answer["node_errors"][node]["errors"])


def test_a_loader_s_value_that_is_not_in_its_list_is_refused_once(server, tiny):
    """By newer ComfyUI before anything runs, by the node itself where ComfyUI does not look."""
    tiny[MODEL]["inputs"]["precision"] = "int3"
    status, answer = server.post("/prompt", {"prompt": tiny})
    if status == 400:
        [error] = answer["node_errors"][MODEL]["errors"]
        assert error["type"] == "value_not_in_list" and error["details"].startswith("precision: 'int3' not in ['auto',")
    else:
        job = server.run(tiny)
        assert job.end == "execution_error"
        assert "precision is 'int3': choose one of auto, bf16, fp16, fp32" in job.error


def test_a_missing_input_is_named(server, tiny):
    del tiny[SAMPLER]["inputs"]["solver"]
    status, answer = server.post("/prompt", {"prompt": tiny})
    [error] = answer["node_errors"][SAMPLER]["errors"]
    assert (status, error["type"], error["details"]) == (400, "required_input_missing", "solver")


def test_sizes_are_corrected_and_the_user_is_told(server, tiny):
    tiny[SIZE]["inputs"] |= {"frames": 80, "width": 100, "height": 16}
    tiny["20"] = {"class_type": "SaveImage", "inputs": {"images": [DECODE, 0], "filename_prefix": "size"}}
    job = server.run(tiny)
    assert job.end == "execution_success", job.error
    made, *told = server.outputs(job)[SIZE]["text"]
    assert made == "96 x 16, 81 frames"
    assert [text.split(":")[0] for text in told] == ["width 100 changed to 96", "frames 80 changed to 81"]
    assert all(text in server.log() for text in told)
    assert len(server.files(job, "20")) == 81


def test_a_prompt_of_ten_thousand_words_is_cut_and_the_user_is_told(server, tiny):
    tiny[PROMPT]["inputs"]["positive"] = "red star " * 5000
    job = server.run(tiny)
    assert job.end == "execution_success", job.error
    told, _ = server.outputs(job)[PROMPT]["text"]
    assert told.startswith("positive: The prompt has ") and "were cut off" in told


def assert_runs(server, prompt) -> None:
    """Run it with a seed that was not used yet, so that nothing comes from the cache."""
    prompt[SAMPLER]["inputs"]["seed"] += 1000
    job = server.run(prompt)
    assert job.end == "execution_success", job.error
