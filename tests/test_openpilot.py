"""Routes of comma devices: true frame times, speed, and a refusal that names what is wrong."""

import bz2
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats import openpilot, video
from omni_cli.sources import open_source, openpilot_schema
from omni_cli.sources.openpilot_logs import OpenpilotLogs, drive_log, read_log
from tests.support import openpilot as made

SEGMENT = f"{made.LOG_ID}--0"
ID = f"{made.DONGLE}_{SEGMENT}"
REAL_ID = "a2a0ccea32023010_2023-07-27--13-01-19--0"


@pytest.fixture(scope="module")
def segment_files(tmp_path_factory) -> Path:
    return made.write_segment(tmp_path_factory.mktemp("segment"))


@pytest.fixture
def routes(segment_files, tmp_path) -> Path:
    shutil.copytree(segment_files, tmp_path / made.DONGLE / SEGMENT)
    return tmp_path


def segment(routes: Path) -> Path:
    return routes / made.DONGLE / SEGMENT


def test_frames_speed_and_steering_come_with_their_true_times(routes):
    recording = open_source("openpilot", routes).open(ID)
    stream = recording.cameras["qcamera"]
    np.testing.assert_array_equal(stream.timestamp_us, made.frame_times_us(40))
    np.testing.assert_allclose(recording.speed.speed_mps, made.speed_at(recording.speed.timestamp_us), atol=1e-5)
    np.testing.assert_allclose(recording.speed.steering_angle_deg, 3.0)
    assert (recording.id, recording.group) == (ID, f"{made.DONGLE}_{made.LOG_ID}")
    assert recording.provenance["openpilot_version"] == "0.9.9"
    assert recording.provenance["log_is_truncated"] == "false"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a/{d}/{new}--3/qlog.bz2", ("d", "new", 3, "qlog.bz2")),
        ("{d}|{old}--12/rlog.zst", ("d", "old", 12, "rlog.zst")),
        ("{d}_{new}--0/qcamera.ts", ("d", "new", 0, "qcamera.ts")),
        ("Chunk_1/{d}|{old}/7/video.hevc", ("d", "old", 7, "video.hevc")),
        ("realdata/{new}--1/rlog", ("", "new", 1, "rlog")),
        ("{d}_{new}--7--rlog.bz2", ("d", "new", 7, "rlog.bz2")),
        ("{d}/{new}--3/dcamera.hevc", None),
        ("{d}/{new}/qlog.bz2", None),
        ("{d}/{new}--3/qlog.bz2.receipt.json", None),
        ("{d}x/notes--3/qlog", None),
    ],
)
def test_every_layout_of_commas_tools_is_read(path, found):
    names = {"d": "0123456789abcdef", "old": "2018-11-14--13-31-42", "new": "00000008--0696c823fa"}
    parsed = openpilot.parse_segment_file(path.format(**names))
    if found is None:
        assert parsed is None
    else:
        dongle, log, number, file = found
        expected = openpilot.SegmentName(names.get(dongle, ""), names[log], number)
        assert parsed == (expected, file)


@pytest.mark.parametrize("pack", ["bz2", "zst", "raw"])
def test_the_compression_is_told_by_the_content(routes, pack):
    plain = (segment(routes) / "qlog").read_bytes()
    streaming = zstandard.ZstdCompressor().compressobj()
    packed = {"bz2": bz2.compress(plain), "zst": streaming.compress(plain) + streaming.flush(), "raw": plain}[pack]
    (segment(routes) / "qlog").unlink()
    (segment(routes) / "rlog.bz2").write_bytes(packed)  # a wrong suffix must not matter
    recording = OpenpilotLogs(routes).open(ID)
    assert len(recording.cameras["qcamera"].timestamp_us) == 40
    assert recording.provenance["log"] == "rlog.bz2"


def _packed_in_two(plain: bytes, pack: str) -> list[bytes]:
    """Two blocks that can be decompressed one after the other, as the streams of a real log can."""
    half = len(plain) // 2
    if pack == "bz2":
        return [bz2.compress(plain[:half]), bz2.compress(plain[half:])]
    streaming = zstandard.ZstdCompressor().compressobj()
    first = streaming.compress(plain[:half]) + streaming.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return [first, streaming.compress(plain[half:]) + streaming.flush()]


@pytest.mark.parametrize("pack", ["bz2", "zst", "raw"])
def test_a_log_without_its_tail_is_read_up_to_there(tmp_path, pack):
    plain = made.events(40)
    first, second = _packed_in_two(plain, pack) if pack != "raw" else (plain[:-1003], plain[-1003:])
    log = read_log(_written(tmp_path / "cut", first + second[: len(second) // 2]), 0)
    assert log.is_truncated
    whole = read_log(_written(tmp_path / "whole", plain), 0)
    if pack == "raw":  # only the end of the speed is lost
        kept = len(log.speed.timestamp_us)
        assert 2 <= kept < len(whole.speed.timestamp_us)
        np.testing.assert_array_equal(log.speed.timestamp_us, whole.speed.timestamp_us[:kept])
    assert not whole.is_truncated
    assert 0 < log.events.counts["all"] < whole.events.counts["all"]


def test_a_zstd_stream_without_its_end_gives_all_that_it_holds():
    """Even where it is cut between two blocks, and so perhaps between two events."""
    plain = made.events(40)
    first, second = _packed_in_two(plain, "zst")
    assert openpilot_schema.decompress(first, "cut") == (plain[: len(plain) // 2], True)
    assert openpilot_schema.decompress(first + second, "whole") == (plain, False)
    assert openpilot_schema.decompress(first + second + zstandard.compress(b"more"), "two") == (plain + b"more", False)
    with pytest.raises(
        DataError, match=r"garbage: damaged compressed log \(zstd decompressor error: .*\); fetch it ag"
    ):
        openpilot_schema.decompress(first + second + b"garbage!", "garbage")


def test_raw_hevc_takes_its_times_from_the_encode_index(routes):
    (segment(routes) / "fcamera.hevc").write_bytes(made.raw_hevc(made.frame_times_us(40)))
    stream = OpenpilotLogs(routes).open(ID, ("fcamera",)).cameras["fcamera"]
    np.testing.assert_array_equal(stream.timestamp_us, made.frame_times_us(40))
    bright = [
        picture.mean()
        for _, picture in video.decode(stream.videos[0].read(), "f", range(40), width_px=96, height_px=64)
    ]
    assert len(bright) == 40
    assert (np.diff(bright) > 0).mean() > 0.9


def test_times_past_the_wrap_of_mpeg_ts_follow_the_log(routes):
    shift_us = round(openpilot.TS_WRAP_US)
    events = [_shifted(event, shift_us) for event in _events(segment(routes) / "qlog")]
    (segment(routes) / "qlog").write_bytes(b"".join(events))
    found = OpenpilotLogs(routes).open(ID).cameras["qcamera"].timestamp_us
    assert np.abs(found - made.frame_times_us(40) - shift_us).max() <= 2


def test_unknown_and_stale_events_are_skipped_and_counted(tmp_path):
    log = openpilot_schema.log_schema()
    newer = bytearray(log.Event.new_message(logMonoTime=1, valid=True, clocks={}).to_bytes())
    newer[8 + 8 + 8 : 8 + 8 + 10] = (60_000).to_bytes(
        2, "little"
    )  # frame, root pointer, logMonoTime: then the union's tag
    stale = log.Event.new_message(logMonoTime=2, valid=False, carState={"vEgo": 99.0}).to_bytes()
    path = _written(tmp_path / "qlog", bytes(newer) + stale + made.events(4))
    found = drive_log([read_log(path, 0)])
    assert found.facts["log_unknown_events"] == "1"
    assert found.facts["log_invalid_speed_events"] == "1"
    assert found.speed.speed_mps.max() < 20


def _damage(name: str, folder: Path) -> None:
    log = openpilot_schema.log_schema()
    times_us = made.frame_times_us(40)
    match name:
        case "no log":
            (folder / "qlog").unlink()
        case "garbage log":
            (folder / "qlog").write_bytes(b"this is not a log " * 50)
        case "broken bz2":
            packed = bytearray(bz2.compress((folder / "qlog").read_bytes()))
            packed[len(packed) // 2] ^= 255
            (folder / "qlog").write_bytes(bytes(packed))
        case "other video":
            (folder / "qcamera.ts").write_bytes(made.qcamera(times_us + 20_000))
        case "short video":
            (folder / "qcamera.ts").write_bytes(made.qcamera(times_us[:30]))
        case "not a video":
            (folder / "qcamera.ts").write_bytes(b"no video" * 1000)
        case "no video":
            (folder / "qcamera.ts").unlink()
        case "nan speed":
            bad = log.Event.new_message(logMonoTime=7, carState={"vEgo": float("nan")}).to_bytes()
            (folder / "qlog").write_bytes((folder / "qlog").read_bytes() + bad)
        case "lost index":
            kept = [
                e for e in _events(folder / "qlog") if e.which() != "qRoadEncodeIdx" or e.qRoadEncodeIdx.segmentId != 7
            ]
            (folder / "qlog").write_bytes(b"".join(e.as_builder().to_bytes() for e in kept))
        case "no speed":
            kept = [e for e in _events(folder / "qlog") if e.which() != "carState"]
            (folder / "qlog").write_bytes(b"".join(e.as_builder().to_bytes() for e in kept))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no log", "has no rlog or qlog"),
        ("garbage log", "holds no openpilot event"),
        ("broken bz2", "damaged compressed log|holds no openpilot event"),
        ("other video", "differ from the log's by up to 20"),
        ("short video", "holds 30 frames, the log lists 40"),
        ("not a video", "not a readable video"),
        ("no video", "no segment|has no qcamera"),
        ("nan speed", "NaN or infinite speed"),
        ("lost index", "lacks frame 7 of 40"),
        ("no speed", "0 valid carState events"),
    ],
)
def test_damage_is_refused_by_name_in_one_line(routes, damage, message):
    _damage(damage, segment(routes))
    with pytest.raises(DataError, match=message) as caught:
        OpenpilotLogs(routes).open(ID)
    assert "\n" not in str(caught.value)


def test_wrong_requests_say_what_is_there(routes, tmp_path):
    with pytest.raises(UsageError, match=r"no camera 'camera_front' .*known: qcamera, fcamera, ecamera"):
        OpenpilotLogs(routes).open(ID, ("camera_front",))
    with pytest.raises(DataError, match="has no ecamera; it has qcamera"):
        OpenpilotLogs(routes).open(ID, ("ecamera",))
    with pytest.raises(DataError, match=r"no folder .*omni fetch --source openpilot"):
        OpenpilotLogs(tmp_path / "nowhere").recordings()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no segment such as"):
        OpenpilotLogs(tmp_path / "empty").recordings()


def test_a_bomb_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(openpilot_schema, "MAX_LOG_BYTES", 1 << 20)
    with pytest.raises(DataError, match="decompresses to more than 1048576 bytes"):
        openpilot_schema.decompress(bz2.compress(bytes(1 << 22)), "qlog.bz2")
    with pytest.raises(DataError, match="decompresses to more than 1048576 bytes"):
        openpilot_schema.decompress(zstandard.compress(bytes(1 << 22)), "qlog.zst")


def test_a_schema_that_would_abort_the_process_is_refused(tmp_path):
    (tmp_path / "log.capnp").write_text("@0xf3b1f17e25a4285b; this is no schema")
    with pytest.raises(OmniError, match="do not parse together"):
        openpilot_schema._require_parses(str(tmp_path), "0" * 64)


def test_a_missing_extra_names_its_install():
    with pytest.raises(UsageError, match=r"pip install 'omni-cli\[openpilot\]'"):
        openpilot_schema.extra("a_module_that_is_not_there")


real_data = pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")


@pytest.fixture
def real_routes() -> Path:
    return Path(os.environ["OMNI_REAL_DATA"]) / "comma_demo_route"


@real_data
@pytest.mark.real_data
def test_a_real_segment(real_routes):
    source = OpenpilotLogs(real_routes)
    assert [ref.id for ref in source.recordings()] == [REAL_ID]
    recording = source.open(REAL_ID)
    times_us = recording.cameras["qcamera"].timestamp_us
    assert len(times_us) == 1200
    log = read_log(real_routes / "a2a0ccea32023010" / "2023-07-27--13-01-19--0" / "qlog.bz2", 0)
    np.testing.assert_array_equal(times_us, log.frame_time_us["qRoadEncodeIdx"])
    assert np.diff(log.frame_time_us["roadEncodeIdx"]).mean() == pytest.approx(49_996, abs=5)
    assert len(recording.speed.timestamp_us) == 569
    assert 20 < recording.speed.speed_mps.min() < recording.speed.speed_mps.max() < 30
    assert recording.provenance["log_events"] == "11388"
    assert recording.provenance["car"] == "TOYOTA COROLLA TSS2 2019"


@real_data
@pytest.mark.real_data
def test_a_real_log_re_emitted_as_zst_with_raw_hevc(real_routes, tmp_path):
    """Derived: the real log under another compression; its first 1200 times for re-encoded, made-up pictures."""
    real = real_routes / "a2a0ccea32023010" / "2023-07-27--13-01-19--0"
    folder = tmp_path / "a2a0ccea32023010|2023-07-27--13-01-19" / "0"
    folder.mkdir(parents=True)
    (folder / "rlog.zst").write_bytes(zstandard.compress(bz2.decompress((real / "qlog.bz2").read_bytes())))
    (folder / "fcamera.hevc").write_bytes(made.raw_hevc(np.arange(1200) * 50_000))
    recording = OpenpilotLogs(tmp_path).open(REAL_ID)
    assert list(recording.cameras) == ["fcamera"]
    assert np.diff(recording.cameras["fcamera"].timestamp_us).mean() == pytest.approx(49_996, abs=5)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _events(path: Path) -> list:
    return list(openpilot_schema.log_schema().Event.read_multiple_bytes(path.read_bytes()))


def _shifted(event, shift_us: int) -> bytes:
    builder = event.as_builder()
    builder.logMonoTime = event.logMonoTime + shift_us * 1000
    if event.which() in ("qRoadEncodeIdx", "roadEncodeIdx"):
        index = getattr(builder, event.which())
        index.timestampEof = index.timestampEof + shift_us * 1000
    return builder.to_bytes()
