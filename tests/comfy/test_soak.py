"""Many prompts in a row in one server: families and tasks in turn, with cancels, errors and unloading in between."""

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .convert import MODEL, SAMPLER, of_type, read_workflow, to_prompt
from .test_pictures import OURS, from_picture  # noqa: F401 a fixture
from .test_qwen_image import tiny as qwen  # noqa: F401 a fixture
from .test_stock_model import beside
from .test_vace import guided  # noqa: F401 a fixture

GROWTH = 1.02  # of the server's memory, from the fifth prompt to the last
SETTLED = 5
ENDLESS = 5000  # steps


class State(NamedTuple):
    """What a process holds. Sockets and what waits for them come and go with requests, and are left out."""

    megabytes: float
    threads: int
    files: tuple[str, ...]


def state_of(process: int) -> State:
    facts = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    folder = Path(f"/proc/{process}/fd")
    files = tuple(target for entry in folder.iterdir() if (target := _target(entry)).startswith("/"))
    return State(int(facts["VmRSS"].split()[0]) / 1024, int(facts["Threads"]), files)


def _target(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except FileNotFoundError:  # a socket that was closed meanwhile
        return ""


@pytest.fixture
def tasks(tiny, qwen, from_picture, guided, object_info) -> dict[str, dict[str, Any]]:  # noqa: F811
    """One prompt of each kind; a sampler in each takes a seed."""
    text = copy.deepcopy(tiny)
    broken = copy.deepcopy(tiny)
    broken["20"] = {"class_type": "LoadLatent", "inputs": {"latent": "nan.latent"}}
    broken[SAMPLER]["inputs"] |= {"latent": ["20", 0], "denoise": 0.5}
    cut = copy.deepcopy(tiny)
    cut[MODEL]["inputs"]["file"] = "truncated.safetensors"
    cancelled = copy.deepcopy(tiny)
    cancelled[SAMPLER]["inputs"]["steps"] = ENDLESS
    controlled = guided("WanQwenWanVACE", frames=5)
    from_text = beside(copy.deepcopy(text))
    # First those that bring in what a server has only after its first run of something; the fifth is the largest.
    return {
        "both samplers": from_text,
        "video of a picture": copy.deepcopy(from_picture("example.png", OURS)),
        "edit": qwen("qwen_image_edit"),
        "controlled video": controlled,
        "demo": to_prompt(read_workflow("demo_text_to_image"), object_info),
        "cancelled": cancelled,
        "video of text": text,
        "latent of NaN": broken,
        "inpainting": qwen("qwen_image_inpaint"),
        "file cut off": cut,
        "picture of text": qwen("qwen_image_text_to_image"),
    }


ENDINGS = {"cancelled": "execution_interrupted", "latent of NaN": "execution_error", "file cut off": "execution_error"}


def run(server: Any, prompt: dict[str, Any], is_cancelled: bool) -> str:
    """Run a prompt, stopping it at its first step if it is to be cancelled, and return how it ended."""
    job = server.start(prompt)
    for kind, data in server.follow(job):
        if is_cancelled and kind == "progress" and data["node"] == SAMPLER:
            server.post("/interrupt", {})
    return job.end


@pytest.mark.skipif("not config.getoption('soak')", reason="long: give --soak 50, or as many prompts as you like")
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="what a process holds is read from Linux's /proc")
def test_many_prompts_in_a_row_leave_nothing_behind(
    server, tasks, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture
):
    states: list[State] = []
    names = list(tasks)
    for i in range(pytestconfig.getoption("soak")):
        name = names[i % len(names)]
        prompt = tasks[name]
        for node in (*of_type(prompt, "WanQwenSampler"), *of_type(prompt, "RandomNoise")):
            prompt[node]["inputs"]["noise_seed" if "noise_seed" in prompt[node]["inputs"] else "seed"] = 1000 + i
        end = run(server, prompt, name == "cancelled")
        assert end == ENDINGS.get(name, "execution_success"), f"prompt {i + 1} ({name}): {end}"
        if i % 10 == 9:
            status, _ = server.post("/free", {"unload_models": True, "free_memory": True})
            assert status == 200
        states.append(state_of(server.process.pid))
        with capsys.disabled():
            now = states[-1]
            print(
                f"{i + 1:3} {name:20} {now.megabytes:7.0f} MB, {now.threads} threads, {len(now.files)} files",
                flush=True,
            )
    settled, last = states[SETTLED - 1], states[-1]
    most = max(states[SETTLED:], key=lambda state: state.megabytes)
    assert most.megabytes <= GROWTH * settled.megabytes, f"{settled} after the fifth prompt, then {most}"
    assert last.threads <= settled.threads and len(last.files) <= len(settled.files), f"{settled}, then {last}"
