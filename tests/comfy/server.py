"""A real ComfyUI as a subprocess, and as much of a client as the tests need. Standard library only."""

import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 150
TRIES = 3  # ports
JOB_SECONDS = 90
HISTORY_SECONDS = 10
PREVIEW = 1  # what a binary message begins with; another number says of which format its picture is
ENDS = ("execution_success", "execution_error", "execution_interrupted")


def find_comfyui() -> tuple[Path, Path] | str:
    """Return ComfyUI's folder and a Python that can run it, or what is missing."""
    home = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
    if not (home / "main.py").is_file():
        return f"no ComfyUI in {home}; COMFYUI_PATH says where one is"
    named = os.environ.get("COMFYUI_PYTHON")
    environments = [folder / name for folder in (home, home.parent) for name in (".venv", "venv")]
    environments.append(Path("~/comfyenv").expanduser())
    places = [Path(named)] if named else [folder / "bin" / "python" for folder in environments]
    for place in places:
        if place.is_file():
            return home, place
    return f"no Python for ComfyUI at {', '.join(map(str, places))}; COMFYUI_PYTHON says where one is"


@dataclass
class Job:
    """What the server said about one prompt; `times` are seconds of each message, on one clock."""

    prompt_id: str
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)  # image files

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.messages if name == kind]

    @property
    def end(self) -> str:
        return self.messages[-1][0]

    @property
    def error(self) -> str:
        [error] = self.of("execution_error")
        return f"{error['node_type']}: {error['exception_message']}"

    @property
    def executed(self) -> set[str]:
        """Ids of the nodes that ran."""
        return {data["node"] for data in self.of("executing") if data["node"] is not None}


class Server:
    """ComfyUI over `base` (its models, input, output, custom_nodes). Use `close`, or it stays."""

    def __init__(self, home: Path, python: Path, base: Path):
        self.base, self.log_path = base, base / "server.log"
        self.socket: WebSocket | None = None
        for _ in range(TRIES):
            self._start(home, python)
            if self._is_up():
                break
            taken = "address already in use" in self.log().lower()  # by a server that started meanwhile
            if not taken:
                raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-4000:]}")
        else:
            raise RuntimeError(f"ComfyUI found no free port in {TRIES} tries:\n{self.log()[-4000:]}")
        self.socket = WebSocket(self.port, "/ws?clientId=tests")

    def _start(self, home: Path, python: Path) -> None:
        self.port = _free_port()
        listen = ["--cpu", "--listen", "127.0.0.1", "--port", self.port, "--base-directory", self.base]
        quiet = ["--disable-auto-launch", "--dont-print-server", "--database-url", "sqlite:///:memory:"]
        command = [python, "main.py", *listen, *quiet, "--preview-method", "auto"]
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _is_up(self) -> bool:
        """Wait until the server answers; say whether it does."""
        until = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < until:
            try:
                self.get("/system_stats")
                return self.process.poll() is None  # else it was another server that answered
            except OSError:
                time.sleep(0.3)
        self.close()
        return False

    def close(self) -> None:
        if self.socket:
            self.socket.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(path))

    def post(self, path: str, content: dict[str, Any]) -> tuple[int, Any]:
        """Return the status and the answer, also of a refusal."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")

    def start(self, prompt: dict[str, Any]) -> Job:
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": "tests"})
        assert status == 200 and not answer["node_errors"], answer
        return Job(answer["prompt_id"])

    def follow(self, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the messages about a job as they come, up to the one that ends it."""
        until = time.monotonic() + JOB_SECONDS
        while not job.messages or job.end not in ENDS:
            assert time.monotonic() < until, f"no end after {JOB_SECONDS} s: {job.messages[-3:]}\n{self.log()[-3000:]}"
            message = self.socket.read()
            if isinstance(message, str):
                content = json.loads(message)
                kind, data = content["type"], content["data"]
                if data.get("prompt_id") == job.prompt_id:
                    job.messages.append((kind, data))
                    job.times.append(time.monotonic())
                    yield kind, data
            elif struct.unpack(">I", message[:4])[0] == PREVIEW:
                job.previews.append(message[8:])

    def run(self, prompt: dict[str, Any]) -> Job:
        """Run a prompt to its end, good or bad."""
        job = self.start(prompt)
        for _ in self.follow(job):
            pass
        return job

    def outputs(self, job: Job) -> dict[str, Any]:
        """Return what the nodes showed; the history is written a moment after the last message is sent."""
        until = time.monotonic() + HISTORY_SECONDS
        while not (found := self.get(f"/history/{job.prompt_id}")):
            assert time.monotonic() < until, f"{job.prompt_id} is not in the history"
            time.sleep(0.05)
        return found[job.prompt_id]["outputs"]

    def files(self, job: Job, node: str) -> list[Path]:
        """Return the files that a saving node wrote."""
        entries = [entry for listed in self.outputs(job)[node].values() for entry in listed if isinstance(entry, dict)]
        return [self.base / "output" / entry["subfolder"] / entry["filename"] for entry in entries]


class WebSocket:
    """The reading half of a web socket (RFC 6455), without compression or fragments, as ComfyUI sends."""

    def __init__(self, port: int, path: str):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=JOB_SECONDS)
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.file = self.socket.makefile("rb")
        assert b" 101 " in self.file.readline()
        while self.file.readline().strip():
            pass

    def read(self) -> str | bytes:
        """Return the next message: str for text, bytes for anything else."""
        kind, length = self.file.read(2)
        if length == 126:
            [length] = struct.unpack(">H", self.file.read(2))
        elif length == 127:
            [length] = struct.unpack(">Q", self.file.read(8))
        content = self.file.read(length)
        return content.decode() if kind & 0xF == 1 else content

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the tests end without cleaning up, as when they are killed themselves."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
