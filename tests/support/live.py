"""Small servers of live video: MPEG-TS over HTTP, and H.264 over RTSP as cameras speak it (RFC 2326, 6184)."""

import base64
import io
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np

_HEADERS = {"mpegts": {"mpegts_flags": "resend_headers"}}
_FIRST_TICK = 3_000_000  # RFC 3550: the clock of a stream begins anywhere
Step = bytes | Callable[[], object]  # what is sent, or waited for


def pictures(count: int, *, width: int = 96, height: int = 54) -> list[np.ndarray]:
    """Pictures that all differ."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width + 2 * count, 3), dtype=np.uint8)
    return [np.ascontiguousarray(noise[:, 2 * k : 2 * k + width] // 4 + k % 180) for k in range(count)]


def encoded(frames: Sequence[np.ndarray], times_s: Sequence[float], *, form: str = "mpegts", gop: int = 10) -> bytes:
    """Encode frames at given times."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=form, options=_HEADERS.get(form, {})) as container:
        track = container.add_stream("libx264", rate=20)
        track.height, track.width = frames[0].shape[:2]
        track.pix_fmt, track.time_base = "yuv420p", Fraction(1, 90_000)
        track.codec_context.time_base = Fraction(1, 90_000)
        track.options = {"preset": "ultrafast", "g": str(gop), "bf": "0", "tune": "zerolatency"}
        for frame, at_s in zip(frames, times_s, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = round(at_s * 90_000), Fraction(1, 90_000)
            container.mux(track.encode(picture))
        container.mux(track.encode(None))
    return stream.getvalue()


@contextmanager
def served(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve connections one after the other on a port of this machine; yield the port."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.1)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            connection.settimeout(10)
            with connection:
                try:
                    answer(connection)
                except (OSError, EOFError):
                    continue  # who watched has left

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        over.set()
        thread.join()
        listening.close()


def over_http(steps: Iterable[Step]) -> Callable[[socket.socket], None]:
    """Answer any request with the bytes of the steps, as they come; FFmpeg takes an end without chunks for an error."""

    def answer(connection: socket.socket) -> None:
        _request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\nTransfer-Encoding: chunked\r\n\r\n")
        for step in steps:
            if isinstance(step, bytes):
                connection.sendall(b"%x\r\n%s\r\n" % (len(step), step))
            else:
                step()
        connection.sendall(b"0\r\n\r\n")

    return answer


def over_rtsp(video: bytes, *, password: str = "", is_paced: bool = False) -> Callable[[socket.socket], None]:
    """Play an H.264 file once for who knows `user:password`, RTP inside the connection, then close it.

    Args:
        video: in MPEG-TS.
        password: none is asked for where it is empty.
        is_paced: each picture is sent when it is its time, as a camera does.
    """

    def answer(connection: socket.socket) -> None:
        units = list(_nal_units(video))
        parameters = ",".join(base64.b64encode(unit).decode() for _, unit in units[:2])
        sdp = (
            "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
            "a=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1;"
            f"sprop-parameter-sets={parameters}\r\na=control:track1\r\n"
        )
        expected = base64.b64encode(f"user:{password}".encode()).decode()
        while request := _request(connection):
            verb, sequence = request.split()[0], re.search(r"CSeq: (\d+)", request)[1]
            head = f"CSeq: {sequence}\r\nSession: 1\r\n"
            if password and verb != "OPTIONS" and f"Authorization: Basic {expected}" not in request:
                connection.sendall(
                    f'RTSP/1.0 401 Unauthorized\r\n{head}WWW-Authenticate: Basic realm="x"\r\n\r\n'.encode()
                )
                continue
            if verb == "SETUP":
                head += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
            body = sdp if verb == "DESCRIBE" else ""
            if body:
                head += f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"RTSP/1.0 200 OK\r\n{head}\r\n{body}".encode())
            if verb == "PLAY":
                began_s = time.monotonic()
                for at_s, packet in _rtp(units):
                    time.sleep(max(0.0, began_s + at_s - time.monotonic()) if is_paced else 0.0)
                    connection.sendall(packet)
                return

    return answer


def _request(connection: socket.socket) -> str:
    """Read one request; nothing where the connection is closed."""
    read = b""
    while not read.endswith(b"\r\n\r\n"):
        if not (byte := connection.recv(1)):
            return ""
        read += byte
    return read.decode()


def _nal_units(video: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (time at 90 kHz, unit) of a file of H.264 in MPEG-TS."""
    with av.open(io.BytesIO(video)) as container:
        for packet in container.demux(video=0):
            for unit in re.split(rb"\x00\x00\x00?\x01", bytes(packet))[1:]:
                if unit[0] & 31 in (1, 5, 7, 8):  # slices and parameter sets
                    yield packet.pts, unit


def _rtp(units: Sequence[tuple[int, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield (seconds since the first, single-unit packet framed for RTSP); the last one of a picture is marked."""
    for number, (pts, unit) in enumerate(units):
        is_last = number + 1 == len(units) or units[number + 1][0] != pts
        packet = (
            struct.pack(">BBHII", 0x80, 96 | (0x80 if is_last else 0), number, (_FIRST_TICK + pts) & 0xFFFFFFFF, 7)
            + unit
        )
        yield (pts - units[0][0]) / 90_000, b"$\x00" + struct.pack(">H", len(packet)) + packet
