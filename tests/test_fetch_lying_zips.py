"""`omni fetch --clips` of zips that lie or rot: no hash vouches for a range, each part of a zip must prove itself."""

import contextlib
import io
import struct
import zipfile

import pytest

from omni_cli.errors import DataError, OmniError
from omni_cli.formats.physical_ai_av import FEATURES
from omni_cli.sources.zip_members import read_directory
from omni_cli.sources.zip_ranges import MAX_DIRECTORY_BYTES, remote_members
from tests.support import pai
from tests.support.clips import CLIPS, FRONT, REAR, get, members_of, of_clips, spoil, zip_of
from tests.support.hub import Fault


def entry_in_directory(path, name):
    """Return where the directory's entry of a member begins (APPNOTE 4.3.12: 46 bytes, then the name)."""
    with zipfile.ZipFile(path) as archive:
        return path.read_bytes().index(name.encode(), archive.start_dir) - 46


@pytest.mark.fault("F7")
@pytest.mark.parametrize("where", ["signature", "crc", "size", "offset", "name", "header", "content"])
def test_a_flipped_bit_in_a_range_is_found(hub, repository, tmp_path, where):
    """No hash vouches for a range: each part of what is read of a zip must prove itself."""
    path, name = pai.zip_path(repository, FRONT), pai.member(FRONT, "video", CLIPS[2])
    entry = entry_in_directory(path, name)
    with zipfile.ZipFile(path) as archive:
        header = archive.getinfo(name).header_offset
    places = {"signature": entry, "crc": entry + 16, "size": entry + 24, "offset": entry + 42, "name": entry + 50,
              "header": header + 33, "content": header + 5000}  # fmt: skip
    fault = Fault(hub.stored[FEATURES[FRONT].chunk_path(0)].sha256, "flip", after=places[where])
    hub.faults.append(fault)
    get(tmp_path, CLIPS[2])
    assert fault.times == 0
    assert members_of(zip_of(tmp_path)) == of_clips(repository, {CLIPS[2]})
    hub.log.clear()
    assert get(tmp_path, CLIPS[2])["lacking"] == {}
    assert hub.log == []


def crc_of_another(content, name):
    entry = content.rindex(name.encode()) - 46
    return content[: entry + 16] + bytes([content[entry + 16] ^ 1]) + content[entry + 17 :]


def lying_size(content, name):
    entry = content.rindex(name.encode()) - 46
    huge = struct.pack("<LL", 1 << 29, 1 << 29)
    return content[: entry + 20] + huge + content[entry + 28 :]


def outside(content, name):
    entry = content.rindex(name.encode()) - 46
    return content[: entry + 42] + struct.pack("<L", len(content) + 1000) + content[entry + 46 :]


def overlapping(content, name):
    entry = content.rindex(name.encode()) - 46
    return content[: entry + 42] + bytes(4) + content[entry + 46 :]


def moved(content, name):
    entry = content.rindex(name.encode()) - 46
    (offset,) = struct.unpack("<L", content[entry + 42 : entry + 46])
    return content[: entry + 42] + struct.pack("<L", offset - 40) + content[entry + 46 :]


def compressed(content, _):
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return target.getvalue()


def twice(content, name):
    target = io.BytesIO(content)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(target, "a") as archive:
        archive.writestr(name, b"another")
    return target.getvalue()


def million(content, _):
    """Append a directory that says that it is longer than any chunk's."""
    entry = content[content.rindex(b"PK\x01\x02") : content.rindex(b"PK\x05\x06")]
    count = MAX_DIRECTORY_BYTES // len(entry) + 1
    directory = entry * count
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count % 65536, count % 65536, len(directory), len(content), 0)
    return content + directory + end


def escaping(content, name):
    return content.replace(name.encode(), b"../" + name.encode()[3:])


def no_zip(content, _):
    return content[: len(content) // 2]


def of_another_time(content, name):
    entry = content.rindex(name.encode()) - 46
    return content[: entry + 6] + bytes([200]) + content[entry + 7 :]


@pytest.mark.fault("F13", "F14")
@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (crc_of_another, r"CRC-32 is [0-9a-f]{8}, [0-9a-f]{8} promised, again and again; fetch its whole chunk"),
        (lying_size, "overlaps what follows it"),
        (outside, "overlaps what follows it"),
        (overlapping, "overlaps what follows it"),
        (moved, "not where the directory says, again and again|overlaps what follows it"),
        (compressed, "is compressed or encrypted, expected stored bytes"),
        (twice, "is there twice"),
        (million, rf"its directory is longer than {MAX_DIRECTORY_BYTES} bytes"),
        (escaping, "has a name that leaves its folder"),
        (no_zip, "not a zip of stored members"),
        (of_another_time, r"not a zip of stored members \(zip file version 20\.0\)"),
    ],
)
def test_a_zip_that_lies_fails_alone(hub, repository, tmp_path, lie, message):
    path, name = FEATURES[FRONT].chunk_path(0), pai.member(FRONT, "video", CLIPS[1])
    spoil(hub, path, lie(hub.stored[path].place.read_bytes(), name))
    with pytest.raises(OmniError, match=rf"1 of \d+ files failed, the others are kept; first: .*({message})"):
        get(tmp_path, CLIPS[1])
    assert not zip_of(tmp_path).exists()
    assert members_of(zip_of(tmp_path, REAR)) == of_clips(repository, {CLIPS[1]}, REAR)
    assert hub.sent(FRONT) < 2 * MAX_DIRECTORY_BYTES
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.fault("F13")
def test_no_flipped_bit_of_a_directory_is_more_than_bad_data(tmp_path):
    target, path = io.BytesIO(), tmp_path / "chunk.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for clip in CLIPS[:2]:
            archive.writestr(f"{clip}.mp4", b"video")
    whole = target.getvalue()
    for at in range(whole.index(b"PK\x01\x02"), len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[at] ^= 1 << bit
            path.write_bytes(content)
            with contextlib.suppress(DataError):
                read_directory(path)
            with contextlib.suppress(DataError):
                remote_members("x", len(content), lambda start, size, content=content: bytes(content)[start:][:size])
