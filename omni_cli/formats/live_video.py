"""Live cameras: a URL or a device of this machine, decoded as it comes, each frame with the time its stream states.

The pictures are those that `formats.video` makes of a file of the same bytes, scaled by the same code. A picture that
is damaged, or was made of a damaged one, is never shown: after a loss nothing is until the next keyframe.
"""

import errno
import hashlib
import math
import os
import re
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlsplit

import av

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.containers import video_stream
from omni_cli.formats.video import Uint8Array, rgb_scaler

SCHEMES = ("rtsp", "rtsps", "http", "https", "tcp", "udp", "rtp", "rtmp")
DAMAGED = "frames damaged on the way"
UNTIMED = "frames without a time"  # FFmpeg does not know that of the first of an RTSP stream
_DEVICES = "/dev/"
_RTSP_PORT = 554
_OPTIONS = {
    "rtsp_flags": "prefer_tcp",  # RTP inside the RTSP connection loses nothing
    # a playlist from outside must not lead to files of this machine
    "protocol_whitelist": "rtp,srtp,udp,tcp,tls,dtls,http,https,httpproxy,crypto,rtmp,rtmps",
}
_LISTENING = ("tcp", "udp", "rtp")  # may name a port of this machine alone
_HASH_LENGTH = 6  # hexadecimal digits
_UNTIMED_LIMIT = 50  # frames, from the first one on
_UNDER_WAY = 64  # packets whose frames a decoder still holds, at most


class StreamLostError(OmniError):
    """A stream that was there is not any more, or says nothing."""


@dataclass(frozen=True)
class Address:
    """Where a live camera is. Its URL may hold a password or a token anywhere: `title` alone is shown or written."""

    url: str = field(repr=False)
    title: str

    @property
    def scheme(self) -> str:
        """The protocol; nothing for a device."""
        return "" if self.url.startswith(_DEVICES) else self.url.partition("://")[0].lower()


@dataclass(frozen=True)
class LiveFrame:
    """One frame of a live camera."""

    pts_us: int  # when it was taken, by the clock of its stream
    arrived_us: int  # when its packet was here, by this machine's monotonic clock
    picture: Callable[[], Uint8Array]  # makes (height, width, 3) RGB


def live_address(word: str) -> Address | None:
    """Return what a user's word names, if it is a live camera: a URL, or a device under /dev.

    Raises:
        UsageError: it is a URL of a kind that is not read, or names no host.
    """
    if word.startswith(_DEVICES):
        return Address(word, word)
    scheme, mark, rest = word.partition("://")
    if not mark and scheme.partition(":")[0].lower() in SCHEMES and ":" in scheme:
        raise UsageError(f"{scheme.partition(':')[0]}: such a URL begins with ://, for example rtsp://HOST/STREAM")
    if not mark:
        return None
    if not re.fullmatch("[A-Za-z0-9+.-]+", scheme):
        raise UsageError("such a URL begins with SCHEME://, for example rtsp://HOST/STREAM (it is not shown)")
    if scheme.lower() not in SCHEMES:
        raise UsageError(f"{scheme}://: no such live stream; expected one of {', '.join(SCHEMES)}, or /dev/video0")
    return Address(word, _title(word, scheme.lower(), rest))


def check_there(address: Address, patience_s: float) -> None:
    """Refuse a camera that is plainly not there, before anything slow is done for it.

    An RTSP server is knocked at; others may serve a single connection, and are opened once.

    Raises:
        UsageError: there is no such device.
        DataError: it is no camera.
        OmniError: this user may not read it, or its host does not answer.
    """
    if address.scheme in ("rtsp", "rtsps"):
        _knock(address, patience_s)
    elif not address.scheme:
        _check_device(address.title)


def live_frames(
    address: Address,
    size_of: Callable[[int, int], tuple[int, int]],
    *,
    patience_s: float,
    counted: Counter[str],
) -> Iterator[LiveFrame]:
    """Yield the frames of a live camera in the order in which they are shown, until its stream says that it ends.

    Args:
        address: the camera.
        size_of: (width, height) of its pictures -> of those that are made.
        patience_s: without a sound picture for so long, it is lost.
        counted: is told of frames that were damaged.

    Raises:
        StreamLostError: it broke off, or fell silent.
        DataError: it is no video, or has no times.
        OmniError: it cannot be opened.
    """
    with _opened(address, patience_s) as container:
        stream = video_stream(container, address.title)
        stream.thread_type = "NONE"
        size_px = stream.width, stream.height
        if not all(size_px):
            raise DataError(f"{address.title}: sent no keyframe for long; set its camera to one every second or two")
        to_rgb = rgb_scaler(stream, size_of(*size_px))
        for frame, arrived_us in _sound_frames(container, stream, address.title, patience_s, counted):
            if (frame.width, frame.height) != size_px:
                raise StreamLostError(f"{address.title}: its pictures changed to {frame.width}x{frame.height} px")
            yield LiveFrame(_time_us(frame), arrived_us, _maker(to_rgb, frame))


def monotonic_us() -> int:
    """Return this machine's monotonic clock, on which frames arrive."""
    return time.monotonic_ns() // 1000


def _maker(to_rgb: Callable[[av.VideoFrame], Uint8Array], frame: av.VideoFrame) -> Callable[[], Uint8Array]:
    return lambda: to_rgb(frame)


def _time_us(frame: av.VideoFrame) -> int:
    time_us: Fraction = frame.pts * (frame.time_base * 1_000_000)
    return round(time_us)


def _sound_frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    title: str,
    patience_s: float,
    counted: Counter[str],
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Yield (frame, when its packet arrived) of frames that are whole and have a time."""
    arrived, last_us, untimed = dict[int | None, int](), monotonic_us(), 0.0
    sound = _Sound(counted)
    for packet, now_us in _packets(container, title, patience_s):
        if now_us - last_us > patience_s * 1e6:
            raise _silent(title, patience_s)
        if packet.stream.index != stream.index:
            continue
        arrived[packet.pts] = now_us
        for frame in sound.of(packet):
            if frame.pts is None or frame.time_base is None:
                counted[UNTIMED] += 1
                untimed += 1
                continue
            last_us, untimed = now_us, -math.inf
            yield frame, arrived.pop(frame.pts, now_us)
        if untimed > _UNTIMED_LIMIT:
            raise DataError(f"{title}: its frames have no times; serve it as RTSP or MPEG-TS, which state them")
        while len(arrived) > _UNDER_WAY:
            arrived.pop(next(iter(arrived)))


@dataclass
class _Sound:
    """Lets no damaged picture pass, nor any that leans on one: those are not marked."""

    counted: Counter[str]
    is_whole: bool = True

    def of(self, packet: av.Packet) -> Iterator[av.VideoFrame]:
        frames = _decoded(packet)
        if frames is None:
            self._damaged()
        for frame in frames or ():
            self.is_whole = not frame.is_corrupt and (self.is_whole or frame.key_frame)
            if self.is_whole:
                yield frame
            else:
                self._damaged()

    def _damaged(self) -> None:
        self.is_whole = False
        self.counted[DAMAGED] += 1


def _decoded(packet: av.Packet) -> list[av.VideoFrame] | None:
    """Decode a packet; None where it is damaged."""
    if packet.is_corrupt:
        return None
    try:
        return packet.decode()  # type: ignore[no-any-return]  # PyAV is untyped to us
    except av.error.InvalidDataError:
        return None


def _packets(container: av.container.InputContainer, title: str, patience_s: float) -> Iterator[tuple[av.Packet, int]]:
    packets = container.demux()
    while True:
        try:
            packet = next(packets, None)
        except av.error.ExitError:
            raise _silent(title, patience_s) from None
        except av.FFmpegError as error:
            raise StreamLostError(f"{title}: broke off ({error.strerror})") from None
        if packet is None:
            return
        yield packet, monotonic_us()


def _silent(title: str, patience_s: float) -> StreamLostError:
    return StreamLostError(f"{title}: no sound picture for {patience_s:g} s; is the camera still on?")


@contextmanager
def _opened(address: Address, patience_s: float) -> Iterator[av.container.InputContainer]:
    """Open a stream; what FFmpeg says of it may hold its URL, and is not passed on."""
    driver = {} if address.scheme else {"format": "v4l2"}
    options = _OPTIONS if address.scheme else {}
    try:
        opened = av.open(address.url, "r", options=dict(options), timeout=(patience_s, patience_s), **driver)
    except av.error.ExitError:
        raise OmniError(f"{address.title}: no answer for {patience_s:g} s; is it the right address?") from None
    except (av.error.InvalidDataError, av.error.OptionNotFoundError):
        raise DataError(f"{address.title}: sends no video that FFmpeg knows; check the address") from None
    except av.FFmpegError as error:
        if error.errno == errno.ENOTTY:
            raise DataError(f"{address.title}: no camera; give a device such as /dev/video0") from None
        raise OmniError(f"{address.title}: cannot be opened ({error.strerror}); check the address") from None
    with opened:
        yield opened


def _knock(address: Address, patience_s: float) -> None:
    found = urlsplit(address.url)
    try:
        socket.create_connection((found.hostname, found.port or _RTSP_PORT), timeout=patience_s).close()
    except OSError as error:
        why = error.strerror or str(error) or "no answer"
        raise OmniError(f"{address.title}: cannot be reached ({why.lower()}); check the address") from None


def _check_device(device: str) -> None:
    path = Path(device)
    if not path.exists():
        raise UsageError(f"{device}: no such device; ls /dev/video* lists the cameras of this machine")
    if not stat.S_ISCHR(path.stat().st_mode):
        raise DataError(f"{device}: no camera but a file; give a device such as /dev/video0")
    if not os.access(path, os.R_OK | os.W_OK):
        raise OmniError(f"{device}: permission denied; ask for the right to it (often: join the group video)")


def _title(url: str, scheme: str, rest: str) -> str:
    """Return of a URL what is no secret: the host and the port; a hash tells paths apart, which may hold a password.

    Raises:
        UsageError: it has no host, or none that can be looked up.
    """
    try:
        host, port = _host(url, scheme)
    except ValueError:
        raise UsageError(
            f"{scheme}://: such a URL needs a host, and a port up to 65535 if any: {scheme}://HOST:PORT/STREAM; "
            "of a password, percent-encode @ : / ? # (it is not shown)"
        ) from None
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    behind = rest[len(authority) :]
    is_sure = "@" in authority or "@" not in behind  # else what looks like a port may be a password: user:1/2@host
    shown = f"{host}:{port}" if port and is_sure else host
    if not behind.strip("/"):
        return f"{scheme}://{shown}"
    return f"{scheme}://{shown} ({hashlib.sha256(os.fsencode(behind)).hexdigest()[:_HASH_LENGTH]})"


def _host(url: str, scheme: str) -> tuple[str, int | None]:
    """Return the host of a URL, an address of IPv6 in brackets, and its port.

    Raises:
        ValueError: there is none, or it cannot be one.
    """
    found = urlsplit(url)
    host, port = found.hostname or "", found.port
    if port == 0 or not (host or (port and scheme in _LISTENING)):
        raise ValueError
    if ":" in host:
        return f"[{host}]", port
    if not re.fullmatch(r"[\w.-]*", host):
        raise ValueError
    host.encode("idna")  # labels that are empty or too long are a UnicodeError, which is a ValueError
    return host, port
