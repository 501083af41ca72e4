"""Files from a hub on localhost: whole, checked, under their names only then, and resumed after whatever stops them."""

import errno
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from wanqwen.downloads import fetch as fetching
from wanqwen.downloads import files as on_disk
from wanqwen.downloads.catalog import PublishedFile
from wanqwen.downloads.files import layout
from wanqwen.downloads.hub import PIECE_BYTES

from .conftest import CONTENT, FIRST, PATH, REPO, SECOND
from .hub_double import PIECE, Hub


class UserStops(Exception):
    """What ComfyUI raises when the user stops a run."""


@pytest.fixture
def target(models: Path) -> Path:
    return models / "vae" / "some_vae.safetensors"


@pytest.fixture
def part(models: Path) -> Path:
    return models / "vae" / ".wanqwen" / "some_vae.safetensors.part"


def unpinned(file: PublishedFile) -> PublishedFile:
    return replace(file, sha256=None)


def stopped_after(bytes_done: int):
    """Return what looks on and stops a download that has come so far."""

    def watch(progress: fetching.Progress) -> None:
        if progress.done >= bytes_done > 0:
            raise UserStops

    return watch


def stop_half_way(hub: Hub, fetch, file: PublishedFile) -> None:
    hub.stall_after = 100_000
    with pytest.raises(UserStops):
        fetch(file, watch=stopped_after(90_000))
    hub.release.set()
    hub.stall_after = None
    for thread in threading.enumerate():  # what it has of the file is written when it ends
        if thread.name == "wanqwen download":
            thread.join(10)


def test_a_file_comes_whole_and_is_not_fetched_again(hub, fetch, file, target, part):
    [line] = fetch(file)
    assert target.read_bytes() == CONTENT and not part.exists()
    assert line == f"vae/some_vae.safetensors: fetched, 0 MB, sha256 as published; from {REPO} at {FIRST}"
    record = json.loads(part.with_name("some_vae.safetensors.json").read_text())
    assert (record["commit"], record["sha256"], record["path"]) == (FIRST, file.sha256, PATH)
    asked = len(hub.requests)
    [line] = fetch(file)
    assert line.endswith("sha256 checked when it was fetched") and len(hub.requests) == asked


def test_a_changed_file_no_longer_counts_as_checked(fetch, file, target):
    fetch(file)
    os.utime(target, (1, 1))
    [line] = fetch(file)
    assert line.endswith("known by name and size")


@pytest.mark.parametrize("cuts", [[70_001], [1, 4096, 100_000], [0, 0, 0], [50_000, 0, 0, 0, 50_000, 0, 0, 0]])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, fetch, file, target, cuts):
    hub.cuts = list(cuts)
    fetch(file)
    assert target.read_bytes() == CONTENT
    twice, came = 0, 0
    for request in hub.contents:
        assert 0 <= came - request.start < PIECE_BYTES
        twice += came - request.start
        came = request.start + request.sent
    assert came == len(CONTENT) and len(hub.contents) == len(cuts) + 1
    assert not twice or not hasattr(get_session(), "build_request")  # httpx hands on every byte that came


def test_one_that_breaks_again_and_again_ends_with_what_to_do_and_keeps_what_came(hub, fetch, file, part, target):
    hub.cuts = [6 * PIECE_BYTES, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"What has come so far is kept"):
        fetch(file)
    assert part.read_bytes() == CONTENT[: 6 * PIECE_BYTES] and not target.exists()
    hub.cuts = []
    [line] = fetch(file)
    assert target.read_bytes() == CONTENT and "0 MB of it before" in line
    assert hub.contents[-1].start == 6 * PIECE_BYTES


def test_a_stop_takes_effect_at_once_on_a_silent_server_and_the_rest_comes_later(hub, fetch, file, part, target):
    hub.stall_after = 100_000
    last = 0.0

    def watch(progress: fetching.Progress) -> None:
        nonlocal last
        if progress.done >= 90_000:
            last = time.monotonic()
            raise UserStops

    with pytest.raises(UserStops):
        fetch(file, watch=watch)
    assert time.monotonic() - last < 0.5
    hub.release.set()
    hub.stall_after = None
    fetch(file)
    assert target.read_bytes() == CONTENT and not part.exists()
    assert hub.contents[-1].start >= 90_000


def test_the_final_name_appears_only_when_the_file_was_checked(hub, fetch, file, target):
    seen = []
    hub.stall_after = 150_000

    def watch(progress: fetching.Progress) -> None:
        seen.append((progress.done, target.exists()))
        if progress.done >= 140_000:
            hub.release.set()

    fetch(file, watch=watch)
    assert any(done for done, _ in seen) and not any(there for done, there in seen if done < len(CONTENT))
    assert target.exists()


def test_progress_is_in_bytes_and_says_how_long_it_takes(hub, fetch, file):
    seen = []
    hub.stall_after = PIECE

    def watch(progress: fetching.Progress) -> None:
        seen.append(progress)
        if len(seen) > 5:
            hub.release.set()

    fetch(file, watch=watch)
    assert seen[-1].done == seen[-1].total == len(CONTENT)
    assert any("MB/s" in progress.text and "left" in progress.text for progress in seen)


def test_content_of_another_hash_is_not_kept(hub, fetch, file, part, target):
    hub.change = lambda content: b"x" + content[1:]
    with pytest.raises(ValueError, match=rf"sha256 [0-9a-f]{{64}}, and {file.sha256} was expected"):
        fetch(file)
    assert not target.exists() and not part.exists()
    hub.change = bytes
    fetch(file)
    assert target.read_bytes() == CONTENT and hub.contents[-1].start == 0


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"!"])
def test_content_of_another_length_is_refused_before_it_is_read(hub, fetch, file, target, change):
    hub.change = change
    with pytest.raises(ValueError, match=r"sends \d+ bytes as .*, which has 200000: something on the way"):
        fetch(file)
    assert not target.exists()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"serves_ranges": False, "change": lambda content: b"<html>log in</html>"}, "sends 19 bytes as"),
        ({"serves_ranges": False, "tells_length": False}, "sends an unknown number of bytes as"),
        ({"change": lambda content: content[:10]}, "has fewer bytes of"),
        ({"content_refusals": [(206, {"Content-Range": "bytes 0-1/2", "Content-Length": "0"})]}, "sends another part"),
        ({"content_refusals": [(204, {})]}, "with status 204, which means nothing here"),
    ],
)
def test_what_answers_in_the_file_s_place_does_not_cost_what_came(hub, fetch, file, part, target, facts, message):
    stop_half_way(hub, fetch, file)
    came = part.read_bytes()
    before = {name: getattr(hub, name) for name in facts}
    for name, value in facts.items():
        setattr(hub, name, value)
    with pytest.raises(ValueError, match=message):
        fetch(file)
    assert part.read_bytes() == came
    for name, value in before.items():
        setattr(hub, name, value)
    fetch(file)
    assert target.read_bytes() == CONTENT and hub.contents[-1].start == len(came)


def test_a_file_that_appears_meanwhile_is_not_overwritten(hub, fetch, file, part, target):
    hub.stall_after = 150_000

    def watch(progress: fetching.Progress) -> None:
        if progress.done >= 140_000:
            target.write_bytes(b"mine")
            hub.release.set()

    with pytest.raises(ValueError, match="has come from elsewhere meanwhile"):
        fetch(file, watch=watch)
    assert target.read_bytes() == b"mine" and part.read_bytes() == CONTENT


def test_a_file_that_was_replaced_on_the_hub_is_refused_before_anything_comes(hub, fetch, file):
    hub.publish(SECOND, REPO, PATH, CONTENT[::-1])
    with pytest.raises(ValueError, match=rf"has sha256 .* at {SECOND}.* it was replaced.*give {SECOND} as revision"):
        fetch(file)
    hub.publish(SECOND, REPO, PATH, CONTENT[1:])
    with pytest.raises(ValueError, match=r"has bytes 199999 .* that this pack knows 200000"):
        fetch(file)
    assert not hub.contents


def test_another_revision_is_taken_as_the_hub_has_it(hub, fetch, file, target):
    hub.publish(SECOND, REPO, PATH, CONTENT[1:])
    fetch(file, revision="main")
    assert target.read_bytes() == CONTENT[1:]
    with pytest.raises(ValueError, match=r"has 199999 bytes, and the published file 200000"):
        fetch(file)


def test_a_commit_in_the_catalog_is_what_is_fetched(hub, fetch, file, target):
    hub.publish(SECOND, REPO, PATH, CONTENT[::-1])
    fetch(replace(file, revision=FIRST))
    assert target.read_bytes() == CONTENT
    assert all(f"/resolve/{FIRST}/" in request.path for request in hub.requests)


def test_without_a_known_hash_the_hub_s_is_checked(hub, fetch, file, target):
    hub.announced_sha256 = "a" * 64
    with pytest.raises(ValueError, match=r"a{64} was expected"):
        fetch(unpinned(file))
    hub.announced_sha256 = None
    fetch(unpinned(file))
    assert target.read_bytes() == CONTENT


def test_a_hub_that_hides_hashes_will_do_for_files_of_known_hash_only(hub, fetch, file, target):
    hub.tells_sha256 = False
    with pytest.raises(ValueError, match="Nobody says which sha256"):
        fetch(unpinned(file))
    fetch(file)
    assert target.read_bytes() == CONTENT


def test_a_hub_that_hides_sizes_will_do_as_they_are_known(hub, fetch, file, target):
    hub.tells_size = False
    with pytest.raises(ValueError, match=r"does not say what .*some_vae.safetensors of owner/weights is"):
        fetch(file, revision="main")
    fetch(file)
    assert target.read_bytes() == CONTENT


def test_a_hub_that_hides_commits_will_do_for_a_commit_only(hub, fetch, file, target):
    hub.tells_commit = False
    with pytest.raises(ValueError, match="does not say which commit main of owner/weights is"):
        fetch(file)
    fetch(replace(file, revision=FIRST))
    assert target.read_bytes() == CONTENT


def test_a_part_goes_on_at_its_own_commit_though_the_branch_has_moved(hub, fetch, file, target):
    stop_half_way(hub, fetch, unpinned(file))
    hub.publish(SECOND, REPO, PATH, CONTENT[::-1])
    fetch(unpinned(file))
    assert target.read_bytes() == CONTENT
    assert f"/resolve/{FIRST}/" in hub.contents[-1].path and hub.contents[-1].start > 0


def test_a_part_of_another_commit_is_not_mixed_in(hub, fetch, file, target):
    stop_half_way(hub, fetch, unpinned(file))
    hub.publish(SECOND, REPO, PATH, CONTENT[::-1])
    fetch(unpinned(file), revision="main")
    assert target.read_bytes() == CONTENT[::-1] and hub.contents[-1].start == 0


def test_a_part_whose_commit_is_gone_says_so(hub, fetch, file):
    stop_half_way(hub, fetch, unpinned(file))
    hub.publish(SECOND, REPO, PATH, CONTENT[::-1])
    del hub.commits[FIRST]
    with pytest.raises(ValueError, match=rf"at revision {FIRST} \(status 404 RevisionNotFound\).*Try revision main"):
        fetch(unpinned(file))


@pytest.mark.parametrize("damage", ["record", "part", "longer"])
def test_a_damaged_part_does_no_harm(hub, fetch, file, part, target, damage):
    stop_half_way(hub, fetch, file)
    if damage == "record":
        part.with_name("some_vae.safetensors.json").write_text("{")
    elif damage == "longer":
        part.write_bytes(CONTENT + b"more")
    else:
        part.write_bytes(bytes(len(part.read_bytes())))
        with pytest.raises(ValueError, match="was expected: it was damaged"):
            fetch(file)
    fetch(file)
    assert target.read_bytes() == CONTENT and hub.contents[-1].start == 0


def test_a_server_without_ranges_starts_over(hub, fetch, file, target):
    hub.serves_ranges, cut = False, 7 * PIECE_BYTES
    hub.cuts = [cut]
    fetch(file)
    assert target.read_bytes() == CONTENT
    assert [(request.start, request.sent) for request in hub.contents] == [(0, cut), (cut, len(CONTENT))]


def test_one_without_ranges_that_never_gets_further_is_given_up(hub, fetch, file, target):
    hub.serves_ranges, hub.cuts = False, [7 * PIECE_BYTES] * 20
    with pytest.raises(ValueError, match="broke off"):
        fetch(file)
    assert not target.exists() and len(hub.contents) == 1 + len(fetching.PAUSES)


def test_a_whole_part_is_only_checked(hub, fetch, file, part, target):
    stop_half_way(hub, fetch, file)
    part.write_bytes(CONTENT)
    before = len(hub.contents)
    fetch(file)
    assert target.read_bytes() == CONTENT and len(hub.contents) == before


def test_a_busy_hub_is_asked_again(hub, fetch, file, target):
    hub.refusals = [(429, {"Retry-After": "0"}), (503, {})]
    hub.content_refusals = [(500, {}), (429, {})]
    fetch(file)
    assert target.read_bytes() == CONTENT


def test_it_is_given_the_time_that_it_asks_for(hub, fetch, file, monkeypatch):
    hub.content_refusals = [(429, {"Retry-After": "1"})]
    texts, started = [], time.monotonic()
    fetch(file, watch=lambda progress: texts.append(progress.text))
    assert time.monotonic() - started >= 1
    assert any("trying again in 1 s" in text and "is busy (status 429)" in text for text in texts)


def test_a_hub_that_stays_busy_says_to_come_back(hub, fetch, file):
    hub.refusals = [(503, {})] * 99
    with pytest.raises(ValueError, match=r"is busy \(status 503\). Wait some minutes"):
        fetch(file)


def test_it_is_not_waited_for_longer_than_a_user_would(hub, fetch, file):
    hub.content_refusals = [(429, {"Retry-After": "3600"})]
    with pytest.raises(ValueError, match="Wait some minutes and try again"):
        fetch(file)


def test_an_answer_is_not_waited_for_for_ever(hub, fetch, file, monkeypatch):
    monkeypatch.setattr(fetching, "QUESTION_SECONDS", -1)
    hub.refusals = [(503, {})] * 99
    with pytest.raises(ValueError, match="Wait some minutes and try again"):
        fetch(file)
    monkeypatch.setattr(fetching, "QUESTION_SECONDS", 10)
    hub.refusals = [(503, {})]
    fetch(file)


def test_a_silent_server_is_given_up_after_the_timeout(hub, fetch, file, part, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.stall_after = 0
    with pytest.raises(ValueError, match="can't be reached or broke off"):
        fetch(file)
    assert len(hub.contents) == 1 + len(fetching.PAUSES)


def test_an_address_where_nobody_answers_is_named_with_what_to_do(hub, fetch, file):
    hub.close()
    with pytest.raises(ValueError, match=rf"{hub.endpoint} can't be reached.*HF_ENDPOINT to a mirror"):
        fetch(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"path": "other.safetensors"},
            r"has no other.safetensors of owner/weights at revision main \(status 404 Entry",
        ),
        ({"revision": "v9"}, r"at revision v9 \(status 404 RevisionNotFound\)"),
    ],
)
def test_what_the_hub_does_not_have_is_named(fetch, file, change, message):
    with pytest.raises(ValueError, match=message):
        fetch(replace(file, **change))


def test_a_gated_file_says_where_to_agree(hub, fetch, file, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    hub.token = "hf_secret"
    with pytest.raises(
        ValueError, match=r"401 GatedRepo.*accept its terms at http://127.0.0.1:\d+/owner/weights, log in"
    ):
        fetch(file)
    assert not hub.contents


def test_the_user_s_token_opens_gated_files_and_goes_nowhere_else(hub, fetch, file, target, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_secret"
    fetch(file)
    assert target.read_bytes() == CONTENT
    assert {request.token for request in hub.contents} == {None}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


def test_the_user_s_token_stays_at_home_where_it_is_not_needed(hub, fetch, file, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(file)
    assert {request.token for request in hub.requests} == {None}


def test_the_room_is_checked_before_anything_comes(hub, fetch, file, models, monkeypatch):
    monkeypatch.setattr(on_disk, "free_bytes", lambda folder: on_disk.RESERVE_BYTES + len(CONTENT) - 1)
    with pytest.raises(ValueError, match=r"models/vae has 537 MB free, and 0 MB are to come.*choose another disk"):
        fetch(file)
    assert not hub.contents and not models.exists()
    monkeypatch.setattr(on_disk, "free_bytes", lambda folder: on_disk.RESERVE_BYTES + len(CONTENT))
    fetch(file)


def test_what_came_before_needs_no_room(hub, fetch, file, part, monkeypatch):
    stop_half_way(hub, fetch, file)
    left = len(CONTENT) - part.stat().st_size
    monkeypatch.setattr(on_disk, "free_bytes", lambda folder: on_disk.RESERVE_BYTES + left)
    fetch(file)


def test_a_folder_that_can_not_be_made_is_named(fetch, file, models):
    models.mkdir()
    (models / "vae").write_text("no folder")
    with pytest.raises(ValueError, match=r"vae.\.wanqwen can't be made \(.*\): choose folders that you may write to"):
        fetch(file)


def test_a_disk_that_fills_up_keeps_what_came(hub, fetch, file, part, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetching.os, "fsync", full)
        with pytest.raises(ValueError, match=r"disk of .*vae is full: free some of it. What has come so far"):
            fetch(file)
    assert part.stat().st_size == len(CONTENT)
    fetch(file)


def test_two_downloads_of_one_file_are_one(hub, file, models, target):
    hub.stall_after = PIECE
    lines: list[str] = []

    def run() -> None:
        [outcome] = fetching.fetch([file], layout(models), lambda progress: None, endpoint=hub.endpoint)
        lines.append(outcome.line)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not hub.contents:
        time.sleep(0.01)
    time.sleep(0.3)
    hub.release.set()
    for thread in threads:
        thread.join(10)
    assert target.read_bytes() == CONTENT and len(hub.contents) == 1
    assert len(lines) == 2 and any("by another download meanwhile" in line for line in lines)


def test_files_of_one_branch_come_from_one_commit(hub, fetch, file, models):
    other = "split_files/clip_vision/other.safetensors"
    hub.publish(SECOND, REPO, other, CONTENT[:1000])
    files = (unpinned(file), PublishedFile(repo=REPO, path=other, folder="clip_vision", size=1000))
    assert len(fetch(*files, file)) == 3
    asked = [request.path for request in hub.requests if request.method == "HEAD"]
    assert ["/main/" in path for path in asked] == [True, False, False] and f"/{SECOND}/" in asked[1]
    assert (models / "clip_vision" / "other.safetensors").read_bytes() == CONTENT[:1000]


def test_a_file_of_the_size_is_left_alone_wherever_in_the_folder_it_lies(hub, fetch, file, models):
    (models / "vae" / "wan").mkdir(parents=True)
    (models / "vae" / "wan" / "some_vae.safetensors").write_bytes(CONTENT)
    [line] = fetch(file)
    assert line == "vae/some_vae.safetensors: is there, 0 MB, known by name and size"
    assert not hub.requests


def test_a_file_of_another_size_is_neither_used_nor_overwritten(hub, fetch, file, target):
    target.parent.mkdir(parents=True)
    target.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"some_vae.safetensors has 4 bytes, and the published file 200000: .*Move it"):
        fetch(file)
    assert target.read_bytes() == b"mine" and not hub.requests


@pytest.mark.parametrize("pinned", [True, False])
def test_check_compares_what_is_there(hub, fetch, file, target, pinned):
    sha256 = file.sha256
    file = file if pinned else unpinned(file)
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    [line] = fetch(file, check=True)
    assert line.endswith("sha256 as published")
    target.write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match=rf"has sha256 [0-9a-f]{{64}}, and the published file {sha256}: it is"):
        fetch(file, check=True)
    assert not hub.contents and len(hub.requests) == (0 if pinned else 2)


def test_looking_asks_nobody_and_changes_nothing(hub, fetch, file, models, part):
    lines = [outcome.line for outcome in fetching.look([file], layout(models), lambda progress: None)]
    assert lines[0] == "vae/some_vae.safetensors: to fetch, 0 MB, from owner/weights at main, sha256 known"
    assert "to fetch in all" in lines[1] and "free at" in lines[1]
    assert not hub.requests and not models.exists()
    stop_half_way(hub, fetch, file)
    assert "of which 0 MB have come" in fetching.look([file], layout(models), lambda progress: None)[0].line


def test_an_unforeseen_error_is_not_taken_for_success(fetch, file, monkeypatch):
    def broken(*arguments: object) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(fetching.hub, "look_up", broken)
    with pytest.raises(RuntimeError, match="without a result"):
        fetch(file)
