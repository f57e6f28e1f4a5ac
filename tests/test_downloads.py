"""The hub's client against a hub that lies, breaks, drips and hangs: the right bytes, or one clear line, in time."""

import errno
import logging
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from huggingface_hub import constants

from omni_cli.downloads import (
    FileAbsentError,
    Meter,
    Patience,
    RemoteFile,
    StoppedError,
    TransferError,
    open_hub,
)
from omni_cli.errors import OmniError, UsageError
from tests.support.hub import BLOCK_BYTES, REPOSITORY, Fault, serve_hub

TOKEN = "hf_secretSECRETsecret"
BIG, SMALL, EMPTY = "camera/big.zip", "metadata/small.csv", "metadata/empty.txt"
BIG_BYTES = 300_000
HASTY = Patience(
    first_wait_s=0.01, longest_wait_s=3.0, attempts=4, questions=3, connect_s=0.6, answer_s=1.2, block_s=0.4
)
IMPATIENT = Patience(first_wait_s=0.01, attempts=2, questions=2, connect_s=0.3, answer_s=0.5, block_s=0.2)
EVER = 1_000_000
BOUND_S = 12.0


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    random = np.random.default_rng(5)
    for path, size in ((BIG, BIG_BYTES), (SMALL, 1000), (EMPTY, 0)):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(random.bytes(size))
    return root


@pytest.fixture
def server(repository, monkeypatch):
    with serve_hub(repository) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def hub(server):
    return open_hub(REPOSITORY, HASTY)


def promised(server, path):
    item = server.stored[path]
    return RemoteFile(path, item.size, item.git_sha1, item.sha256 if item.is_large else None)


def silent():
    return Meter(lambda _: None)


def fetch(hub, server, path, staging):
    """Return the content that a download of this path brings."""
    return hub.download(promised(server, path), server.commit, staging, silent()).read_bytes()


@pytest.mark.parametrize("path", [BIG, SMALL, EMPTY])
def test_a_file_comes_whole_in_one_answer_and_the_token_stays_at_the_hub(hub, server, repository, tmp_path, path):
    assert fetch(hub, server, path, tmp_path) == (repository / path).read_bytes()
    assert server.sent() == server.stored[path].size
    assert not any(entry.had_token for entry in server.asked("storage"))
    assert all(entry.had_token for entry in server.asked("hub"))
    assert len(server.asked("hub HEAD")) == (path != EMPTY)


TRANSIENT = [
    Fault("storage GET", "reset", after=100_000),
    Fault("storage GET", "fin", after=100_000),
    Fault("storage GET", "stall", after=100_000, seconds=9),
    Fault("storage GET", "drip", after=100_000, seconds=0.1),
    Fault("storage GET", "refuse"),
    Fault("storage GET", "silent", seconds=9),
    Fault("storage GET", "trickle", seconds=0.1),
    Fault("storage GET", "html"),
    Fault("storage GET", "loop"),
    Fault("storage GET", "short"),
    Fault("storage GET", "long"),
    Fault("storage GET", "no-length"),
    Fault("storage GET", "other-range"),
    Fault("storage GET", "whole"),
    Fault("storage GET", "flip", after=150_000),
    *(Fault("storage GET", "status", status=status) for status in (400, 403, 410, 416, 429, 500, 502, 503, 504)),
    Fault("hub HEAD", "refuse"),
    Fault("hub HEAD", "silent", seconds=9),
    Fault("hub HEAD", "trickle", seconds=0.1),
    Fault("hub HEAD", "html"),
    *(Fault("hub HEAD", "status", status=status) for status in (429, 500, 503)),
]


def fault_id(fault):
    return f"{fault.match}-{fault.kind}-{fault.status}".replace(" ", "-")


@pytest.mark.fault("F7", "F8")
@pytest.mark.parametrize("fault", TRANSIENT, ids=fault_id)
def test_what_may_pass_is_tried_again_from_where_it_broke(hub, server, repository, tmp_path, fault):
    server.faults.append(Fault(**{**vars(fault)}))
    assert fetch(hub, server, BIG, tmp_path) == (repository / BIG).read_bytes()
    assert server.faults[0].times == 0
    is_refused = fault.kind in ("flip", "long", "short", "other-range")  # as a whole, when much of it was on its way
    assert server.sent() <= (1 + is_refused) * BIG_BYTES + 4 * BLOCK_BYTES


PERMANENT = {
    "refuse": r"cannot reach .* \((ReadError|RemoteProtocolError)\)",
    "silent": r"cannot reach .* \((ReadTimeout|too slow)\)",
    "trickle": r"cannot reach .* \(too slow\)",
    "loop": "does not answer like a hub|too slow",
    "status": "answers 503; run the same command again",
}


ASKED = {"revision": "hub GET /api", "paths-info": r"hub \w+ .*paths-info", "HEAD": "hub HEAD", "GET": "storage GET"}
HOPELESS = [
    (kind, asked)
    for kind in (*PERMANENT, "html", "json", "drip")
    for asked in ASKED
    if (kind, asked) not in {("json", "HEAD"), ("json", "GET"), ("drip", "HEAD")}  # they have no document, or no body
]


@pytest.mark.fault("F8")
@pytest.mark.parametrize(("kind", "asked"), HOPELESS)
def test_what_does_not_pass_is_one_clear_line_in_time(server, tmp_path, kind, asked):
    hub = open_hub(REPOSITORY, IMPATIENT)
    seconds = 9 if kind == "silent" else 0.1
    server.faults.append(Fault(ASKED[asked], kind, status=503, times=EVER, seconds=seconds))
    asks = {
        "revision": lambda: hub.resolve_revision(None),
        "paths-info": lambda: hub.list_files([BIG], server.commit),
    }
    started = time.monotonic()
    with pytest.raises(OmniError) as error:
        asks.get(asked, lambda: fetch(hub, server, BIG, tmp_path))()
    assert time.monotonic() - started < BOUND_S
    expected = {**PERMANENT, "html": "a web page|not answer like a hub", "json": "like a hub", "drip": "too slow"}
    error.match(expected[kind])
    assert_no_secret(str(error.value))


def assert_no_secret(text):
    assert TOKEN not in text
    assert "signature" not in text
    assert "secret" not in text
    assert "\n" not in text


@pytest.mark.fault("F8")
@pytest.mark.parametrize("kind", ["short", "other-range", "stall"])
def test_content_that_is_never_right_ends_in_time(server, tmp_path, kind):
    server.faults += [Fault("storage GET", "reset", after=1000), Fault("storage GET", kind, times=EVER, seconds=9)]
    started = time.monotonic()
    with pytest.raises(OmniError, match=r"another range|cannot reach|another length"):
        fetch(open_hub(REPOSITORY, IMPATIENT), server, BIG, tmp_path)
    assert time.monotonic() - started < BOUND_S


@pytest.mark.fault("F8")
def test_a_server_that_neither_continues_nor_finishes_is_given_up(hub, server, tmp_path):
    """Ranges are ignored, and no answer gets further than the first one did: that is no progress."""
    server.ignores_ranges = True
    server.faults.append(Fault("storage GET", "reset", after=90_000, times=EVER))
    with pytest.raises(OmniError, match=r"cannot reach .* \(Re(ad|moteProtocol)Error\)"):
        fetch(hub, server, BIG, tmp_path)
    assert len(server.asked("storage GET")) == HASTY.attempts


@pytest.mark.fault("F8")
def test_a_line_that_breaks_again_and_again_still_gets_there(hub, server, repository, tmp_path):
    server.faults.append(Fault("storage GET", "reset", after=20_000, times=EVER))
    assert fetch(hub, server, BIG, tmp_path) == (repository / BIG).read_bytes()
    assert len(server.asked("storage GET")) > 3 * HASTY.attempts
    assert len(server.asked("hub HEAD")) == 1
    assert server.sent() < 1.1 * BIG_BYTES


@pytest.mark.fault("F8")
def test_a_name_that_does_not_resolve_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid:1")
    with pytest.raises(OmniError, match=r"cannot reach nowhere\.invalid:1 \(ConnectError\) for .*; check the network"):
        open_hub(REPOSITORY, HASTY).resolve_revision(None)


@pytest.mark.fault("F8")
@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"RateLimit": '"resolvers";r=0;t=0'}])
def test_a_rate_limit_is_waited_for_as_long_as_it_says(hub, server, tmp_path, headers):
    server.faults.append(Fault("hub HEAD", "status", status=429, headers=headers))
    started = time.monotonic()
    fetch(hub, server, BIG, tmp_path)
    assert 1.0 <= time.monotonic() - started < BOUND_S
    server.faults.append(Fault("hub HEAD", "status", status=429, headers={"RateLimit": '"resolvers";r=0;t=55'}))
    with pytest.raises(TransferError, match=r"limits the rate \(429\); run again in 56 s, or with --workers 2"):
        fetch(hub, server, BIG, tmp_path / "other")
    assert len(server.asked("hub HEAD")) == 3


@pytest.mark.fault("F8")
def test_an_address_is_signed_again_when_it_has_expired(hub, server, repository, tmp_path):
    server.signed_s, server.bytes_per_second = 0.2, 400_000
    server.faults.append(Fault("storage GET", "reset", after=200_000))
    assert fetch(hub, server, BIG, tmp_path) == (repository / BIG).read_bytes()
    assert [entry.status for entry in server.asked("storage GET")] == [206, 403, 206]
    server.signed_s = -1.0
    with pytest.raises(TransferError, match=r"the storage refuses every address .*check this machine's clock"):
        fetch(hub, server, BIG, tmp_path / "other")


@pytest.mark.fault("F7")
@pytest.mark.parametrize("path", [BIG, SMALL])
def test_wrong_content_is_fetched_three_times_and_then_named(hub, server, repository, tmp_path, path):
    match = "GET.*small" if path == SMALL else "storage GET"
    server.faults.append(Fault(match, "flip", after=500, times=2))
    assert fetch(hub, server, path, tmp_path) == (repository / path).read_bytes()
    server.faults.append(Fault(match, "flip", after=500, times=EVER))
    server.log.clear()
    with pytest.raises(TransferError, match=rf"{path}: its content differs from the hub's hash, 3 times over"):
        fetch(hub, server, path, tmp_path / "other")
    assert server.sent() == 3 * server.stored[path].size
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.fault("F1", "F12")
def test_what_a_killed_run_left_is_continued_and_never_a_wrong_file(hub, server, repository, tmp_path):
    content, file = (repository / BIG).read_bytes(), promised(server, BIG)
    write = [sys.executable, "-c", "from omni_cli import files; print(files.writer_mark())"]
    dead = [subprocess.run(write, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]
    left = {
        f"{file.sha256}.{dead[0]}.part": content[:100_000],
        f"{file.sha256}.{dead[1]}.part": content[:200_000],
        f"{file.sha256}.another-7.8-host.part": content + b"more than there can be",
        f"{'0' * 64}.{dead[0]}.part": b"of another file",
    }
    for name, part in left.items():
        (tmp_path / name).write_bytes(part)
        os.utime(tmp_path / name, (2e9, 2e9))  # a clock that jumped
    assert fetch(hub, server, BIG, tmp_path) == content
    assert server.sent() == BIG_BYTES - 200_000
    kept = {path.name for path in tmp_path.iterdir()}.intersection(left)
    assert kept == {f"{file.sha256}.another-7.8-host.part", f"{'0' * 64}.{dead[0]}.part"}


@pytest.mark.fault("F5")
def test_a_partial_with_a_wrong_byte_is_thrown_away(hub, server, repository, tmp_path):
    content, file = (repository / BIG).read_bytes(), promised(server, BIG)
    (tmp_path / f"{file.sha256}.1-a.part").write_bytes(bytes(200_000))
    assert fetch(hub, server, BIG, tmp_path) == content
    assert server.sent() == 2 * BIG_BYTES - 200_000


@pytest.mark.fault("F3", "F4")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_the_disk_refuses_is_not_tried_again_and_the_partial_stays(hub, server, tmp_path, monkeypatch, code):
    def refuse(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OmniError, match=rf"{BIG}: {os.strerror(code).lower()}; ") as error:
        fetch(hub, server, BIG, tmp_path)
    assert not isinstance(error.value, TransferError)
    assert len(server.asked("storage GET")) == 1
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [BIG_BYTES]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_the_hub_is_not_tried_again(hub, server, tmp_path, status):
    server.faults.append(Fault("hub HEAD", "status", status=status, times=EVER))
    with pytest.raises(OmniError, match=rf"answers {status}"):
        fetch(hub, server, BIG, tmp_path)
    assert len(server.asked("hub HEAD")) == 1


def test_each_refusal_says_its_own_remedy(hub, server, tmp_path, monkeypatch):
    def line():
        with pytest.raises(OmniError) as error:
            fetch(hub, server, BIG, tmp_path)
        assert_no_secret(str(error.value))
        return str(error.value)

    lines = {}
    server.token = "another"
    lines["the token was refused, it is expired, revoked or mistyped; make a new one at"] = line()
    server.token, server.accepted = TOKEN, False
    lines["this account has not accepted the dataset's terms; accept them at"] = line()
    for said, told in {
        "Your request to access dataset X has been rejected by the repo's authors.": "took this account's access back",
        "Your request to access dataset X is awaiting a review from the repo authors.": "not yet answered",
        "Please enable access to public gated repositories in your fine-grained token settings": "token may not read",
        "Access to this resource is disabled.": "the repository was disabled",
    }.items():
        server.denial = said
        lines[told] = line()
    server.faults.append(Fault("hub HEAD", "status", status=404, headers={"X-Error-Code": "RepoNotFound"}))
    lines["has no dataset nvidia/PhysicalAI-Autonomous-Vehicles that this account may see; check"] = line()
    server.faults.append(Fault("hub HEAD", "status", status=404, headers={"X-Error-Code": "RevisionNotFound"}))
    lines["has no such revision; give a branch, tag or commit with --revision"] = line()
    server.faults.append(Fault("hub HEAD", "status", status=429, times=EVER))
    lines["limits the rate (429); run again in five minutes, or with --workers 2"] = line()
    server.faults.clear()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    lines["no token was found; accept the terms at"] = line()
    assert all(told in said for told, said in lines.items()), lines
    assert len(set(lines.values())) == len(lines) == 10


@pytest.mark.fault("F9")
def test_a_file_that_was_pruned_and_a_commit_that_is_gone_are_told_apart(hub, server, tmp_path):
    server.pruned.add(BIG)
    with pytest.raises(FileAbsentError, match=f"{BIG}: not in {REPOSITORY} at this commit"):
        fetch(hub, server, BIG, tmp_path)
    with pytest.raises(UsageError, match="has no such revision"):
        hub.list_files([BIG], "b" * 40)
    assert hub.list_files([BIG, "camera/none.zip"], server.commit) == {BIG: promised(server, BIG)}
    assert hub.resolve_revision("c" * 40) == "c" * 40
    assert not server.asked("hub GET /api")


@pytest.mark.parametrize("fault", [None, *(fault for fault in TRANSIENT if fault.kind not in ("flip", "whole"))])
def test_a_range_is_exactly_what_was_asked_for(hub, server, repository, fault):
    if fault is not None:
        server.faults.append(Fault(**{**vars(fault)}))
    content, file = (repository / BIG).read_bytes(), promised(server, BIG)
    assert hub.read_range(file, server.commit, 70_000, 200_000, silent()) == content[70_000:270_000]
    assert hub.read_range(file, server.commit, 5, 1, silent()) == content[5:6]
    assert hub.read_range(file, server.commit, 0, 0, silent()) == b""
    if fault is None:
        assert [entry.range for entry in server.asked("storage")] == ["bytes=70000-269999", "bytes=5-5"]
        assert len(server.asked("hub HEAD")) == 1


def test_a_server_that_ignores_ranges_gives_no_range(hub, server):
    server.faults.append(Fault("storage", "whole", times=EVER))
    with pytest.raises(TransferError, match="the server ignores ranges; check"):
        hub.read_range(promised(server, BIG), server.commit, 0, 1000, silent())


@pytest.mark.fault("F31")
def test_offline_nothing_is_asked(hub, server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (
        lambda: hub.resolve_revision(None),
        lambda: hub.list_files([BIG], server.commit),
        lambda: fetch(hub, server, BIG, tmp_path),
        lambda: hub.read_range(promised(server, BIG), server.commit, 0, 9, silent()),
    ):
        with pytest.raises(OmniError, match=r"HF_HUB_OFFLINE is set and .* is not here: unset it, or import"):
            ask()
    assert not server.log


def test_no_signed_address_and_no_token_is_logged(hub, server, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    server.faults += [Fault("storage", "status", status=503), Fault("storage", "reset", after=1000)]
    fetch(hub, server, BIG, tmp_path)
    assert "signature" not in caplog.text
    assert TOKEN not in caplog.text
    assert "signature" not in repr(hub)


@pytest.mark.parametrize("fault", [Fault("storage", "stall", seconds=30), Fault("hub HEAD", "silent", seconds=30)])
def test_a_stop_is_heard_while_a_server_is_silent(server, tmp_path, fault):
    server.faults.append(fault)
    hub, meter = open_hub(REPOSITORY, Patience(block_s=30, answer_s=30, connect_s=30)), silent()
    threading.Timer(0.5, meter.stop).start()
    started = time.monotonic()
    with pytest.raises(StoppedError):
        hub.download(promised(server, BIG), server.commit, tmp_path, meter)
    assert time.monotonic() - started < 3.0
