"""A hub on the loopback interface: one dataset repository from a folder, its storage on another port, scripted faults.

It speaks what huggingface_hub 2.4 asks of the real one when it reads: the API (revision, paths-info, tree), `resolve`
with the hub's headers, and for large files a redirect to a storage server of another origin, with ranges and addresses
that are signed and may expire.

    with serve_hub(folder) as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint
"""

import contextlib
import gzip
import hashlib
import hmac
import json
import re
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "nvidia/PhysicalAI-Autonomous-Vehicles"
LARGE_BYTES = 4096  # files from this size on are LFS files: sha256, and stored elsewhere
BLOCK_BYTES = 16_384
SURPLUS = b"HTTP/1.1 200 OK\r\n\r\nmore than was promised"
OTHER = {"other-file": b"another file", "page": b"<html>Welcome to this hotel</html>"}
SEND_BUFFER_BYTES = 65_536  # little, so that what was sent was nearly received


@dataclass(frozen=True)
class Stored:
    """One file of the repository."""

    path: str
    place: Path
    size: int
    sha256: str
    git_sha1: str

    @property
    def is_large(self) -> bool:
        return self.size >= LARGE_BYTES


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `SERVER METHOD path` matches, after `skip` that pass.

    Instead of an answer: status, html, json (a document that no hub sends), loop (a redirect to itself), silent for
    `seconds`, trickle (a head of one byte each `seconds`), refuse (RST).
    Of content: reset (RST), fin, stall for `seconds` and drip (one byte each `seconds`) after `after` bytes of the
    body; flip (the lowest bit of byte `after` of the file); whole (200 for a range), other-range, no-range (416),
    short and long (a wrong Content-Length), no-length; surplus (bytes after the Content-Length), overlong (the same in
    an answer without a length), other-total (of a longer file), gzip (although it was not asked for), page (a web page
    of the right length that says it is data), other-file (of another ETag).
    """

    match: str
    kind: str
    status: int = 500
    after: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    skip: int = 0


@dataclass
class Handled:
    """One request that was answered; `sent` counts the content before it leaves."""

    server: str  # hub or storage
    method: str
    path: str
    status: int
    sent: int
    had_token: bool
    range: str | None = None


@dataclass
class LoopbackHub:
    """The repository's state; everything may be changed while it serves."""

    commit: str
    stored: dict[str, Stored]
    endpoint: str = ""
    storage: str = ""
    token: str | None = None  # what a gated repository asks for
    accepted: bool = True  # whether that token's account accepted the terms
    denial: str = "Access to dataset is restricted and you are not in the authorized list."  # said where it did not
    ignores_ranges: bool = False
    signed_s: float = 3600.0  # how long a signed address lives
    pruned: set[str] = field(default_factory=set)  # listed, and yet 404
    bytes_per_second: float | None = None
    faults: list[Fault] = field(default_factory=list)
    log: list[Handled] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    key: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.skip -= 1
                    if fault.skip < 0:
                        fault.times -= 1
                        return fault
        return None

    def sent(self, pattern: str = "") -> int:
        """Return the bytes of file content that left, for paths that match."""
        large = {stored.sha256: stored.path for stored in self.stored.values()}
        with self.lock:
            named = [(large.get(entry.path.rpartition("/")[2], entry.path), entry.sent) for entry in self.log]
        return sum(count for path, count in named if re.search(pattern, path))

    def asked(self, pattern: str) -> list[Handled]:
        """Return the requests whose `SERVER METHOD path` matches."""
        with self.lock:
            return [entry for entry in self.log if re.search(pattern, f"{entry.server} {entry.method} {entry.path}")]

    def sign(self, item: Stored) -> str:
        expires = f"{time.monotonic() + self.signed_s:.3f}"
        return f"{self.storage}/{item.sha256}?expires={expires}&signature={self._signature(item.sha256, expires)}"

    def is_signed(self, name: str, query: dict[str, list[str]]) -> bool:
        expires, signature = query.get("expires", ["0"])[0], query.get("signature", [""])[0]
        return signature == self._signature(name, expires) and time.monotonic() < float(expires)

    def _signature(self, name: str, expires: str) -> str:
        return f"secret-{hmac.new(self.key, f'{name} {expires}'.encode(), 'sha256').hexdigest()[:16]}"


@contextlib.contextmanager
def serve_hub(folder: Path, revision: str | None = None, *, port: int = 0) -> Iterator[LoopbackHub]:
    """Serve a folder in the dataset's layout until the block ends; receipts and hidden files stay out of sight."""
    stored = {item.path: item for item in sorted(_scan(folder), key=lambda item: item.path)}
    names = "\n".join(f"{item.path} {item.git_sha1}" for item in stored.values())
    hub = LoopbackHub(revision or hashlib.sha1(names.encode()).hexdigest(), stored)
    servers = [_start(hub, "storage", 0), _start(hub, "hub", port)]
    hub.storage, hub.endpoint = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def _scan(folder: Path) -> Iterator[Stored]:
    for place in folder.rglob("*"):
        path = place.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in path.split("/"))
        if place.is_file() and not hidden and not path.endswith(".receipt.json"):
            content = place.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            blob = content if len(content) < LARGE_BYTES else _pointer(sha256, len(content))
            git_sha1 = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
            yield Stored(path, place, len(content), sha256, git_sha1)


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what these tests are about."""


def _start(hub: LoopbackHub, name: str, port: int) -> _Server:
    handler = type("Handler", (_Handler,), {"hub": hub, "name": name})
    server = _Server(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True
    hub: LoopbackHub
    name: str

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.handle_any()

    def do_GET(self) -> None:
        self.handle_any()

    def do_POST(self) -> None:
        self.handle_any()

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(urlsplit(self.path).path)
        self.active = self.hub.fault(f"{self.name} {self.command} {path}") or Fault("", "none", times=0)
        if self.is_spoilt():
            return
        if self.name == "storage":
            self.serve_storage(path.strip("/"))
        elif path.startswith(f"/api/datasets/{REPOSITORY}"):
            self.serve_api(path.removeprefix(f"/api/datasets/{REPOSITORY}").strip("/"), body)
        elif match := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/([^/]+)/(.+)", path):
            self.serve_resolve(match[1], match[2])
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")

    def is_spoilt(self) -> bool:
        """Give what a fault gives instead of an answer; return whether it did."""
        fault = self.active
        match fault.kind:
            case "status":
                self.answer(fault.status, {"error": "scripted"}, fault.headers)
            case "html":
                self.answer(200, "<html>Welcome to this hotel</html>", {"Content-Type": "text/html"})
            case "json":
                self.answer(200, {"welcome": "to this hotel"})
            case "loop":
                self.answer(302, {}, {"Location": self.path})
            case "silent":
                self.hang_up(fault.seconds)
            case "trickle":
                self.trickle(b"HTTP/1.1 200 OK\r\nX-Filler: " + b"x" * 10_000, fault.seconds)
            case "refuse":
                self.reset()
            case _:
                return False
        return True

    def serve_api(self, rest: str, body: str) -> None:
        verb, _, argument = rest.partition("/")
        revision, _, folder = argument.partition("/")
        if self.hub.token is not None and self.headers.get("Authorization") not in (None, f"Bearer {self.hub.token}"):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif revision not in ("", "main", self.hub.commit):
            self.refuse(404, "RevisionNotFound")
        elif verb in ("", "revision"):
            self.answer(200, {"id": REPOSITORY, "sha": self.hub.commit, "private": False, "tags": [], "siblings": []})
        elif verb == "paths-info":
            wanted = parse_qs(body).get("paths", [])
            self.answer(200, [self.entry(self.hub.stored[path]) for path in wanted if path in self.hub.stored])
        elif verb == "tree":
            inside = [item for item in self.hub.stored.values() if not folder or item.path.startswith(f"{folder}/")]
            self.answer(200, [self.entry(item) for item in inside])
        else:
            self.refuse(404, "NotFound")

    def entry(self, item: Stored) -> dict[str, Any]:
        entry = {"type": "file", "oid": item.git_sha1, "size": item.size, "path": item.path}
        large = {"oid": item.sha256, "size": item.size, "pointerSize": 130}
        return {**entry, "lfs": large} if item.is_large else entry

    def serve_resolve(self, revision: str, path: str) -> None:
        item = self.hub.stored.get(path)
        if not self.is_admitted():
            return
        if revision not in ("main", self.hub.commit):
            self.refuse(404, "RevisionNotFound")
        elif item is None or path in self.hub.pruned:
            self.refuse(404, "EntryNotFound")
        elif item.is_large:
            linked = {"X-Linked-Etag": f'"{item.sha256}"', "X-Linked-Size": str(item.size)}
            named = {"X-Repo-Commit": self.hub.commit, "ETag": f'"{item.git_sha1}"', "Location": self.hub.sign(item)}
            self.answer(302, {}, named | linked)
        else:
            self.send_content(item, {"X-Repo-Commit": self.hub.commit, "ETag": f'"{item.git_sha1}"'})

    def is_admitted(self) -> bool:
        """Answer as the hub does for a gated repository: 401 without a valid token, 403 without accepted terms."""
        if self.hub.token is None:
            return True
        given = self.headers.get("Authorization")
        if given is None:
            self.refuse(401, "GatedRepo", "Access to dataset is restricted. You must be authenticated. Please log in.")
        elif given != f"Bearer {self.hub.token}":
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif not self.hub.accepted:
            self.refuse(403, "GatedRepo", self.hub.denial)
        return given == f"Bearer {self.hub.token}" and self.hub.accepted

    def serve_storage(self, name: str) -> None:
        item = next((item for item in self.hub.stored.values() if item.sha256 == name), None)
        if item is None:
            self.answer(404, {"error": "no such key"})
        elif not self.hub.is_signed(name, parse_qs(urlsplit(self.path).query)):
            self.answer(403, "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        else:
            self.send_content(item, {"ETag": f'"{item.sha256}"'})

    def send_content(self, item: Stored, headers: dict[str, str]) -> None:
        fault, content = self.active, bytearray(item.place.read_bytes())
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, item.size
        if asked and fault.kind != "whole" and not self.hub.ignores_ranges:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, item.size) if asked[2] else item.size
            headers["Content-Range"] = f"bytes {start + (fault.kind == 'other-range')}-{stop - 1}/{item.size}"
        if start >= max(stop, 1) or fault.kind == "no-range":
            return self.answer(416, {}, {"Content-Range": f"bytes */{item.size}"})
        if fault.kind == "flip":
            content[fault.after] ^= 1
        if fault.kind in ("other-file", "page"):
            content, headers["ETag"] = bytearray(OTHER[fault.kind].ljust(item.size, b" ")[: item.size]), '"another"'
        if fault.kind == "other-total" and "Content-Range" in headers:
            headers["Content-Range"] += "0"
        if fault.kind == "gzip":
            return self.send_packed(bytes(content[start:stop]), headers)
        status = 206 if "Content-Range" in headers else 200
        declared = stop - start + {"short": -1, "long": 1}.get(fault.kind, 0)
        length = {} if fault.kind in ("no-length", "overlong") else {"Content-Length": str(declared)}
        entry = self.note(status)
        self.send_head(status, {"Accept-Ranges": "bytes", **headers, **length})
        body = bytes(content[start:stop][:declared]) + (SURPLUS if fault.kind in ("surplus", "overlong") else b"")
        return None if self.command == "HEAD" else self.send_body(body, entry)

    def send_packed(self, content: bytes, headers: dict[str, str]) -> None:
        body, status = gzip.compress(content, 1), 206 if "Content-Range" in headers else 200
        self.note(status)
        self.send_head(status, {**headers, "Content-Encoding": "gzip", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def send_body(self, content: bytes, entry: Handled) -> None:
        fault = self.active
        is_cut = fault.kind in ("reset", "fin", "stall", "drip")
        self.send_slowly(content[: fault.after] if is_cut else content, entry)
        if fault.kind == "drip":
            entry.sent += self.trickle(content[fault.after :], fault.seconds)
        if fault.kind == "stall":
            self.hang_up(fault.seconds)
        if fault.kind == "reset":
            self.reset()
        if fault.kind in ("fin", "long", "no-length", "overlong"):
            self.close_connection = True

    def send_slowly(self, content: bytes, entry: Handled) -> None:
        for start in range(0, len(content), BLOCK_BYTES):
            block = content[start : start + BLOCK_BYTES]
            entry.sent += len(block)
            try:
                self.wfile.write(block)
            except OSError:
                entry.sent -= len(block)
                return
            if self.hub.bytes_per_second:
                time.sleep(len(block) / self.hub.bytes_per_second)

    def trickle(self, content: bytes, seconds: float) -> int:
        """Send byte after byte; the connection ends with them."""
        self.close_connection = True
        for count, byte in enumerate(content):
            try:
                self.connection.sendall(bytes([byte]))
            except OSError:
                return count
            time.sleep(seconds)
        return len(content)

    def hang_up(self, seconds: float) -> None:
        """Wait until the client gives up, or that long."""
        self.close_connection = True
        self.connection.settimeout(seconds)
        with contextlib.suppress(OSError):
            self.connection.recv(1)

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.flush()
        time.sleep(0.1)  # or the kernel drops what the client has not read yet
        self.connection.close()

    def refuse(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message or code}
        self.answer(status, {"error": message or code}, {key: value for key, value in headers.items() if value})

    def answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
        kind = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.note(status)
        self.send_head(status, kind | (headers or {}))
        if self.command != "HEAD" and self.active.kind == "drip":
            self.trickle(body, self.active.seconds)
        elif self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for key, value in {"Date": self.date_time_string(), **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def note(self, status: int) -> Handled:
        path, had_token = unquote(urlsplit(self.path).path), "Authorization" in self.headers
        entry = Handled(self.name, self.command, path, status, 0, had_token, self.headers.get("Range"))
        with self.hub.lock:
            self.hub.log.append(entry)
        return entry
