"""A published folder goes to a hub: what differs from the repository, in one commit.

Files are compared by the hashes that the hub lists: sha256 of large files, git's own of small ones. What a killed push
had sent the hub keeps, and it is not sent again; only the commit makes it visible.
"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash

from omni_cli import __version__, files
from omni_cli.downloads import Hub, Patience, open_hub
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.report import Console, counted
from omni_cli.stages.push_errors import explain_push

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Of another push: a loader would take them for a part of this model.
_OUTDATED = ("*.safetensors", "*.safetensors.index.json", "*.onnx", "*.onnx.data", "adapter_config.json")
_FAILURES = (HfHubHTTPError, httpx2.HTTPError, RuntimeError, ValueError, OSError)


@dataclass(frozen=True)
class PushRequest:
    """What a user asked of `omni export --push-to-hub`."""

    repository: str  # ORG/NAME
    public: bool = False  # of a repository that is made now
    licence: str | None = None  # named to push all the same, where the licence of the data forbids it
    dry_run: bool = False


@dataclass(frozen=True)
class Difference:
    """What a push would change."""

    exists: bool  # the repository does
    head: str | None  # its last commit
    changed: tuple[str, ...]  # files here that it lacks or holds otherwise
    outdated: tuple[str, ...]  # weights there that are not here
    changed_bytes: int

    @property
    def is_nothing(self) -> bool:
        """Say whether the repository holds all of it already."""
        return self.exists and not self.changed and not self.outdated


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        UsageError: it is none.
    """
    if not _NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        raise UsageError(f"--push-to-hub {name}: expected ORGANISATION/NAME, of letters, digits, '-', '_' and '.'")


def push(folder: Path, request: PushRequest, console: Console) -> dict[str, Any]:
    """Bring a repository of the hub to what a sealed folder holds; a dry run only compares.

    Raises:
        DataError: a file is not what the folder's receipt says.
        OmniError: no token, no right, no hub, or another's push came between.
    """
    _check_token()
    hub = open_hub(request.repository, Patience())
    try:
        return _push(hub, folder, request, console)
    except _FAILURES as error:
        raise explain_push(error, request.repository, hub.host) from None


def _push(hub: Hub, folder: Path, request: PushRequest, console: Console) -> dict[str, Any]:
    api, address = hub.api, hub.page
    found = compare(api, folder, request.repository)
    told = {"repository": request.repository, "url": address, "files": list(found.changed), "dry_run": request.dry_run,
            "bytes": found.changed_bytes, "deleted": list(found.outdated), "commit": found.head}  # fmt: skip
    if found.is_nothing:
        console.say(f"{address} holds all of it already, at {found.head}; nothing to push")
        return told
    amount = f"{counted(len(found.changed), 'file')}, {found.changed_bytes / 1e6:.1f} MB"
    if request.dry_run:
        new = "" if found.exists else f", a new {'public' if request.public else 'private'} repository"
        console.say(f"would push {amount} to {address}{new}; {counted(len(found.outdated), 'outdated file')} deleted")
        return told
    operations = _operations(folder, found)
    if not found.exists:
        api.create_repo(request.repository, private=not request.public)
        console.say(f"made {address}, {'public' if request.public else 'private (--public opens a new one)'}")
    console.say(f"pushing {amount} to {address}")
    commit = api.create_commit(
        request.repository,
        operations,
        commit_message=f"{folder.name} by omni {__version__}",
        parent_commit=found.head,
    )
    console.say(f"pushed: {address} at {commit.oid}")
    return {**told, "commit": commit.oid}


def compare(api: HfApi, folder: Path, repository: str) -> Difference:
    """Return what of a sealed folder a repository does not hold.

    Raises:
        HfHubHTTPError: it cannot be read.
    """
    listed = (files.read_receipt(folder) or {})["files"]
    try:
        head = api.repo_info(repository).sha
        entries = api.list_repo_tree(repository, recursive=True) if head else ()
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        exists = True
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:  # a token that is refused
            raise
        head, there, exists = None, {}, False
    changed = tuple(name for name, facts in listed.items() if not _is_there(folder / name, facts, there.get(name)))
    outdated = tuple(name for name in there if name not in listed and _is_outdated(name))
    return Difference(exists, head, changed, outdated, sum(listed[name]["size"] for name in changed))


def _is_there(path: Path, facts: dict[str, Any], entry: RepoFile | None) -> bool:
    if entry is None or entry.size != facts["size"]:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == facts["sha256"])
    return bool(entry.blob_id == git_hash(path.read_bytes()))


def _is_outdated(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _OUTDATED)


def _operations(folder: Path, found: Difference) -> Sequence[CommitOperationAdd | CommitOperationDelete]:
    """Return what the commit does; the hashes that it announces are those of the receipt.

    Raises:
        DataError: a file is not what the receipt says.
    """
    listed = (files.read_receipt(folder) or {})["files"]
    added = [CommitOperationAdd(name, str(folder / name)) for name in found.changed]
    for one in added:
        if one.upload_info.sha256.hex() != listed[one.path_in_repo]["sha256"]:
            raise DataError(f"{folder / one.path_in_repo}: is not what its receipt says; run the same command again")
    return [*added, *(CommitOperationDelete(name) for name in found.outdated)]


def _check_token() -> None:
    if get_token() is None:
        raise OmniError(
            "no token was found: make a write token at https://huggingface.co/settings/tokens, and run "
            "`hf auth login` or set HF_TOKEN"
        )
