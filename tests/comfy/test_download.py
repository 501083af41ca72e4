"""The download node in a real ComfyUI, with a hub on localhost as the mirror that the user set."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from wanqwen.downloads.catalog import I2V_LIGHTX2V, T2V_LIGHTX2V, PublishedFile, set_with

COMMIT = "1" * 40


def prompt(file: PublishedFile) -> dict[str, Any]:
    """Return a prompt that fetches the set of a file, as the hub has it."""
    inputs = {"what": set_with(file.name).title, "fetch": "everything", "check": False, "revision": "main"}
    return {"1": {"class_type": "WanQwenDownload", "inputs": inputs}}


@pytest.fixture
def content(hub, server) -> Iterator[bytes]:
    """What the hub has as either LoRA; afterwards the server has neither, as other tests expect."""
    content = os.urandom(4_000_000)
    for file in (T2V_LIGHTX2V, I2V_LIGHTX2V):
        hub.publish(COMMIT, file.repo, file.path, content)
    yield content
    for file in (T2V_LIGHTX2V, I2V_LIGHTX2V):
        (server.base / "models" / "loras" / file.name).unlink(missing_ok=True)


def test_a_file_is_in_the_loaders_list_when_it_has_come(server, content):
    file = T2V_LIGHTX2V
    assert file.name not in listed(server)
    job = server.run(prompt(file))
    assert job.end == "execution_success", job.error
    assert (server.base / "models" / "loras" / file.name).read_bytes() == content
    [line] = server.outputs(job)["1"]["text"]
    assert line.startswith(f"loras/{file.name}: fetched, 4 MB, sha256 as published")
    assert listed(server).count(file.name) == 1
    assert not [name for name in listed(server) if name.endswith((".part", ".json", ".lock"))]
    assert [(data["value"], data["max"]) for data in job.of("progress")][-1] == (4, 4)


def test_the_user_s_stop_is_obeyed_at_once_and_the_rest_comes_next_time(server, hub, content):
    file = I2V_LIGHTX2V
    hub.stall_after = 3_000_000
    hub.release.clear()
    job = server.start(prompt(file))
    for kind, _ in server.follow(job):
        if kind == "executing":
            break
    part = server.base / "models" / "loras" / ".wanqwen" / f"{file.name}.part"
    until = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 2_000_000):
        assert time.monotonic() < until, "nothing comes"
        time.sleep(0.05)
    stopped = time.monotonic()
    server.post("/interrupt", {})
    for _ in server.follow(job):
        pass
    assert job.end == "execution_interrupted" and job.times[-1] - stopped < 1
    assert not (server.base / "models" / "loras" / file.name).exists()
    hub.release.set()
    hub.stall_after = None
    job = server.run(prompt(file))
    assert job.end == "execution_success", job.error
    assert (server.base / "models" / "loras" / file.name).read_bytes() == content
    assert hub.contents[-1].start > 2_000_000


def listed(server) -> list[str]:
    """Return what the LoRA node offers."""
    return server.get("/object_info/WanQwenLoRA")["WanQwenLoRA"]["input"]["required"]["file"][1]["options"]
