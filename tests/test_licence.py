"""The licence of PhysicalAI-AV: where every copy lies, when it ends, that all of it can be destroyed, and no push."""

import datetime
import json
import os
import shutil
from pathlib import Path

import pytest

from omni_cli import files
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.physical_ai_av import LICENCE, REPOSITORY
from omni_cli.report import Console
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.checks.licence import licence_findings, months_after
from omni_cli.stages.fetch import FetchRequest, PurgeRequest, fetch, purge
from omni_cli.stages.fetch.purge import PENDING_FILE
from omni_cli.stages.ledger import LEDGER_FILE, RAW, read_ledger, register_copy
from omni_cli.stages.licences import check_push, register_shards
from tests.support import pai
from tests.support.hub import serve_hub

TODAY = datetime.datetime.now(datetime.UTC).date()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return pai.write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def data(repository, tmp_path):
    """Raw data that were fetched, and shards of them in three states, beside others that are nobody's business."""
    data = tmp_path / "data"
    fetch(FetchRequest("physical_ai_av", data, "0-0", cameras=pai.CAMERAS, origin=repository), Console(quiet=True))
    shard_set(data / "shards" / "listed")
    register_shards(data, "physical_ai_av", data / "raw" / "physical_ai_av", data / "shards" / "listed")
    shard_set(data / "shards" / "found")
    shard_set(data / "shards" / "half-made", has_manifest=False)
    shard_set(data / "shards" / "others", licence="MIT")
    (data / "raw" / "comma2k19").mkdir(parents=True)
    (data / "audit.html").write_text("thumbnails")
    return data


def shard_set(folder, licence=LICENCE, *, has_manifest=True):
    """Write what tells of a shard set's licence, as etl does: a manifest, and receipts of recordings."""
    windows = folder / "recordings" / "clip" / "windows.arrow"
    files.write_bytes(windows, b"windows of " + folder.name.encode())
    files.write_receipt(windows, provenance={"licence": licence})
    files.write_bytes(folder / "tokens" / "key" / "clip.arrow", b"tokens")
    if has_manifest:
        files.commit_json(folder / "manifest.json", {"provenance": {"licence": [licence]}})


def ask(data, **options):
    return PurgeRequest(**{"data": data, "source": "physical_ai_av", "runs": data.parent / "runs", **options})


def destroy(data, **options):
    return purge(ask(data, **options), Console(quiet=True))


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_ledger_tells_every_copy_and_since_when(data, tmp_path):
    ledger = read_ledger(data)
    (entry,) = ledger["licences"]
    assert (entry["source"], entry["licence"], entry["repository"]) == ("physical_ai_av", LICENCE, REPOSITORY)
    assert entry["first_fetched"] == TODAY.isoformat()
    assert [(copy["path"], copy["kind"]) for copy in entry["copies"]] == [
        ("raw/physical_ai_av", "raw"), ("shards/listed", "shards"),
    ]  # fmt: skip
    moved = data.rename(tmp_path / "moved")
    register_shards(moved, "physical_ai_av", moved / "raw" / "physical_ai_av", tmp_path / "elsewhere")
    register_shards(moved, "physical_ai_av", moved / "raw" / "physical_ai_av", moved / "shards" / "listed")
    register_shards(moved, "comma2k19", moved / "raw" / "comma2k19", moved / "shards" / "others")
    paths = [copy["path"] for copy in read_ledger(moved)["licences"][0]["copies"]]
    assert paths == ["raw/physical_ai_av", "shards/listed", str(tmp_path / "elsewhere")]


def test_a_fetch_from_the_hub_enters_the_ledger_before_its_first_byte(repository, tmp_path, monkeypatch):
    with serve_hub(repository) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.token = "hf_nobody"
        with pytest.raises(OmniError, match="401"):
            fetch(FetchRequest("physical_ai_av", tmp_path, "0-0", cameras=pai.CAMERAS), Console(quiet=True))
    (entry,) = read_ledger(tmp_path)["licences"]
    assert (entry["revision"], entry["copies"][0]["path"]) == (hub.commit, "raw/physical_ai_av")


def test_an_import_keeps_the_day_of_the_first_download(repository, tmp_path):
    origin = shutil.copytree(repository, tmp_path / "origin")
    os.utime(origin / "clip_index.parquet", (0, 86_400 * 365.25 * 50))
    request = FetchRequest("physical_ai_av", tmp_path / "one", "0-0", cameras=pai.CAMERAS, origin=origin)
    fetch(request, Console(quiet=True))
    folder = tmp_path / "one" / "raw" / "physical_ai_av"
    assert files.read_json(folder / "revision.json")["first_fetched"] == "2020-01-01"
    request = FetchRequest("physical_ai_av", tmp_path / "two", "0-0", cameras=pai.CAMERAS, origin=folder)
    fetch(request, Console(quiet=True))
    assert read_ledger(tmp_path / "two")["licences"][0]["first_fetched"] == "2020-01-01"


def test_a_ledger_that_is_none_is_not_overwritten(tmp_path):
    (tmp_path / LEDGER_FILE).write_text("{}")
    with pytest.raises(DataError, match=r"ledger\.json: not a ledger; mend it by hand"):
        register_copy(tmp_path, "physical_ai_av", tmp_path, RAW, repository="r", licence="l", revision="1")
    assert (tmp_path / LEDGER_FILE).read_text() == "{}"


@pytest.mark.parametrize("entry", [{}, 7, {"copies": []}, "all", "a copy without a path"])
def test_a_damaged_ledger_is_refused_in_one_line(data, entry):
    ledger = read_ledger(data)
    damaged = {**ledger["licences"][0], "copies": [{"kind": RAW}]} if entry == "a copy without a path" else entry
    files.write_json(data / LEDGER_FILE, {**ledger, "licences": [damaged]})
    with pytest.raises(DataError, match=r"ledger\.json: not a ledger; mend it by hand"):
        destroy(data, dry_run=True)


@pytest.mark.parametrize(
    ("today", "codes"),
    [
        ("2026-12-30", []),
        ("2026-12-31", ["licence-ends"]),
        ("2027-01-30", ["licence-ends"]),
        ("2027-01-31", ["licence-ended"]),
        ("2030-01-01", ["licence-ended"]),
    ],
)
def test_the_end_is_warned_of_a_month_before(today, codes):
    found = list(licence_findings("2026-01-31", datetime.date.fromisoformat(today)))
    assert [finding.code for finding in found] == codes
    assert all(finding.severity == "warn" and "omni fetch --purge" in finding.detail for finding in found)


def test_months_end_where_they_end():
    assert months_after(datetime.date(2024, 3, 31), 11) == datetime.date(2025, 2, 28)
    assert months_after(datetime.date(2023, 3, 31), 11) == datetime.date(2024, 2, 29)
    assert months_after(datetime.date(2024, 2, 29), 12) == datetime.date(2025, 2, 28)
    assert months_after(datetime.date(2026, 1, 15), 12) == datetime.date(2027, 1, 15)
    assert [finding.code for finding in licence_findings("soon", TODAY)] == ["licence-unknown"]


def test_an_audit_tells_that_the_licence_ends(data):
    path = data / "raw" / "physical_ai_av" / "revision.json"
    record = files.read_json(path)
    for months, code in ((0, None), (11, "licence-ends"), (13, "licence-ended")):
        files.write_json(path, {**record, "first_fetched": months_after(TODAY, -months).isoformat()})
        codes = {finding["code"] for finding in audit(AuditRequest(path.parent), Console(quiet=True))["findings"]}
        assert {code for code in codes if code.startswith("licence")} == ({code} if code else set())


def test_a_dry_run_lists_and_touches_nothing(data):
    before = tree(data)
    result = destroy(data, dry_run=True)
    assert sorted(result["copies"]) == [
        "audit.html", "raw/physical_ai_av", "shards/found", "shards/half-made", "shards/listed",
    ]  # fmt: skip
    assert tree(data) == before


def test_a_purge_deletes_every_copy_and_proves_it(data):
    hashes = {files.read_receipt(path)["sha256"] for path in data.rglob("*.zip")}
    result = destroy(data)
    assert result["remaining"] == []
    certificate = Path(result["certificate"])
    left = {"ledger.json", ".ledger.json.lock", certificate.name, "shards/others/manifest.json"}
    assert {name for name in tree(data) if not name.startswith("shards/others/")} == left - {
        "shards/others/manifest.json"
    }
    assert not (data / "raw" / "physical_ai_av").exists()
    told = json.loads(certificate.read_text())
    assert (told["remaining"], told["purged"], told["licence"]) == (0, TODAY.isoformat(), LICENCE)
    assert set(told["deleted"]) == set(result["copies"])
    assert hashes <= set(told["deleted"]["raw/physical_ai_av"]["sha256"])
    assert not any(clip in certificate.read_text() for clip in pai.clip_ids(0))
    ledger = read_ledger(data)
    assert (ledger["licences"], ledger["purged"][0]["certificate"]) == ([], certificate.name)
    assert destroy(data)["certificate"] is None


def test_what_learned_from_the_data_is_named_and_kept(data, capsys):
    runs = data.parent / "runs"
    for name, shards in (("mine", data / "shards" / "listed"), ("other", data / "shards" / "others")):
        files.write_json(runs / name / "run.json", {"shards": {"folder": str(shards.absolute())}})
    assert purge(ask(data), Console())["derived_runs"] == [str(runs / "mine")]
    assert "learned from these data" in capsys.readouterr().err
    assert (runs / "mine" / "run.json").is_file()
    assert destroy(data)["derived_runs"] == [str(runs / "mine")]  # after the purge too: the ledger remembers


@pytest.mark.fault("F1")
@pytest.mark.parametrize("deleted", [0, 1, 3, 7, 12])
def test_a_killed_purge_is_finished_by_the_next(data, monkeypatch, deleted):
    class Died(BaseException):
        pass

    unlink, left = os.unlink, iter(range(deleted))

    def dying(*arguments, **options):
        if options.get("dir_fd") is not None and next(left, None) is None:
            raise Died
        return unlink(*arguments, **options)

    copies = set(destroy(data, dry_run=True)["copies"])
    monkeypatch.setattr(os, "unlink", dying)
    with pytest.raises(Died):
        destroy(data)
    monkeypatch.undo()
    assert (data / PENDING_FILE).is_file()
    result = destroy(data)
    told = json.loads(Path(result["certificate"]).read_text())["deleted"]
    assert set(told) == copies
    assert told["raw/physical_ai_av"]["files"] > 8
    assert not (data / PENDING_FILE).exists()


def test_killed_after_its_last_file_it_still_certifies(data, monkeypatch):
    monkeypatch.setattr(files, "hash_json", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        destroy(data)
    monkeypatch.undo()
    assert len(json.loads(Path(destroy(data)["certificate"]).read_text())["deleted"]) == 5


@pytest.mark.parametrize("place", ["raw/physical_ai_av", "shards/listed", "raw/physical_ai_av/camera"])
def test_no_link_is_followed_and_what_is_behind_it_is_no_success(data, tmp_path, place):
    elsewhere = tmp_path / "elsewhere"
    (data / place).rename(elsewhere)
    (data / place).symlink_to(elsewhere)
    before = tree(elsewhere)
    with pytest.raises(
        OmniError, match=rf"{place} is a link to {elsewhere}, which is not followed; delete it yourself"
    ):
        destroy(data)
    assert tree(elsewhere) == before
    assert not list(data.glob("purge-certificate*"))
    (data / place).unlink()
    assert destroy(data)["remaining"] == []
    assert tree(elsewhere) == before


def test_a_listed_place_outside_must_show_what_it_is(data, tmp_path):
    ours, not_ours = tmp_path / "shards elsewhere", tmp_path / "diary"
    shard_set(ours)
    files.write_text(not_ours / "diary.txt", "dear diary")
    for place in (ours, not_ours):
        register_shards(data, "physical_ai_av", data / "raw" / "physical_ai_av", place)
    with pytest.raises(OmniError, match="diary does not look like shards of these data"):
        destroy(data)
    assert not ours.exists()
    assert (not_ours / "diary.txt").is_file()


@pytest.mark.fault("F14")
@pytest.mark.parametrize("path", ["..", ".", "../precious", "shards/../../precious", "raw"])
def test_a_ledger_cannot_lead_out_of_its_folder(data, tmp_path, path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    ledger = read_ledger(data)
    ledger["licences"][0]["copies"].append({"path": path, "kind": "shards", "since": "2026-01-01"})
    files.write_json(data / LEDGER_FILE, ledger)
    with pytest.raises(OmniError, match="does not look like shards of these data"):
        destroy(data)
    assert (tmp_path / "precious" / "file").is_file()
    assert (data / "shards" / "others" / "manifest.json").is_file()


@pytest.mark.parametrize("damage", ["revision", "pending"])
def test_damage_is_no_reason_to_keep_the_data(data, damage):
    if damage == "revision":
        (data / "raw" / "physical_ai_av" / "revision.json").write_text("{")
    else:
        (data / PENDING_FILE).write_text("{")
        with pytest.raises(DataError, match=r"purge\.pending\.json: damaged, .*; delete it and run again"):
            destroy(data)
        (data / PENDING_FILE).unlink()
    assert destroy(data)["remaining"] == []


def test_what_comes_amid_a_purge_is_named(data, monkeypatch):
    late, rmdir = data / "raw" / "physical_ai_av" / "late", os.rmdir

    def arriving(path, *arguments, **options):
        if Path(path) == late.parent:
            late.touch()
        return rmdir(path, *arguments, **options)

    monkeypatch.setattr(os, "rmdir", arriving)
    with pytest.raises(OmniError, match=r"raw/physical_ai_av: directory not empty"):
        destroy(data)
    monkeypatch.undo()
    assert destroy(data)["remaining"] == []


def test_a_copy_that_is_listed_by_two_paths_is_deleted_once(data, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(data)
    register_shards(link, "physical_ai_av", link / "raw" / "physical_ai_av", data / "shards" / "listed")
    assert destroy(link)["remaining"] == []
    assert not (data / "shards" / "listed").exists()


def test_a_purge_waits_for_no_fetch(data):
    with (
        files.exclusive(data / "raw" / "physical_ai_av", "fetching into", shared=True),
        pytest.raises(OmniError, match="another omni is fetching into"),
    ):
        destroy(data)
    assert list(data.rglob("*.zip"))


def test_purges_that_cannot_be_are_refused(data):
    with pytest.raises(UsageError, match="synthetic data are under no licence that ends"):
        destroy(data, source="synthetic")
    with pytest.raises(UsageError, match="--purge deletes every copy, not some"):
        destroy(data, is_choosy=True)


def test_pushing_what_was_made_of_these_data_needs_the_licence_by_name():
    check_push([], None)
    check_push(["MIT", "made by omni, free to use"], None)
    forbids = f'under the {LICENCE}: its section 4.6 forbids .* derivative works.*--licence "{LICENCE}"'
    with pytest.raises(UsageError, match=forbids):
        check_push(["MIT", LICENCE], None)
    with pytest.raises(UsageError, match=forbids):
        check_push([LICENCE], "yes")
    check_push([LICENCE, "MIT"], LICENCE)
