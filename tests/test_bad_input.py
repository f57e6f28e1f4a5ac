"""Bad input, as a user meets it: an exit code and one line that says what was found and what to do.

An adapter over another base is in test_merge and test_infer, a file that is no video in test_infer.
"""

import re

import numpy as np
import pytest

from omni_cli.__main__ import run
from tests.support import pai

CLIP = pai.clip_ids(0)[0]
VIDEO = pai.member(pai.FRONT, "video", CLIP)
ETL = f"etl --profile cpu-tiny --cameras {pai.FRONT} --window 4 --workers 0 --data raw --out shards"


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return pai.write_repository(tmp_path / "raw", chunks=2)


def said_by(line, capsys):
    code = run(line.split())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.splitlines()[-1].startswith("error: ")
    return code, captured.err


def nan(columns):
    columns["vx"][7] = np.nan


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("etl --profile cpu-tinny", "unknown profile 'cpu-tinny'; did you mean 'cpu-tiny'?"),
        ("run --profile cpu-tiny --set sample.windw=3", "--set: unknown key sample.windw; did you mean 'window'?"),
        ("etl --profile cpu-tiny", "no data folder data; get some with: omni fetch --source synthetic --chunks 2"),
        (
            "etl --profile cpu-tiny --rate-hz 3000000 --dry-run",
            "sample.rate_hz = 3e+06: expected 0.001 to 1000 frames a second",
        ),
        ("etl --profile cpu-tiny --rate-hz 1e-300 --dry-run", "sample.rate_hz = 1e-300: expected 0.001 to 1000"),
        ("etl --profile cpu-tiny --config .", ".: cannot be read (Is a directory); give the path of a TOML file"),
        ("run --profile cpu-tiny --config .", ".: cannot be read (Is a directory); give the path of a TOML file"),
        ("train --profile cpu-tiny", "no data folder data; get some with: omni fetch --source synthetic --chunks 2"),
        ("bench nothing --profile cpu-tiny", "nothing to measure called 'nothing'; known: etl, export, gpu, infer, "),
        ("bench gpx --profile cpu-tiny", "nothing to measure called 'gpx'; did you mean 'gpu'?"),
        (
            "bench loader --minutes 1",
            "--minutes: omni bench loader does not heed it, omni bench gpu does; leave it out",
        ),
        ("bench --out x", "--out: omni bench does not heed it, omni bench gpu does; leave it out"),
        ("bench etl --alone", "--alone: omni bench etl does not heed it, omni bench train does; leave it out"),
        ("bench train --teacher a", "--teacher: omni bench train does not heed it, omni bench export does; leave it"),
        (
            "bench gpu --repeats 5 --alone --data data --minutes 1",
            "omni bench gpu measures rows of its own; leave out --repeats, --alone, --data",
        ),
        ("bench gpu --runs y --recipe vlm", "omni bench gpu measures rows of its own; leave out --recipe, --runs"),
        ("bench train --set model=random:", "model 'random:': random: stands before a hub id such as Qwen/"),
        (
            "bench train --set model=random:tiny:qwen3_vl",
            "model 'random:tiny:qwen3_vl': random: stands before a hub id",
        ),
        ("bench train --set model=random:random:a/b", "model 'random:random:a/b': random: stands before a hub id"),
        (
            "bench export --profile cpu-tiny",
            "no run of recipe vlm, model tiny:qwen2_5_vl, tuned in full is here; name one with --run NAME",
        ),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_2(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = said_by(line, capsys)
    assert code == 2
    assert said.splitlines()[-1].startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard_folder_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, said = said_by(f"train --profile cpu-tiny --data {tmp_path} --shards {tmp_path / 'empty'}", capsys)
    assert (code, said.count("\n")) == (3, 1)
    assert re.match(r"error: .*empty, it has no manifest\.json; finish it with the same omni etl, and --out ", said)


@pytest.mark.parametrize("manifest", ["[]", '"vlm"', "3"])
def test_a_manifest_that_is_none_is_one_line(manifest, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text(manifest)
    code, said = said_by(f"train --profile cpu-tiny --data {tmp_path} --shards {tmp_path}", capsys)
    assert (code, said.count("\n")) == (3, 1), said


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: pai.edit_zip(pai.zip_path(root, pai.FRONT), {VIDEO: pai.mp4()[:-400]}), r"not a readable video"),
        (
            lambda root: pai.edit_zip(pai.zip_path(root, pai.FRONT), {}, ((f"../{VIDEO}", b"x"),)),
            r"\.\./.*(escape|leave|outside|unsafe)",
        ),
        (
            lambda root: pai.edit_zip(
                pai.zip_path(root, "egomotion"), {pai.member("egomotion", "egomotion", CLIP): pai.egomotion(nan)}
            ),
            r"vx is nan at row 7; expected finite numbers",
        ),
    ],
    ids=["truncated mp4", "zip with ../", "NaN egomotion"],
)
def test_damaged_data_is_refused_by_name(damage, reason, raw, capsys):
    damage(raw)
    code, said = said_by(ETL, capsys)
    assert code == 3
    assert re.search(rf"warning: refused {CLIP}: .*{reason}", said), said
    assert re.search(r"error: \d of 4 recordings refused, more than the 20% allowed; .* omni audit", said)
    assert not (raw.parent / "shards" / "manifest.json").exists()
    assert run(["audit", "raw", "--deep", "--json"]) == 3
    assert CLIP in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["train --dry-run", "bench train"])
def test_a_name_that_no_file_can_have_is_one_line(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = said_by(f"{verb} --profile cpu-tiny --set model={'a' * 400}", capsys)
    assert code == 1
    assert said.endswith("aaa: file name too long; a name there is too long for this machine; give a shorter one\n")
