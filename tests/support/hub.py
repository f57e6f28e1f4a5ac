"""A hub on the loopback interface: one dataset repository from a folder, its storage on another port, scripted faults.

It speaks what huggingface_hub 2.4 asks of the real one when it reads: the API (revision, paths-info, tree), `resolve`
with the hub's headers, and for large files a redirect to a storage server of another origin, with ranges.

    with serve_hub(folder) as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint
"""

import contextlib
import hashlib
import json
import re
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
    """What goes wrong with the next `times` requests whose `SERVER METHOD path` matches."""

    match: str
    kind: str  # status, reset or flip
    status: int = 500
    after: int = 0  # bytes sent before a reset; the byte whose lowest bit is flipped
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Handled:
    """One request that was answered."""

    server: str  # hub or storage
    method: str
    path: str
    status: int
    sent: int
    had_token: bool


@dataclass
class LoopbackHub:
    """The repository's state; everything may be changed while it serves."""

    commit: str
    stored: dict[str, Stored]
    endpoint: str = ""
    storage: str = ""
    token: str | None = None  # what a gated repository asks for
    accepted: bool = True  # whether that token's account accepted the terms
    pruned: set[str] = field(default_factory=set)  # listed, and yet 404
    bytes_per_second: float | None = None
    faults: list[Fault] = field(default_factory=list)
    log: list[Handled] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None

    def sent(self, pattern: str = "") -> int:
        """Return the bytes of file content that left, for paths that match."""
        large = {stored.sha256: stored.path for stored in self.stored.values()}
        with self.lock:
            named = [(large.get(entry.path.rpartition("/")[2], entry.path), entry.sent) for entry in self.log]
        return sum(count for path, count in named if re.search(pattern, path))


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
    hub: LoopbackHub
    name: str

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
        self.active = self.hub.fault(f"{self.name} {self.command} {path}")
        if self.active and self.active.kind == "status":
            self.answer(self.active.status, {"error": "scripted"}, self.active.headers)
        elif self.name == "storage":
            self.serve_storage(path)
        elif path.startswith(f"/api/datasets/{REPOSITORY}"):
            self.serve_api(path.removeprefix(f"/api/datasets/{REPOSITORY}").strip("/"), body)
        elif match := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/([^/]+)/(.+)", path):
            self.serve_resolve(match[1], match[2])
        else:
            self.refuse(404, "RepoNotFound")

    def serve_api(self, rest: str, body: str) -> None:
        verb, _, argument = rest.partition("/")
        revision, _, folder = argument.partition("/")
        if revision not in ("", "main", self.hub.commit):
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
            location = f"{self.hub.storage}/{item.sha256}?signature=secret"
            linked = {"X-Linked-Etag": f'"{item.sha256}"', "X-Linked-Size": str(item.size), "Location": location}
            self.answer(302, {}, {"X-Repo-Commit": self.hub.commit, "ETag": f'"{item.git_sha1}"', **linked})
        else:
            self.send_content(item, {"X-Repo-Commit": self.hub.commit, "ETag": f'"{item.git_sha1}"'})

    def is_admitted(self) -> bool:
        """Answer as the hub does for a gated repository: 401 without a valid token, 403 without accepted terms."""
        if self.hub.token is None:
            return True
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.refuse(401, "GatedRepo")
            return False
        if not self.hub.accepted:
            self.refuse(403, "GatedRepo")
        return self.hub.accepted

    def serve_storage(self, path: str) -> None:
        item = next((item for item in self.hub.stored.values() if item.sha256 == path.strip("/")), None)
        if item is None:
            self.answer(404, {"error": "no such key"})
        else:
            self.send_content(item, {"ETag": f'"{item.sha256}"'})

    def send_content(self, item: Stored, headers: dict[str, str]) -> None:
        content, start, fault = bytearray(item.place.read_bytes()), 0, self.active
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{item.size - 1}/{item.size}"
        if fault and fault.kind == "flip":
            content[fault.after] ^= 1
        status = 206 if start else 200
        self.send_head(status, {**headers, "Accept-Ranges": "bytes", "Content-Length": str(item.size - start)})
        if self.command == "HEAD":
            return self.note(status, 0)
        end = fault.after if fault and fault.kind == "reset" else item.size
        sent = self.send_slowly(bytes(content[start:end]))
        self.note(status, sent)
        if end < item.size:
            self.reset()
        return None

    def send_slowly(self, content: bytes) -> int:
        sent = 0
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(content), BLOCK_BYTES):
                block = content[start : start + BLOCK_BYTES]
                self.wfile.write(block)
                sent += len(block)
                if self.hub.bytes_per_second:
                    time.sleep(len(block) / self.hub.bytes_per_second)
        return sent

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.flush()
        time.sleep(0.1)  # or the kernel drops what the client has not read yet
        self.connection.close()

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_head(
            status, {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(body))}
        )
        if self.command != "HEAD":
            self.wfile.write(body)
        self.note(status, 0)

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def note(self, status: int, sent: int) -> None:
        path, had_token = unquote(urlsplit(self.path).path), "Authorization" in self.headers
        with self.hub.lock:
            self.hub.log.append(Handled(self.name, self.command, path, status, sent, had_token))
