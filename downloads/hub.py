"""What a hub says of a file, and the file's bytes, through huggingface_hub in any of its generations.

Up to 0.x that package speaks through `requests`, since 1.0 through `httpx`; both are met here and nowhere else. Files
come over plain HTTP and not through hf_xet, which can't go on where a download was stopped.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

PIECE_BYTES = 1 << 14  # what `requests` collects before it hands it on, and loses when a connection breaks
MIRROR = "https://hf-mirror.com"
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
# Without a user's token first: hubs refuse public files to one who sends an old token.
TOKENS = (False, None)  # huggingface_hub's words for none, and for the one that the user has stored, if any


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """A file at one commit: `size` in bytes, `sha256` where the hub tells it, whose token it takes (see TOKENS)."""

    repo: str
    path: str
    commit: str
    url: str
    size: int | None
    sha256: str | None
    token: bool | None


class Temporary(Exception):
    """A failure that may pass; `wait` is how many seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def look_up(repo: str, path: str, revision: str, endpoint: str | None = None) -> Remote:
    """Return a file at a branch, tag or commit, which becomes a commit.

    `endpoint` is the hub's address (default: HF_ENDPOINT, else huggingface.co). Raises ValueError if it can't be had,
    Temporary if the same question may be answered later.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, path, revision=revision, endpoint=endpoint)
    for token in TOKENS:
        try:
            found = get_hf_file_metadata(url, token=token, timeout=_timeout())
            break
        except _failures() as error:
            answer = getattr(error, "response", None)
            if answer is None:
                raise _unreachable(url, error) from error
            if token is None or answer.status_code not in (401, 403):
                _refuse(answer, f"{path} of {repo} at revision {revision}", url)
                raise
    commit = found.commit_hash or (revision if COMMIT.fullmatch(revision) else None)
    if commit is None:
        raise ValueError(f"{_host(url)} does not say which commit {revision} of {repo} is: give a commit as revision.")
    sha256 = found.etag if found.etag and SHA256.fullmatch(found.etag) else None
    url = hf_hub_url(repo, path, revision=commit, endpoint=endpoint)
    size = found.size or None  # older versions take that of the empty redirection
    return Remote(repo=repo, path=path, commit=commit, url=url, size=size, sha256=sha256, token=token)


def stream(file: Remote, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (position, bytes) from byte `start` of a file on, or from 0 if the server does not serve parts.

    Raises ValueError if it refuses, or serves something else than the file, Temporary for what may pass.
    """
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=file.token) | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with _get(file.url, headers) as response:
            _refuse(response, f"{file.path} of {file.repo} at revision {file.commit}", file.url)
            position = _position(response, start, file)
            for piece in _pieces(response):
                yield position, piece
                position += len(piece)
    except _failures() as error:
        raise _unreachable(file.url, error) from error


def _get(url: str, headers: Mapping[str, str]) -> AbstractContextManager[Any]:
    from huggingface_hub.utils import get_session

    session = get_session()
    if hasattr(session, "build_request"):
        return session.stream("GET", url, headers=headers, timeout=_timeout(), follow_redirects=True)
    return session.get(url, headers=headers, timeout=_timeout(), stream=True)


def _pieces(response: Any) -> Iterator[bytes]:
    return response.iter_raw() if hasattr(response, "iter_raw") else response.iter_content(PIECE_BYTES)


def _failures() -> tuple[type[Exception], ...]:
    """Return what a broken connection raises: `requests` OSErrors, `httpx` errors of its own."""
    from huggingface_hub.utils import get_session

    packages = [sys.modules[kind.__module__.partition(".")[0]] for kind in type(get_session()).__mro__]
    return OSError, *(package.HTTPError for package in packages if hasattr(package, "HTTPError"))


def _timeout() -> float:
    """Return the seconds without a sign of the server after which a connection counts as broken."""
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _unreachable(url: str, error: Exception) -> Exception:
    from huggingface_hub.utils import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return ValueError("HF_HUB_OFFLINE is set, so nothing can be fetched: unset it and start again.")
    return Temporary(
        f"{_host(url)} can't be reached or broke off ({type(error).__name__}: {error}). Check the connection. Where "
        f"that address is blocked, set HF_ENDPOINT to a mirror (such as {MIRROR}) and start again"
    )


def _refuse(response: Any, what: str, url: str) -> None:
    """Raise if a status says that the file is not coming; `response` has status_code and headers."""
    status, host = response.status_code, _host(url)
    code = response.headers.get("X-Error-Code", "")
    if status in (401, 403):
        page = re.sub(r"/resolve/.*", "", url)
        raise ValueError(
            f"{host} does not give you {what} (status {status} {code}): if the repository is gated, accept its terms "
            f"at {page}, log in with `hf auth login`, and try again. It may also have been renamed or removed."
        )
    if status == 404:
        raise ValueError(
            f"{host} has no {what} (status 404 {code}): it may have been moved. Try revision main, or another version "
            "of this pack."
        )
    if status == 416:
        raise ValueError(f"{host} has fewer bytes of {what} than it announced.")
    if status in (408, 429) or status >= 500:
        asked = response.headers.get("Retry-After", "")
        wait = float(asked) if asked.isdecimal() else None
        raise Temporary(f"{host} is busy (status {status}). Wait some minutes and try again", wait)
    if status not in (200, 206):
        raise ValueError(f"{host} answers to {what} with status {status}, which means nothing here: try again later.")


def _position(response: Any, start: int, file: Remote) -> int:
    """Return the position in the file of an answer's first byte; the answer may be a web page of some proxy's."""
    if response.status_code == 200:
        first, total = 0, response.headers.get("Content-Length", "an unknown number of")
    else:
        match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != start:
            raise ValueError(f"{_host(file.url)} sends another part of {file.path} than was asked for.")
        first, total = start, match[2]
    if total != str(file.size):
        raise ValueError(
            f"{_host(file.url)} sends {total} bytes as {file.path}, which has {file.size}: something on the way, a "
            "proxy or a log-in page, answers in its place. Try again elsewhere, or later."
        )
    return first
