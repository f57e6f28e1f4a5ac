"""A hub on the loopback interface that takes model repositories: what huggingface_hub 2.4 asks of the real one to push.

whoami-v2, repos/create, validate-yaml, a repository's info and tree, preupload, the LFS batch with upload and verify,
and commits in ndjson. It believes nobody: a large file counts once its bytes have the hash it was announced by, and a
commit that names another is refused. Sources: huggingface_hub's own requests, git-lfs `docs/api/batch.md`.

    with serve_pushes() as hub:
        os.environ |= hub.environment
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_aVeryValidToken"
OF_A_MIRROR = "me:s3cret"  # a name and a password in its address, which clients send instead of a token
_BASIC = base64.b64encode(OF_A_MIRROR.encode()).decode()
ACCOUNT = "me"
LARGE_BYTES = 4096  # files from this size on are LFS files
BLOCK_BYTES = 4096
_NO_HEAD = "0" * 40


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD path` matches: a status, or a wait a block."""

    match: str
    status: int = 0
    times: int = 1
    block_s: float = 0.0


@dataclass
class Repository:
    """What one repository holds, by path, and its commits, oldest first."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1]["oid"] if self.commits else _NO_HEAD


@dataclass
class PushHub:
    """The hub's state; everything may be changed while it serves."""

    endpoint: str = ""
    writable: tuple[str, ...] = (ACCOUNT,)
    taken: frozenset[str] = frozenset()  # names of something else than a model
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by sha256: kept whoever commits them
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # METHOD path
    received: int = 0  # bytes of large files, whole or not
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def asked(self, pattern: str) -> list[str]:
        with self.lock:
            return [line for line in self.log if re.search(pattern, line)]

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            self.log.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None


@contextlib.contextmanager
def serve_pushes() -> Iterator[PushHub]:
    hub = PushHub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True
    hub: PushHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_any()

    def do_POST(self) -> None:
        self.handle_any()

    def do_PUT(self) -> None:
        self.handle_any()

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(f"{self.command} {path}")
        body = self.read_body(path, fault)
        if fault and fault.status:
            self.answer(fault.status, {"error": "scripted"})
        elif match := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            self.store(match[1], body)
        elif self.headers.get("Authorization") not in (f"Bearer {TOKEN}", f"Basic {_BASIC}"):
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        else:
            self.serve(path, body)

    def read_body(self, path: str, fault: Fault | None) -> bytes:
        left, blocks = int(self.headers.get("Content-Length") or 0), []
        while left and (block := self.rfile.read(min(left, BLOCK_BYTES))):
            blocks.append(block)
            left -= len(block)
            self.hub.received += len(block) if path.startswith("/storage/") else 0
            time.sleep(fault.block_s if fault else 0.0)
        return b"".join(blocks)

    def serve(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            self.answer(200, {"type": "user", "name": ACCOUNT, "orgs": []})
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.+))?", path):
            self.serve_repository(match[1], match[2] or "", body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(match[1], json.loads(body))
        elif match := re.fullmatch(r"/verify/([0-9a-f]{64})", path):
            self.answer(200 if json.loads(body)["oid"] == match[1] in self.hub.objects else 404, {})
        else:
            self.answer(404, {"error": "Not Found"})

    def validate(self, content: str) -> None:
        header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        is_card = header is not None and isinstance(yaml.safe_load(header[1]), dict)
        errors = [] if is_card else [{"message": "no YAML header"}]
        self.answer(200 if is_card else 400, {"errors": errors, "warnings": []})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or ACCOUNT}/{asked['name']}"
        if name.partition("/")[0] not in self.hub.writable:
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif name in self.hub.repositories or name in self.hub.taken:
            self.answer(409, {"error": "You already created this repo"})
        else:
            self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
            self.answer(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def serve_repository(self, name: str, rest: str, body: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest in ("", "revision/main"):
            self.answer(200, {"id": name, "sha": repository.head, "private": repository.private, "tags": [],
                              "siblings": []})  # fmt: skip
        elif rest.startswith("tree/"):
            self.answer(200, [entry(repository, path) for path in sorted(repository.files)])
        elif name.partition("/")[0] not in self.hub.writable:
            self.answer(403, {"error": "Forbidden: you must use a write token to upload to a repository."})
        elif rest == "preupload/main":
            self.answer(200, {"files": [self.mode(repository, one) for one in json.loads(body)["files"]]})
        elif rest == "commit/main":
            self.commit(repository, name, [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404, {"error": "Not Found"})

    def mode(self, repository: Repository, asked: dict[str, Any]) -> dict[str, Any]:
        is_large = asked["size"] >= LARGE_BYTES
        known = entry(repository, asked["path"]) if asked["path"] in repository.files else {}
        oid = known.get("lfs", known).get("oid") if known else None
        return {
            "path": asked["path"],
            "uploadMode": "lfs" if is_large else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    def batch(self, name: str, asked: dict[str, Any]) -> None:
        if name.partition("/")[0] not in self.hub.writable:
            return self.answer(403, {"error": "Forbidden"})
        return self.answer(200, {"transfer": "basic", "objects": [self.actions(one) for one in asked["objects"]]})

    def actions(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        upload, verify = (f"{self.hub.endpoint}/{verb}/{wanted['oid']}" for verb in ("storage", "verify"))
        signed = {"href": f"{upload}?signature=secret-signature"}
        return {**wanted, "actions": {"upload": signed, "verify": {"href": verify}}}

    def store(self, oid: str, body: bytes) -> None:
        is_right = hashlib.sha256(body).hexdigest() == oid
        if is_right:
            self.hub.objects[oid] = body
        self.answer(200 if is_right else 400, {})

    def commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        header, *operations = lines
        parent = header["value"].get("parentCommit", repository.head)
        if parent != repository.head:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        changed = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del changed[value["path"]]
            elif operation["key"] == "lfsFile" and value["oid"] not in self.hub.objects:
                return self.answer(400, {"error": f"the object {value['oid']} was not uploaded"})
            else:
                is_large = operation["key"] == "lfsFile"
                changed[value["path"]] = (
                    self.hub.objects[value["oid"]] if is_large else base64.b64decode(value["content"])
                )
                (repository.large.add if is_large else repository.large.discard)(value["path"])
        repository.files = changed
        oid = hashlib.sha1(json.dumps([repository.head, lines]).encode()).hexdigest()
        repository.commits.append({"oid": oid, "summary": header["value"]["summary"]})
        return self.answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid,
                                 "success": True})  # fmt: skip

    def answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        said = {"X-Error-Message": document["error"]} if isinstance(document, dict) and "error" in document else {}
        for key, value in {**said, **(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def entry(repository: Repository, path: str) -> dict[str, Any]:
    """Return what a tree says of a file."""
    content = repository.files[path]
    sha256 = hashlib.sha256(content).hexdigest()
    known = {"type": "file", "path": path, "size": len(content)}
    if path not in repository.large:
        return {**known, "oid": git_sha1(content)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    large = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
    return {**known, "oid": git_sha1(pointer), "lfs": large}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
