"""A file that `omni fetch --from` copied is compared with what it noted before a picture or a number of it counts."""

import shutil

import pytest

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.formats import comma2k19
from omni_cli.report import Console
from omni_cli.sources import open_source
from omni_cli.stages.checks.units import Unit, check_unit
from omni_cli.stages.fetch import FetchRequest, fetch
from tests import test_comma2k19, test_dgp
from tests.support import openpilot
from tests.support.etl_once import run as etl_here

QUIET = Console(quiet=True)
REMEDY = "; damaged, delete it and copy it again with omni fetch --from"
UNREAD = b"\0" * 188  # behind a video or a picture nobody looks; as long as a packet of MPEG-TS


def write_openpilot(folder):
    for number in range(2):
        openpilot.write_segment(folder / openpilot.DONGLE / f"{number:08x}--0696c823fa--0")


def write_comma2k19(folder):
    video = test_comma2k19.hevc(test_comma2k19.COUNT)
    for number in (40, 50):
        segment = test_comma2k19.write_segment(folder / test_comma2k19.ROUTE / str(number))
        (segment / comma2k19.VIDEO_FILE).write_bytes(video)


def write_dgp(folder):
    for name in ("000150", "000151"):
        test_dgp.write_scene(folder, name, count=12)


WRITERS = {"openpilot": write_openpilot, "comma2k19": write_comma2k19, "dgp": write_dgp}
CAMERAS = {"openpilot": "qcamera", "comma2k19": comma2k19.CAMERA, "dgp": "CAMERA_05"}
FILES = [
    ("openpilot", "qcamera.ts"),
    ("openpilot", "qlog"),
    ("comma2k19", comma2k19.VIDEO_FILE),
    ("comma2k19", comma2k19.POSITIONS),
    ("dgp", "scene_*.json"),
    ("dgp", "calibration/*.json"),
    ("dgp", "rgb/CAMERA_05/*.png"),
]
VIDEOS = [("openpilot", "qcamera.ts"), ("dgp", "rgb/CAMERA_05/*.png")]


@pytest.fixture(scope="module")
def origins(tmp_path_factory):
    """Two recordings of each source."""
    folder = tmp_path_factory.mktemp("origins")
    for source, write in WRITERS.items():
        write(folder / source)
    for path in [path for path in folder.rglob("*") if path.suffix in (".ts", ".png")]:
        path.write_bytes(path.read_bytes() + UNREAD)
    return folder


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def imported(source, origins, data):
    fetch(FetchRequest(source, data, origin=origins / source), QUIET)
    return data / "raw" / source


def file_of(raw, pattern):
    """A file of the second recording; of many, one that windows show."""
    found = sorted(path for path in raw.glob(f"**/{pattern}") if not path.name.endswith(files.RECEIPT_SUFFIX))
    return found[len(found) * 2 // 3]


def flip(path):
    """Change a bit: of the last digit of a text, so that it says another number, of the last byte of anything else."""
    content = bytearray(path.read_bytes())
    at = max(map(content.rfind, b"0123456789")) if path.suffix == ".json" else -1
    content[at] ^= 1
    path.write_bytes(content)


def etl(source, data):
    return etl_here(data, data.parent / "shards", quiet=True, camera=CAMERAS[source], workers=0)


@pytest.mark.fault("F6")
@pytest.mark.parametrize(("source", "pattern"), FILES, ids=[pattern for _, pattern in FILES])
def test_a_bit_that_changed_since_the_import_is_refused_by_name(origins, data, source, pattern):
    raw = imported(source, origins, data)
    damaged = file_of(raw, pattern)
    flip(damaged)
    made = etl(source, data)
    ((recording, why),) = made["refused"].items()
    assert recording in {ref.id for ref in open_source(source, raw).recordings()}
    noted = files.read_receipt(damaged)["sha256"]
    hashes = f"have SHA-256 {files.sha256_of(damaged)[:12]}.., omni fetch noted {noted[:12]}.."
    name = damaged.relative_to(raw).as_posix()
    assert why == f"RAW/{name}: its {damaged.stat().st_size} bytes {hashes}{REMEDY}"
    damaged.unlink()  # as the line says
    imported(source, origins, data)
    assert etl(source, data)["refused"] == {}


@pytest.mark.fault("F5")
@pytest.mark.parametrize(("source", "pattern"), VIDEOS, ids=[source for source, _ in VIDEOS])
def test_a_cut_video_and_a_torn_note_are_refused_by_name(origins, data, source, pattern):
    raw = imported(source, origins, data)
    video, last = file_of(raw, pattern), open_source(source, raw).recordings()[-1].id
    content = video.read_bytes()
    video.write_bytes(content[: -len(UNREAD)])  # it is whole without them
    sizes = f"holds {len(content) - len(UNREAD)} bytes, omni fetch noted {len(content)}"
    with pytest.raises(DataError, match=f"^{video}: {sizes}{REMEDY}$"):
        open_source(source, raw).open(last)
    video.write_bytes(content)
    files.receipt_path(video).write_text("{")
    with pytest.raises(DataError, match=f"^{video}.receipt.json: tells no more what {video.name} must hold{REMEDY}$"):
        open_source(source, raw).open(last)


@pytest.mark.parametrize(("source", "pattern"), VIDEOS, ids=[source for source, _ in VIDEOS])
def test_a_video_that_was_copied_anew_makes_its_shard_anew(origins, data, tmp_path, source, pattern):
    """Of the same length, and with the same times: its hash alone tells."""
    origin = shutil.copytree(origins / source, tmp_path / source)
    imported(source, tmp_path, data)
    assert counts(etl(source, data)) == (2, 0)
    assert counts(etl(source, data)) == (0, 2)
    flip(file_of(origin, pattern))
    imported(source, tmp_path, data)
    assert counts(etl(source, data)) == (1, 1)
    assert counts(etl(source, data)) == (0, 2)


def counts(made):
    return made["made"], made["kept"]


@pytest.mark.parametrize("source", WRITERS)
def test_of_a_file_that_was_never_copied_nothing_is_known(source, data):
    """Its owner may change it; and nothing but its size tells one from another, as before."""
    raw = data / "raw" / source
    WRITERS[source](raw)
    ref = open_source(source, raw).recordings()[0]
    recording = open_source(source, raw).open(ref.id)
    videos = [video for stream in recording.cameras.values() for video in stream.videos]
    assert {video.checksum for video in videos} == {None}
    for video in videos:
        flip(video.path)
        video.check()


@pytest.mark.parametrize(("file", "codes"), [("qcamera.ts", []), ("qlog", ["refused-by-reader"])])
def test_audit_reads_on_beside_a_wrong_hash_which_it_finds_by_itself(origins, data, file, codes):
    raw = imported("openpilot", origins, data)
    flip(file_of(raw, file))
    refs = open_source("openpilot", raw).recordings()
    found = check_unit(Unit("openpilot", raw, tuple(ref.id for ref in refs), None), deep=True).findings
    assert [finding.code for finding in found if finding.severity == "refuse"] == codes
