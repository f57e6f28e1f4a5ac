"""Live cameras: the windows of a stream are those of a file, whatever the model's pace, and nothing is invented."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omni_cli import files
from omni_cli.__main__ import run as omni
from omni_cli.errors import DataError, OmniError, Preempted, UsageError
from omni_cli.formats.live_video import DAMAGED, LiveFrame, StreamLostError, check_there, live_address, live_frames
from omni_cli.formats.video import decode, probe
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmSample
from omni_cli.report import Console
from omni_cli.samples import views
from omni_cli.samples.live_windows import BEHIND, LiveWindows, Shot
from omni_cli.samples.sync import STALE_FRAME, plan_windows
from omni_cli.sources.video_file import video_recording
from omni_cli.stages import live
from omni_cli.stages.infer import InferRequest, infer, subject_of_base
from omni_cli.stages.live import Limits, ask, feed
from omni_cli.stages.live.feed import CLOCK_SET, EARLIER, RECONNECTED, TOO_SLOW, Feed, Reading
from omni_cli.stages.live.lines import Lines
from tests.support.live import encoded, over_http, over_rtsp, pictures, served

QUIET = Console(quiet=True)
FRONT = "camera_front_wide_120fov"
PERIOD_US, TOLERANCE_US = 100_000, 100_000
PATIENT = Limits(patience_s=20.0)


def tiny(**changes) -> Vlm:
    sample = VlmSample(cameras="1-cam", window=4, stride=2, rate_hz=10.0, canvas_px=112, labels="speed")
    return Vlm(**{"model": "tiny:qwen2_5_vl", "precision": "float32", "sample": sample, **changes})


def regular(count: int) -> list[float]:
    return [k / 20 for k in range(count)]


@pytest.fixture(scope="module")
def video() -> bytes:
    return encoded(pictures(40), regular(40))


def halved(width: int, height: int) -> tuple[int, int]:
    return width // 2, height // 2


def shown(content: bytes, count: int) -> dict[int, np.ndarray]:
    """The pictures of a file by their times, in microseconds since its first, as `formats.video` decodes them."""
    times = probe(content, "file").pts_us
    decoded = decode(content, "file", range(count), width_px=48, height_px=27)
    return {int(times[index] - times[0]): picture for index, picture in decoded}


def received(url: str, patience_s: float = 20.0) -> tuple[list[LiveFrame], Counter]:
    counted: Counter[str] = Counter()
    return list(live_frames(live_address(url), halved, patience_s=patience_s, counted=counted)), counted


def ask_live(out, url: str, recipe: Vlm | None = None, *, limits: Limits = PATIENT, **changes):
    recipe = recipe or tiny()
    return ask(recipe, subject_of_base(recipe), InferRequest((url,), out=out, **changes), limits, QUIET)


def lines_in(folder) -> list[dict]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- frames


def test_frames_over_http_are_those_of_the_file_bit_for_bit(video):
    with served(over_http([video])) as port:
        frames, counted = received(f"http://127.0.0.1:{port}/front.ts")
    expected = shown(video, 40)
    assert {one.pts_us - frames[0].pts_us for one in frames} == set(expected)
    for one in frames:
        np.testing.assert_array_equal(one.picture(), expected[one.pts_us - frames[0].pts_us])
    assert not counted


def test_frames_over_rtsp_come_with_the_password_of_the_url(video):
    with served(over_rtsp(video, password="geheim")) as port:
        frames, counted = received(f"rtsp://user:geheim@127.0.0.1:{port}/cam/1")
        with pytest.raises(OmniError, match=rf"^rtsp://127\.0\.0\.1:{port} \(\w{{6}}\): cannot be opened") as refused:
            received(f"rtsp://user:falsch@127.0.0.1:{port}/cam/1?token=falsch")
    assert "falsch" not in str(refused.value)
    expected = shown(video, 40)
    assert len(frames) == 39  # FFmpeg knows no time of the first
    assert counted == {"frames without a time": 1}
    for one in frames:
        np.testing.assert_array_equal(one.picture(), expected[one.pts_us - frames[0].pts_us + 50_000])


def test_no_damaged_picture_is_ever_shown(video):
    hurt = bytearray(video)
    places = [at for at in range(0, len(video), 188) if at % 5 == 0 and len(video) // 4 < at < len(video) // 3]
    for at in places[:3]:
        hurt[at + 30 : at + 180] = bytes(150)
    with served(over_http([bytes(hurt)])) as port:
        frames, counted = received(f"http://127.0.0.1:{port}/")
    expected = shown(video, 40)
    assert counted[DAMAGED] > 0
    assert 20 < len(frames) < 40
    for one in frames:
        np.testing.assert_array_equal(one.picture(), expected[one.pts_us - frames[0].pts_us])


def test_only_what_is_no_secret_of_an_address_is_shown():
    for url, title in (
        ("rtsp://user:pass@host:554/stream1?token=pass", "rtsp://host:554 (#)"),
        ("RTSP://user:p@ss@Host/stream1#pass", "rtsp://host (#)"),
        ("rtsp://user:pass@host:8554/", "rtsp://host:8554"),
        ("rtsp://user:pass@host", "rtsp://host"),
        ("rtsp://host:554/x?token=a@pass", "rtsp://host (#)"),
        ("http://user:pass@host:80?token=a@pass", "http://host:80 (#)"),
        ("rtsp://user:1/2@pass", "rtsp://user (#)"),
        ("rtsps://[::1]:7441/pass", "rtsps://[::1]:7441 (#)"),
        ("rtmp://host/live/pass", "rtmp://host (#)"),
        ("http://host:80/live/user/pass/1.ts", "http://host:80 (#)"),
        ("rtsp://host/user=admin&password=pass&channel=1", "rtsp://host (#)"),
        ("udp://@239.0.0.1:1234", "udp://239.0.0.1:1234"),
        ("tcp://:1234", "tcp://:1234"),
    ):
        address = live_address(url)
        assert re.sub(r"\(\w{6}\)", "(#)", address.title) == title
        assert "pass" not in f"{address} {address!r} {address.title}"
    titles = {live_address(f"rtsp://user:pass@host/cam?channel={channel}").title for channel in range(10)}
    assert len(titles) == 10
    assert live_address("/dev/video0").title == "/dev/video0"
    assert live_address("clip.mp4") is None
    with pytest.raises(UsageError, match=r"^gopher://: no such live stream; expected one of rtsp, ") as refused:
        live_address("gopher://user:pass@host/x")
    assert "pass" not in str(refused.value)
    with pytest.raises(UsageError, match="rtsp: such a URL begins with ://"):
        live_address("rtsp:/user:pass@host")
    with pytest.raises(UsageError, match=r"^such a URL begins with SCHEME://") as refused:
        live_address("rtsp//user:pass@host/x?next=http://host")
    assert "pass" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://user:geheim@a..b/x",
        f"rtsp://user:geheim@{'a' * 64}.de/x",
        "http://user:geheim@host:99999/x",
        "http://user:geheim@host:0/x",
        "rtsp://user:geh/eim@host/x",
        "rtsp://user:geheim@h%20x/a",
        "rtsp://geheim@[::1/x",
        "http://@/geheim",
        "rtsp://:554/geheim",
    ],
)
def test_a_url_without_a_host_that_can_be_is_refused_at_once_and_not_shown(url, tmp_path):
    with pytest.raises(
        UsageError, match=r"^(rtsp|http)://: such a URL needs a host, and a port up to 65535"
    ) as refused:
        ask_live(tmp_path, url)
    assert "geh" not in str(refused.value)
    assert "eim" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--camera", "rtsp://user:geheim@127.0.0.1/x?channel=1"],
        ["--camera", "rtsp://user:geheim=@127.0.0.1/x"],
        ["--camera", "rtsp//user:geheim@127.0.0.1/x"],
        ["--camera", "rtsp//user:geheim@127.0.0.1/x?channel=1"],
        ["--camera", f"{FRONT}=rtsp//user:geheim@127.0.0.1/x"],
        ["rtsp//user:geheim@127.0.0.1/x"],
        ["rtsp//user:geheim@127.0.0.1/x", "--tiled"],
        ["rtsp//user:geheim@127.0.0.1/x?next=http://geheim"],
    ],
)
def test_a_mistyped_url_is_not_shown(words, tmp_path, capsys):
    base = ["--profile", "cpu-tiny", "--set", f"sample.cameras={FRONT}", "--set", "sample.labels=speed"]
    assert omni(["infer", *words, *base, "--out", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1
    assert "geheim" not in captured.out + captured.err


def test_a_stream_joined_long_before_a_keyframe_is_one_line():
    content = encoded(pictures(60), regular(60), gop=1000)
    packets = [content[at : at + 188] for at in range(0, len(content), 188)]
    tables = [one for one in packets[:20] if int.from_bytes(one[1:3], "big") & 0x1FFF in (0, 0x11, 0x1000)]
    with (
        served(over_http([b"".join(tables + packets[len(packets) // 2 :])])) as port,
        pytest.raises(DataError, match=rf"^http://127\.0\.0\.1:{port}: sent no keyframe for long"),
    ):
        received(f"http://127.0.0.1:{port}/")


# -- windows


@pytest.mark.parametrize("cameras", [1, 3])
def test_live_windows_are_those_that_are_planned_of_a_recording(cameras):
    """By brute force: frames come in the order of their times, with stalls, at 30, 17 and 8 Hz."""
    random = np.random.default_rng(cameras)
    seen = Counter()
    for stride in (1, 3, 6):
        times = {}
        for number, rate in zip(range(cameras), (30, 17, 8), strict=False):
            steps = random.integers(0.5e6 / rate, 1.5e6 / rate, 200)
            steps[random.integers(50, 150)] += 700_000 if rate != 8 else 0
            times[str(number)] = np.cumsum(steps) - steps[0]
        settings = {"rate_hz": 10.0, "num_frames": 4, "stride": stride, "max_age_us": 130_000}
        plan = plan_windows(times, None, **settings)
        live = LiveWindows(cameras, **settings)
        coming = sorted(
            (time_us, int(name), at) for name, of in times.items() for at, time_us in enumerate(of.tolist())
        )
        made = [w for time_us, name, at in coming for w in live.accept(name, _shot(at, time_us))]
        assert len(made) == len(plan.windows) > 5
        assert live.dropped == plan.dropped
        seen.update(live.dropped)
        for one, planned in zip(made, plan.windows, strict=True):
            np.testing.assert_array_equal(one.planned.instants_us, planned.instants_us)
            np.testing.assert_array_equal(one.planned.frame_index, planned.frame_index)
            np.testing.assert_array_equal(one.planned.timestamp_us, planned.timestamp_us)
            np.testing.assert_array_equal(one.pictures[..., 0, 0, 0], planned.frame_index % 256)
    assert seen[STALE_FRAME] > 0


def _shot(number: int, time_us: int) -> Shot:
    return Shot(number, time_us, lambda: np.full((1, 2, 2, 3), number % 256, np.uint8))


def test_a_camera_that_falls_behind_costs_windows_and_no_memory():
    live = LiveWindows(2, 10.0, 4, 2, TOLERANCE_US)
    for k in range(400):
        assert live.accept(0, _shot(k, k * 50_000)) == []
    assert len(live._tracks[0].slots) == live.room == 14
    made = [window for k in range(400) for window in live.accept(1, _shot(k, k * 50_000))]
    assert live.dropped[BEHIND] > 80
    assert [window.planned.end_us for window in made] == [18_900_000 + 200_000 * k for k in range(6)]


def test_nothing_reaches_over_a_lost_connection():
    live = LiveWindows(1, 10.0, 4, 1, TOLERANCE_US)
    made = [window for k in range(20) for window in live.accept(0, _shot(k, k * 50_000))]
    live.break_off(0)
    made += [window for k in range(20, 60) for window in live.accept(0, _shot(k, k * 50_000))]
    assert made
    for window in made:
        frames = window.planned.frame_index
        assert frames.max() < 20 or frames.min() >= 20
    assert live.dropped[STALE_FRAME] > 0


def a_feed(cameras: int = 1, *, waiting: int = 100, stride: int = 2, urls=(), reconnects: int = 0) -> Feed:
    addresses = [live_address(url) for url in urls] or [live_address(f"rtsp://host/{k}") for k in range(cameras)]
    reading = Reading(addresses, halved, lambda picture: picture[None], 20.0, reconnects, waiting)
    return Feed(reading, LiveWindows(len(addresses), 10.0, 4, stride, TOLERANCE_US), QUIET)


def frame(pts_us: int, arrived_us: int) -> LiveFrame:
    return LiveFrame(pts_us, arrived_us, lambda: np.zeros((2, 2, 3), np.uint8))


def test_the_clocks_of_several_cameras_are_told_by_their_shortest_delays():
    """Two cameras whose streams begin at other ticks; each delays by 30 ms and a little more, at first by much more."""
    random, both = np.random.default_rng(0), a_feed(2)
    zero_us, truth = (5_000_000, 77_000_000_000), (0, 20_000)  # ticks at the true time 0; when the first frame is taken
    coming = []
    for camera in (0, 1):
        for k in range(80):
            taken = truth[camera] + k * 50_000
            late = 30_000 + (0 if k % 4 == 0 else int(random.integers(0, 40_000))) + max(0, 600_000 - k * 50_000)
            coming.append((taken + late, camera, zero_us[camera] + taken))
    for arrived, camera, pts in sorted(coming):
        both.accept(camera, frame(pts, arrived))
    ready = both.take(None)
    assert len(ready) > 8
    for one in ready:
        seen, instants = one.window.planned.timestamp_us, one.window.planned.instants_us
        origin_us = one.ended_us - one.window.planned.end_us
        true = seen + origin_us - 30_000
        assert set((true[:, 0] % 50_000).tolist()) == {0}
        assert set((true[:, 1] % 50_000).tolist()) == {20_000}
        assert (np.diff(true, axis=0) == 100_000).all()
        assert ((instants[:, None] - seen >= 0) & (instants[:, None] - seen < 50_000)).all()
        assert one.taken_us == seen[-1].max() + origin_us
    assert both.troubles == {}


def test_a_clock_that_runs_away_is_set_again_before_it_is_far_off():
    both = a_feed(2, waiting=1000)
    for k in range(4000):  # 200 s, in which the second camera's clock loses 1 ms a second
        both.accept(0, frame(k * 50_000, 1_000_000 + k * 50_000))
        both.accept(1, frame(round(k * 50_000 * 0.999), 1_000_000 + k * 50_000))
    ready = both.take(None)
    assert 2 <= both.troubles[CLOCK_SET] <= 4
    assert len(ready) > 900
    for one in ready:
        planned = one.window.planned
        true_us = 1_000_000 + planned.frame_index * 50_000
        assert np.abs(planned.timestamp_us - planned.end_us + one.ended_us - true_us).max() < 130_000


def test_of_one_camera_a_clock_that_runs_away_is_no_latency():
    """400 s, in which it loses 1 ms a second: of that no more is taken for delay than two intervals of it."""
    one = a_feed(waiting=2000)
    for k in range(8000):
        one.accept(0, frame(round(k * 50_000 * 0.999), 1_000_000 + k * 50_000))
    ready = one.take(None)
    assert len(ready) > 1900
    for window in ready:
        planned = window.window.planned
        arrived_us = 1_000_000 + int(planned.frame_index[-1, 0]) * 50_000
        assert 0 <= arrived_us - window.taken_us <= 21_000
    assert one.troubles == {}


def test_no_window_of_a_burst_ends_before_it_came():
    """A server first gives the 2 s that it held back, then plays live."""
    one, late_us = a_feed(stride=1), 30_000
    for k in range(80):
        one.accept(0, frame(k * 50_000, max(40, k) * 50_000 + late_us))
    ready = one.take(None)
    for window in ready:
        newest = int(window.window.planned.frame_index[-1, 0])
        assert window.taken_us <= max(40, newest) * 50_000 + late_us
        assert window.ended_us <= max(40, newest + 1) * 50_000 + late_us
    ended_us = [window.ended_us for window in ready if window.window.planned.end_us > 2_100_000]
    assert len(ended_us) > 10
    assert set(np.diff(ended_us)) == {100_000}


def test_from_the_deadline_on_no_window_is_taken_not_even_one_that_is_whole():
    one = a_feed()
    for k in range(20):
        one.accept(0, frame(k * 50_000, k * 50_000))
    assert one.take(time.monotonic()) == []
    assert one.take(time.monotonic() + 20)


def test_a_clock_that_jumps_is_set_again_and_one_that_goes_back_a_little_waits():
    one = a_feed(stride=1)
    for k in range(20):
        one.accept(0, frame(k * 50_000, k * 50_000))
    for k in range(20, 40):
        one.accept(0, frame(9_000_000_000 + k * 50_000, k * 50_000))
    for k in range(40, 80):
        one.accept(0, frame(9_000_000_000 + k * 50_000 - 300_000, k * 50_000))
    assert one.troubles == {CLOCK_SET: 1, EARLIER: 6}
    for ready in one.take(None):
        frames = ready.window.planned.frame_index
        assert frames.max() < 20 or frames.min() >= 20
        assert (np.diff(ready.window.planned.timestamp_us, axis=0) >= 50_000).all()


def test_a_gap_in_a_stream_gives_no_window_over_it():
    times = [t if t < 1.0 else t + 0.6 for t in regular(60)]
    content = encoded(pictures(60), times)
    with served(over_http([content])) as port, a_feed(stride=1, urls=[f"http://127.0.0.1:{port}/"]) as one:
        ready = _all(one)
    assert one.windows.dropped[STALE_FRAME] > 3
    ends = [window.window.planned.end_us for window in ready]
    assert not [end for end in ends if 1_050_000 < end < 1_900_000]
    assert min(ends) == 300_000
    assert max(ends) == 3_500_000


def _all(one: Feed) -> list:
    taken = []
    while ready := one.take(None):
        taken += ready
    return taken


def test_a_lost_rtsp_camera_is_connected_to_again_and_counted(monkeypatch):
    monkeypatch.setattr(feed, "_BACKOFF_S", 0.01)
    camera, ready = over_rtsp(encoded(pictures(16), regular(16)), is_paced=True), []
    with (
        served(camera) as port,
        a_feed(urls=[f"rtsp://127.0.0.1:{port}/"], reconnects=1, stride=1) as one,
    ):
        while one.troubles.get(RECONNECTED, 0) < 2 and not one.failure:
            ready += one.take(time.monotonic() + 0.05)
    assert not one.failure
    connections = [np.unique(each.window.planned.frame_index // 15).tolist() for each in ready]
    assert [0] in connections
    assert [1] in connections
    assert {len(of) for of in connections} == {1}


def test_not_even_a_short_loss_is_bridged(monkeypatch):
    monkeypatch.setattr(feed, "_BACKOFF_S", 0.0)
    one = a_feed(reconnects=1, stride=1)
    for k in range(40):
        if k == 20:
            one._bear(one._inputs[0], StreamLostError("lost"))
        one.accept(0, frame(k * 50_000, k * 50_000))
    frames = [ready.window.planned.frame_index for ready in one.take(None)]
    assert len(frames) > 10
    assert not [of for of in frames if of.min() < 20 <= of.max()]


def test_a_camera_that_does_not_come_back_is_given_up(video, monkeypatch):
    monkeypatch.setattr(feed, "_BACKOFF_S", 0.01)
    lives = [over_rtsp(video)]

    def once(connection: socket.socket) -> None:
        if lives:
            lives.pop()(connection)

    with (
        served(once) as port,
        a_feed(urls=[f"rtsp://127.0.0.1:{port}/"], reconnects=2) as one,
    ):
        assert len(_all(one)) > 5
    assert isinstance(one.failure, OmniError)
    assert one.troubles[RECONNECTED] == 2


# -- answers


def test_the_answers_about_a_stream_are_those_about_its_file(video, tmp_path):
    (tmp_path / "front.ts").write_bytes(video)
    recipe = tiny()
    subject = subject_of_base(recipe)
    of_file = infer(recipe, subject, InferRequest((str(tmp_path / "front.ts"),), out=tmp_path / "file"), QUIET)[
        "clips"
    ][0]
    with served(over_http([video])) as port:
        result = ask_live(tmp_path / "live", f"http://127.0.0.1:{port}/front.ts", recipe, batch=16)
    (clip,) = result["clips"]
    lines = lines_in(tmp_path / "live")
    assert clip["windows"] == len(lines) == of_file["windows"] > 5
    assert (clip["dropped"], clip["troubles"], result["failed"]) == ({}, {}, 0)
    shared = ("start_us", "end_us", "text", "values")
    assert [[line[key] for key in shared] for line in lines] == [
        [line[key] for key in shared] for line in of_file["answers"]
    ]
    recording = video_recording({FRONT: tmp_path / "front.ts"})
    windows = views.plan_views(recording, subject.preprocess, stride=2, max_age_us=TOLERANCE_US).windows
    assert [line["end_us"] for line in lines] == [window.end_us for window in windows]
    late = [line["latency_s"] for line in lines]
    assert clip["latency_s"]["median"] == pytest.approx(np.median(late), abs=1e-6)
    assert all(0 < one < 60 for one in late)
    assert 0 <= time.time() - lines[-1]["end_unix_us"] / 1e6 < 60
    assert files.verified_receipt(tmp_path / "live" / Path(clip["file"]).name, expect={"windows": len(lines)})


def test_the_pictures_of_a_live_window_are_those_of_the_file_bit_for_bit(video, tmp_path):
    (tmp_path / "front.ts").write_bytes(video)
    preprocess = tiny().preprocess()
    recording = video_recording({FRONT: tmp_path / "front.ts"})
    windows = views.plan_views(recording, preprocess, stride=2, max_age_us=TOLERANCE_US).windows
    expected = list(views.tiled_pictures(recording, preprocess, windows))
    with served(over_http([video])) as port:
        address = live_address(f"http://127.0.0.1:{port}/")
        reading = Reading([address], preprocess.fit_in_cell, lambda one: preprocess.in_cell(one)[None], 20.0, 0, 100)
        with Feed(reading, LiveWindows(1, 10.0, 4, 2, TOLERANCE_US), QUIET) as one:
            ready = _all(one)
    assert len(ready) == len(expected) > 5
    for window, wanted in zip(ready, expected, strict=True):
        np.testing.assert_array_equal(window.window.pictures, wanted)


class Counting(Vlm):
    """A model that notes how many windows it is asked about at a time."""

    def predict(self, built, rows, preprocess):
        ASKED.append(len(rows))
        return super().predict(built, rows, preprocess)


ASKED: list[int] = []


def test_so_many_windows_of_a_clip_are_answered_at_a_time(video, tmp_path):
    (tmp_path / "front.ts").write_bytes(video)
    recipe, said = Counting(**dict(tiny())), {}
    for batch, sizes in ((None, [8, 1]), (4, [4, 4, 1])):
        ASKED.clear()
        request = InferRequest((str(tmp_path / "front.ts"),), out=tmp_path / "out", batch=batch)
        (clip,) = infer(recipe, subject_of_base(recipe), request, QUIET)["clips"]
        said[batch] = [(line["end_us"], line["text"]) for line in clip["answers"]]
        assert sizes == ASKED
    assert said[None] == said[4]


class Slow(Vlm):
    """A model that is busy with its first answer until the stream has been read to its end."""

    def predict(self, built, rows, preprocess):
        until_s = time.monotonic() + 20
        while not FEEDS[-1].ended and time.monotonic() < until_s:
            time.sleep(0.01)
        return super().predict(built, rows, preprocess)


class Noted(Feed):
    """A feed that a test can look at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        FEEDS.append(self)


FEEDS: list[Feed] = []


def test_a_slow_model_answers_the_newest_window_and_the_rest_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "Feed", Noted)
    long = encoded(pictures(200), regular(200))
    recipe = Slow(**dict(tiny()))
    with served(over_http([long])) as port:
        (clip,) = ask_live(tmp_path, f"http://127.0.0.1:{port}/", recipe)["clips"]
    total = (100 - 4) // 2 + 1
    assert clip["windows"] + clip["dropped"][TOO_SLOW] == total
    assert clip["windows"] == 2
    assert lines_in(tmp_path)[-1]["end_us"] == (total - 1) * 200_000 + 300_000


class Hungry(Vlm):
    """A model that is slower than its camera: while it answers, the next windows come."""

    def predict(self, built, rows, preprocess):
        HUNGRY.set()
        time.sleep(0.05)
        return super().predict(built, rows, preprocess)


HUNGRY = threading.Event()


def test_it_stops_after_so_many_seconds_though_windows_always_wait(tmp_path):
    """The stream has an end, for a test must: a hundred answers away, of a twentieth of a second or more."""
    content, recipe = encoded(pictures(840), regular(840)), Hungry(**dict(tiny()))
    over = threading.Event()
    size = len(content) // 105 // 188 * 188

    def more() -> None:
        while not (over.is_set() or HUNGRY.wait(0.05)):
            continue
        HUNGRY.clear()

    pieces = [content[at : at + size] for at in range(5 * size, len(content), size)]
    steps = [content[: 5 * size], *(step for piece in pieces for step in (more, piece))]
    with served(over_http(steps)) as port:
        limits = Limits(seconds=0.5, patience_s=20)
        (clip,) = ask_live(tmp_path, f"http://127.0.0.1:{port}/", recipe, limits=limits)["clips"]
        over.set()
    assert clip["ended"] == "done"


def test_two_watches_of_one_second_have_a_file_each_and_one_without_answers_none(tmp_path):
    several = [Lines(tmp_path, ["rtsp://host"]) for _ in range(3)]
    assert len({one.path for one in several}) == 3
    for one in several:
        one.close()
        assert one.facts["file"] is None
    assert not list(tmp_path.iterdir())


def test_without_answers_no_file_is_named(video, tmp_path, capsys):
    recipe, request = tiny(), InferRequest((), out=tmp_path)
    with served(over_http([video[: len(video) // 8]])) as port:
        url = f"http://127.0.0.1:{port}/"
        asked = ask(recipe, subject_of_base(recipe), replace(request, clips=(url,)), PATIENT, Console())
    assert asked["clips"][0]["file"] is None
    assert capsys.readouterr().err.splitlines()[-1].endswith("has ended: 0 answers (nothing was written)")
    assert not list(tmp_path.iterdir())


def test_what_is_forced_is_counted_only_where_answers_are_held(video, tmp_path):
    for constrained in (True, False):
        with served(over_http([video])) as port:
            result = ask_live(tmp_path / str(constrained), f"http://127.0.0.1:{port}/", constrained=constrained)
        assert ("forced" in result["clips"][0]) is constrained


def test_a_stream_that_stalls_ends_in_one_line_and_its_answers_are_kept(video, tmp_path, capsys):
    done = threading.Event()
    words = ["--profile", "cpu-tiny", "--set", f"sample.cameras={FRONT}", "--set", "sample.labels=speed", "--json"]
    with served(over_http([video, lambda: done.wait(20)])) as port:
        url = f"http://user:geheim@127.0.0.1:{port}/live/x?token=geheim"
        assert omni(["infer", url, *words, "--patience", "2", "--out", str(tmp_path), "--stride", "4"]) == 1
        done.set()
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    shown = live_address(url).title
    assert last.startswith(f"error: {shown}: no sound picture for 2 s; is the camera still on?; ")
    lines = lines_in(tmp_path)
    assert f"{len(lines)} answer" in last
    (path,) = tmp_path.glob("*.jsonl")
    assert files.verified_receipt(path, expect={"windows": len(lines)})
    assert f"watching {shown}: at most 1 window waiting for the model, and " in captured.err
    assert "a lost stream, and that is the end" in captured.err
    everything = captured.out + captured.err + "".join(str(p) + p.read_text() for p in tmp_path.iterdir())
    assert "geheim" not in everything


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, None), (signal.SIGTERM, Preempted)])
def test_a_signal_ends_it_with_every_answer_on_disk(video, tmp_path, number, error):
    done = threading.Event()

    def stop() -> None:
        while not [path for path in tmp_path.glob("*.jsonl") if path.read_text().count("\n") > 2]:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        done.wait(20)

    with served(over_http([video, stop])) as port:
        url = f"http://127.0.0.1:{port}/"
        if error:
            with pytest.raises(
                error, match=r"stopped; its answers, if any, are in .*\.jsonl; run the same command again"
            ):
                ask_live(tmp_path, url, limits=Limits(patience_s=20), batch=16)
        else:
            (clip,) = ask_live(tmp_path, url, limits=Limits(patience_s=20), batch=16)["clips"]
            assert clip["ended"] == "stopped by Ctrl-C"
        done.set()
    (path,) = tmp_path.glob("*.jsonl")
    assert files.verified_receipt(path, expect={"windows": len(lines_in(tmp_path))})


def test_it_stops_after_so_many_answers_or_seconds(video, tmp_path):
    done = threading.Event()
    for name, limits in (("a", Limits(windows=3, patience_s=20)), ("b", Limits(seconds=0.5, patience_s=20))):
        with served(over_http([video, lambda: done.wait(20)])) as port:
            (clip,) = ask_live(tmp_path / name, f"http://127.0.0.1:{port}/", limits=limits, batch=16)["clips"]
            done.set()
        done.clear()
        assert clip["ended"] == "done"
        assert clip["windows"] == 3 or name == "b"


@pytest.mark.parametrize(
    ("words", "changes", "error", "message"),
    [
        (["rtsp://h/a", "rtsp://h/b"], {}, UsageError, "one live camera at a time, or several of one car"),
        (["rtsp://h/a", "clip.mp4"], {}, UsageError, "one live camera at a time"),
        (["rtsp://h/a"], {"overlay": True}, UsageError, "--overlay draws over a clip; leave it out, or record"),
        ([], {"cameras": {"camera_x": "rtsp://h/a"}}, UsageError, "--camera camera_x: the model does not know it"),
        ([], {"cameras": {FRONT: "rtsp://h/a"}, "tiled": True}, UsageError, "--tiled asks about ready mosaics"),
        (["/dev/none"], {}, UsageError, "/dev/none: no such device; ls /dev/video"),
        (["/dev/shm"], {}, DataError, "/dev/shm: no camera but a file"),
        (["/dev/null"], {}, DataError, "/dev/null: no camera; give a device such as /dev/video0"),
    ],
)
def test_what_is_no_live_camera_is_one_line(tmp_path, words, changes, error, message):
    recipe = tiny()
    with pytest.raises(error, match=message):
        ask(recipe, subject_of_base(recipe), InferRequest(tuple(words), out=tmp_path, **changes), PATIENT, QUIET)
    assert not list(tmp_path.iterdir())


def test_a_host_that_does_not_answer_is_one_line_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(OmniError, match=rf"^rtsp://127.0.0.1:{port} .*: cannot be reached \(connection refused\)"):
        check_there(live_address(f"rtsp://user:geheim@127.0.0.1:{port}/a"), 1.0)
    with pytest.raises(UsageError, match="the model looks at 4 cameras; give --camera NAME=URL for each, or --tiled"):
        ask_live(tmp_path, "rtsp://h/a", tiny(sample=VlmSample(cameras="4-cam", window=4, canvas_px=112)))
    with pytest.raises(UsageError, match="--windows is for live cameras"):
        ask_live(tmp_path, "clip.mp4", limits=Limits(windows=1))
    with (
        served(over_http([b"this is no video at all" * 9000])) as port,
        pytest.raises(DataError, match="sends no video"),
    ):
        received(f"http://127.0.0.1:{port}/")
    done = threading.Event()
    with served(lambda connection: done.wait(20)) as port:
        with pytest.raises(OmniError, match=r"no answer for 0\.5 s"):
            received(f"http://127.0.0.1:{port}/", patience_s=0.5)
        done.set()
    assert issubclass(StreamLostError, OmniError)
