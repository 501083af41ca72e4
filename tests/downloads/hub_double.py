"""A hub on localhost: real HTTP with commits, redirects to a second address for the content, ranges, and faults."""

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PIECE = 4096
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Request:
    """What one request asked for; `sent` bytes of content were written to it."""

    method: str
    path: str
    start: int
    token: str | None
    at_cdn: bool
    sent: int = 0


@dataclass
class Hub:
    """The server; change an attribute to change how it behaves."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> "owner/name:path" -> content
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # what it takes to get anything
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # of the next questions
    content_refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # of the next contents
    cuts: list[int] = field(default_factory=list)  # of the next contents so many bytes, then the connection breaks
    stall_after: int | None = None  # bytes after which a content stops coming, until `release`
    serves_ranges: bool = True
    tells_sha256: bool = True
    tells_size: bool = True
    tells_commit: bool = True
    tells_length: bool = True
    announced_sha256: str | None = None
    change: Callable[[bytes], bytes] = bytes  # what happens to a content on its way
    requests: list[Request] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.hub, self.cdn = (self._serve(at_cdn) for at_cdn in (False, True))
        self.endpoint = f"http://127.0.0.1:{self.hub.server_port}"

    def publish(self, commit: str, repo: str, path: str, content: bytes, branch: str = "main") -> str:
        """Add a file at a new commit, on top of the branch; return its sha256."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        self.commits[commit] = {**before, f"{repo}:{path}": content}
        self.branches[branch] = commit
        return hashlib.sha256(content).hexdigest()

    def close(self) -> None:
        """Stop both addresses."""
        self.release.set()
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    @property
    def contents(self) -> list[Request]:
        """The requests for content, in order."""
        return [request for request in self.requests if request.at_cdn]

    def _serve(self, at_cdn: bool) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"double": self, "at_cdn": at_cdn})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.handle_error = lambda request, address: None  # clients that hang up are part of the tests
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    double: Hub
    at_cdn: bool
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        hub, match = self.double, RESOLVE.fullmatch(self.path)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        token = self.headers.get("Authorization")
        request = Request(self.command, self.path, int(start[1]) if start else 0, token, self.at_cdn)
        if match:  # newer huggingface_hub ask for other things too
            hub.requests.append(request)
        refusals = hub.content_refusals if self.at_cdn else hub.refusals
        if refusals:
            status, headers = refusals.pop(0)
            return self._head(status, {"Content-Length": "0", **headers})
        if match is None:
            return self._head(404, {"Content-Length": "0"})
        repo, revision, path = match.groups()
        commit = hub.branches.get(revision, revision)
        content = hub.commits.get(commit, {}).get(f"{repo}:{path}")
        if not self.at_cdn and hub.token and token != f"Bearer {hub.token}":
            return self._head(401, {"Content-Length": "0", "X-Error-Code": "GatedRepo"})
        if content is None:
            code = "EntryNotFound" if commit in hub.commits else "RevisionNotFound"
            return self._head(404, {"Content-Length": "0", "X-Error-Code": code})
        if self.at_cdn:
            return self._send(request, content)
        sha256 = hub.announced_sha256 or hashlib.sha256(content).hexdigest()
        headers = {
            "Location": f"http://localhost:{hub.cdn.server_port}/{repo}/resolve/{commit}/{path}",
            "Content-Length": "0",
            "ETag": '"none of its content"',
        }
        if hub.tells_size:
            headers["X-Linked-Size"] = str(len(content))
        if hub.tells_commit:
            headers["X-Repo-Commit"] = commit
        if hub.tells_sha256:
            headers["X-Linked-Etag"] = f'"{sha256}"'
        return self._head(302, headers)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, request: Request, content: bytes) -> None:
        hub = self.double
        content, start = hub.change(content), request.start
        if start >= len(content) and hub.serves_ranges:
            return self._head(416, {"Content-Length": "0"})
        if start and hub.serves_ranges:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._head(206, {"Content-Length": str(len(content) - start), "Content-Range": span})
        else:
            start = 0
            self._head(200, {"Content-Length": str(len(content))} if hub.tells_length else {"Connection": "close"})
        end = min(len(content), start + hub.cuts.pop(0)) if hub.cuts else len(content)
        for at in range(start, end, PIECE):
            if hub.stall_after is not None and request.sent >= hub.stall_after:
                hub.release.wait()
            piece = content[at : min(at + PIECE, end)]
            try:
                self.wfile.write(piece)
            except OSError:  # the client has gone
                break
            request.sent += len(piece)
        self.close_connection = end < len(content) or not hub.tells_length
