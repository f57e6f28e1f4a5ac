"""Answers that a hub, a storage or a proxy on the way should not give: each is refused or mended, and none is kept."""

import time
from email.utils import formatdate

import numpy as np
import pytest

from omni_cli.downloads import Meter, Patience, RemoteFile, TransferError, open_hub
from omni_cli.downloads.retries import asked_pause_s
from tests.support.hub import REPOSITORY, Fault, serve_hub

PATH, SIZE = "camera/big.zip", 300_000
HASTY = Patience(first_wait_s=0.01, longest_wait_s=5.0, attempts=4, questions=3, answer_s=3.0, block_s=1.0)
EVER = 1_000_000
START, COUNT = 10_000, 200_000  # of a range


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(5).bytes(SIZE)


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    (tmp_path / "repository" / "camera").mkdir(parents=True)
    (tmp_path / "repository" / PATH).write_bytes(content)
    with serve_hub(tmp_path / "repository") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def promised(server):
    item = server.stored[PATH]
    return RemoteFile(PATH, item.size, item.git_sha1, item.sha256)


def whole(server, folder):
    hub = open_hub(REPOSITORY, HASTY)
    return hub.download(promised(server), server.commit, folder, Meter(lambda _: None)).read_bytes()


def in_memory(server, _):
    hub = open_hub(REPOSITORY, HASTY)
    return hub.read_range(promised(server), server.commit, START, COUNT, Meter(lambda _: None))


def on_disk(server, folder):
    folder.mkdir(exist_ok=True)
    hub, path = open_hub(REPOSITORY, HASTY), folder / "a.part"
    hub.append_range(promised(server), server.commit, START, COUNT, path, meter=Meter(lambda _: None))
    return path.read_bytes()


WAYS = (whole, in_memory, on_disk)


def expected(way, content):
    return content if way is whole else content[START : START + COUNT]


@pytest.mark.fault("F7", "F8")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["surplus", "overlong", "other-total", "gzip", "short", "long", "other-range", "html"])
def test_what_differs_from_what_was_asked_for_is_mended_by_asking_again(server, content, tmp_path, way, kind):
    server.faults += [Fault("storage GET", "reset", after=90_000), Fault("storage GET", kind)]
    assert way(server, tmp_path / "staging") == expected(way, content)
    assert [fault.times for fault in server.faults] == [0, 0]
    if kind in ("html", "gzip", "other-total", "other-range"):  # known by their head: what is here stays
        ranges = [entry.range for entry in server.asked("storage GET")]
        assert ranges[-1] == ranges[-2] != ranges[0]


@pytest.mark.fault("F7", "F8")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("overlong", "more bytes came than the hub promises"),
        ("other-total", "another range came than was asked for"),
        ("gzip", "an answer 206 of another kind came; check HF_ENDPOINT and your proxy"),
        ("html", "a web page came instead of data; check HF_ENDPOINT and your proxy"),
        ("short", "an answer of another length came"),
        ("other-range", "another range came than was asked for"),
    ],
)
def test_what_always_differs_is_refused_in_one_line(server, tmp_path, way, kind, message):
    server.faults.append(Fault("storage GET", kind, times=EVER))
    with pytest.raises(TransferError, match=message):
        way(server, tmp_path / "staging")
    wanted = expected(way, server.stored[PATH].place.read_bytes())
    assert all(wanted.startswith(path.read_bytes()) for path in tmp_path.glob("staging/*"))


@pytest.mark.fault("F7", "F8")
def test_bytes_after_an_answer_are_none_of_the_next_one(server, content, tmp_path):
    server.faults.append(Fault("storage GET", "surplus", times=EVER))
    for number in range(3):  # one client, whose connections are used again
        assert whole(server, tmp_path / str(number)) == content


@pytest.mark.fault("F7", "F9")
@pytest.mark.parametrize("kind", ["other-file", "page"])
def test_a_file_that_changes_under_a_download_is_not_put_together_of_two(server, content, tmp_path, kind):
    broken = Fault("storage GET", "reset", after=90_000)
    server.faults += [broken, Fault("storage GET", kind)]
    assert whole(server, tmp_path / "staging") == content
    server.faults += [Fault(**{**vars(broken), "times": 1}), Fault("storage GET", kind, times=EVER)]
    with pytest.raises(TransferError, match=r"its content differs from the hub's hash, 3 times over; run again"):
        whole(server, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


LIMITED = {
    "the hub's own": {
        "RateLimit": '"resolvers";r=0;t=0',
        "RateLimit-Policy": '"fixed window";"resolvers";q=5000;w=300',
    },
    "seconds": {"Retry-After": "1"},
}
ASKED = {"revision": "hub GET /api", "paths-info": r"hub \w+ .*paths-info", "HEAD": "hub HEAD", "GET": "storage GET"}


@pytest.mark.fault("F8")
@pytest.mark.parametrize("headers", LIMITED)
@pytest.mark.parametrize("asked", ASKED)
def test_whoever_limits_the_rate_is_waited_for(server, content, tmp_path, headers, asked):
    server.faults.append(Fault(ASKED[asked], "status", status=429, headers=LIMITED[headers]))
    hub, started = open_hub(REPOSITORY, HASTY), time.monotonic()
    if asked == "revision":
        assert hub.resolve_revision(None) == server.commit
    elif asked == "paths-info":
        assert list(hub.list_files([PATH], server.commit)) == [PATH]
    else:
        assert whole(server, tmp_path / "staging") == content
    assert 1.0 <= time.monotonic() - started < 8
    assert server.faults[0].times == 0


@pytest.mark.fault("F8", "F12")
@pytest.mark.parametrize("status", [429, 503])
def test_a_date_to_come_back_at_is_read_by_the_servers_own_clock(server, content, tmp_path, status):
    at_s = 784_111_777  # in 1994
    headers = {"Date": formatdate(at_s, usegmt=True), "Retry-After": formatdate(at_s + 2, usegmt=True)}
    server.faults.append(Fault("hub HEAD", "status", status=status, headers=headers))
    started = time.monotonic()
    assert whole(server, tmp_path / "staging") == content
    assert 2.0 <= time.monotonic() - started < 8
    assert server.faults[0].times == 0
    headers = {**headers, "Retry-After": formatdate(at_s + 77, usegmt=True)}
    server.faults.append(Fault("hub HEAD", "status", status=429, headers=headers, times=EVER))
    with pytest.raises(TransferError, match=r"limits the rate \(429\); run again in 77 s, or with --workers 2"):
        whole(server, tmp_path / "other")
    assert len(server.asked("hub HEAD")) == 3  # it was not asked again


def refusal(**headers):
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    response = httpx2.Response(429, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response.request = httpx2.Request("GET", "http://hub.invalid")
    return HfHubHTTPError("limited", response=response)


@pytest.mark.fault("F8", "F12")
@pytest.mark.parametrize(
    ("headers", "pause_s"),
    [
        ({"Retry_After": "Sun, 06 Nov 1994 08:49:37 GMT", "Date": "Sun, 06 Nov 1994 08:49:07 GMT"}, 30),
        ({"Retry_After": "Sunday, 06-Nov-94 08:49:37 GMT", "Date": "Sun, 06 Nov 1994 08:49:07 GMT"}, 30),
        ({"Retry_After": "Sun Nov  6 08:49:37 1994", "Date": "Sun, 06 Nov 1994 08:49:07 GMT"}, 30),
        ({"Retry_After": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0),  # it is over, by this machine's clock
        ({"Retry_After": "Sun, 06 Nov 1994 08:49:37 GMT", "Date": "Sun, 06 Nov 1994 09:49:07 GMT"}, 0),
        ({"Retry_After": "Sun, 06 Nov 99999999999 08:49:37 GMT"}, 0),
        ({"Retry_After": "Fri, 31 Dec 9999 23:59:59 GMT"}, 86_400),
        ({"Retry_After": "soon"}, 0),
        ({"Retry_After": "9" * 500}, 86_400),
        ({"RateLimit": f'"api";r=0;t={"9" * 400}'}, 86_401),
        ({"RateLimit": '"api";r=3;t=55', "Retry_After": "7"}, 7),
    ],
)
def test_what_a_refusal_asks_for(headers, pause_s):
    assert asked_pause_s(refusal(**headers)) == pause_s
