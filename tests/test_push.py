"""A push brings a repository to what a folder holds, in one commit, whatever is killed or refused on the way."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from omni_cli import files
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.report import Console
from omni_cli.stages import runs
from omni_cli.stages.push import PushRequest, check_repository, push
from tests.support import push_once
from tests.support.hub_push import LARGE_BYTES, OF_A_MIRROR, TOKEN, Fault

# huggingface_hub 2.4 hands httpx2 a large file in the old way
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "me/drive"
CARD = "---\ntags:\n- omni\n---\n\n# drive\n"


@pytest.fixture
def hub(push_hub):
    return push_hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "hf"
    files.write_text(folder / "README.md", CARD)
    files.write_text(folder / "config.json", "{}")
    for number in (1, 2):
        files.write_bytes(folder / f"model-{number}.safetensors", bytes([number]) * (20 * LARGE_BYTES + number))
    runs.seal_folder(folder)
    return folder


def send(folder, console=None, **options):
    return push(folder, PushRequest(NAME, **options), console or Console(quiet=True))


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(folder: Path, name: str, content: bytes) -> None:
    files.write_bytes(folder / name, content)
    runs.seal_folder(folder)


def test_what_arrives_is_what_was_sent_in_one_private_commit(hub, folder):
    result = send(folder)
    repository = hub.repositories[NAME]
    assert repository.files == held(folder)
    assert (repository.private, len(repository.commits)) == (True, 1)
    assert (result["commit"], result["url"]) == (repository.head, f"{hub.endpoint}/{NAME}")
    assert sorted(result["files"]) == sorted(held(folder))
    assert result["bytes"] == sum(map(len, held(folder).values()))
    assert repository.commits[0]["summary"].startswith("hf by omni ")


def test_credentials_in_the_address_of_the_hub_are_not_told(hub, folder, monkeypatch, capsys):
    send(folder)
    capsys.readouterr()
    with_secret = hub.endpoint.replace("://", f"://{OF_A_MIRROR}@")
    monkeypatch.setenv("HF_ENDPOINT", with_secret)
    result = send(folder, Console())
    assert "s3cret" not in capsys.readouterr().err + json.dumps(result)
    assert result["url"] == f"{hub.endpoint}/{NAME}"


def test_a_new_repository_is_public_where_that_is_asked(hub, folder):
    send(folder, public=True)
    assert not hub.repositories[NAME].private


def test_again_nothing_is_pushed(hub, folder, capsys):
    send(folder)
    hub.log.clear()
    result = send(folder, Console())
    assert "holds all of it already" in capsys.readouterr().err
    assert (result["files"], result["commit"]) == ([], hub.repositories[NAME].head)
    assert not hub.asked("POST|PUT")
    assert len(hub.repositories[NAME].commits) == 1


def test_only_what_differs_is_pushed_and_outdated_weights_go(hub, folder):
    send(folder)
    hub.repositories[NAME].files[".gitattributes"] = b"*.safetensors filter=lfs"
    hub.log.clear()
    (folder / "model-2.safetensors").unlink()
    change(folder, "model-1.safetensors", b"other" * LARGE_BYTES)
    result = send(folder)
    assert (result["files"], result["deleted"]) == (["model-1.safetensors"], ["model-2.safetensors"])
    assert len(hub.asked("PUT /storage/")) == 1
    assert hub.repositories[NAME].files == {**held(folder), ".gitattributes": b"*.safetensors filter=lfs"}
    assert len(hub.repositories[NAME].commits) == 2


@pytest.mark.parametrize("is_there", [False, True])
def test_a_dry_run_compares_and_changes_nothing(hub, folder, capsys, is_there):
    if is_there:
        send(folder)
        change(folder, "config.json", b"[]")
    hub.log.clear()
    result = send(folder, Console(), dry_run=True)
    assert not hub.asked("POST|PUT")
    said = capsys.readouterr().err
    assert result["files"] == (["config.json"] if is_there else sorted(held(folder)))
    assert "would push" in said
    assert ("a new private repository" in said) != is_there


@pytest.mark.fault("F1")
def test_a_killed_push_is_finished_and_what_arrived_is_not_sent_again(hub, folder):
    first = folder / "model-1.safetensors"
    hub.faults.append(Fault(f"PUT /storage/{files.sha256_of(first)}", block_s=60.0))
    process = push_once.start(folder, NAME)
    try:
        wait_until(lambda: len(hub.objects) == 1 and hub.received > first.stat().st_size)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not hub.repositories[NAME].commits  # nobody sees a half
    hub.faults.clear()
    hub.log.clear()
    send(folder)
    assert hub.repositories[NAME].files == held(folder)
    assert len(hub.asked("PUT /storage/")) == 1


def wait_until(is_so) -> None:
    limit = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize("what", ["PUT /storage/", "POST .*/preupload/"])
def test_a_passing_failure_of_the_server_is_outlasted(hub, folder, what, capsys):
    hub.faults.append(Fault(what, status=503))
    send(folder)
    assert hub.repositories[NAME].files == held(folder)
    assert "signature" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("GET /api/models", 401), "answers 401 for me/drive: the token was refused; make a new write token"),
        (Fault("POST /api/repos/create", 403), "answers 403 for me/drive: this token may not write to me; make one"),
        (Fault("POST .*/preupload", 403), "answers 403 for me/drive: this token may not write to me; make one"),
        (Fault("POST .*/commit", 403), "answers 403 for me/drive: this token may not write to me; make one"),
        (Fault("POST .*/commit", 400), "answers 400 for me/drive: it takes what was sent for invalid, and would again"),
        (Fault("POST .*/commit", 412), "was changed by another push meanwhile; run the same command again"),
        (Fault("POST .*/commit", 500), "answers 500 for me/drive; what has arrived is kept: run the same command"),
        (Fault("PUT /storage/", 403, times=9), "answers 403 for me/drive"),
    ],
)
def test_a_refusal_is_one_line_without_a_secret(hub, folder, fault, message):
    hub.faults.append(fault)
    with pytest.raises(OmniError, match=message) as refused:
        send(folder)
    assert (refused.value.exit_code, "\n" in str(refused.value)) == (1, False)
    assert TOKEN not in str(refused.value)
    assert "signature" not in str(refused.value)


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_what_is_not_what_its_receipt_says_is_not_pushed(hub, folder, name):
    path = folder / name
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=f"{name}: is not what its receipt says"):
        send(folder)
    assert not hub.repositories


def test_a_name_that_is_taken_by_something_else(hub, folder):
    hub.taken = frozenset({NAME})
    with pytest.raises(UsageError, match=r"has something else than a model .* under the name me/drive; choose another"):
        send(folder)


def test_without_a_token_it_is_told_how_to_get_one(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(
        OmniError, match=r"no token was found: make a write token .* run `hf auth login` or set HF_TOKEN"
    ):
        send(folder)
    assert not hub.log


def test_a_token_of_nobody(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ofNobody")
    with pytest.raises(OmniError, match="answers 401 for me/drive: the token was refused") as refused:
        send(folder)
    assert "hf_ofNobody" not in str(refused.value)


def test_without_a_hub(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OmniError, match=r"127\.0\.0\.1:9 broke off or cannot be reached \(\w+\) for me/drive"):
        send(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OmniError, match="HF_HUB_OFFLINE is set, so nothing was pushed to me/drive"):
        send(folder)


@pytest.mark.parametrize(
    "name", ["drive", "a/b/c", "/drive", "me/", "me/a b", "me/..", "../me", "me/a--b", "me/x.git", ""]
)
def test_a_name_that_no_hub_takes(name):
    with pytest.raises(UsageError, match="expected ORGANISATION/NAME"):
        check_repository(name)


def test_the_emulator_takes_nothing_under_another_hash(hub, folder):
    """What the tests above stand on: a hub that would notice."""
    import httpx2

    wrong = "0" * 64
    assert httpx2.put(f"{hub.endpoint}/storage/{wrong}", content=b"something").status_code == 400
    send(folder)
    lines = [b'{"key": "header", "value": {"summary": "s"}}',
             b'{"key": "lfsFile", "value": {"path": "a", "oid": "%s"}}' % wrong.encode()]  # fmt: skip
    said = httpx2.post(
        f"{hub.endpoint}/api/models/{NAME}/commit/main",
        content=b"\n".join(lines),
        headers={"Authorization": f"Bearer {os.environ['HF_TOKEN']}"},
    )
    assert (said.status_code, "a" in hub.repositories[NAME].files) == (400, False)
