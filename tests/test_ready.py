"""Before torch is imported: what is plainly wrong is refused, and what is being loaded is said."""

import json
import os
import pty
import subprocess
import sys

import pytest

from omni_cli.commands import VERBS
from omni_cli.commands._ready import _STAGES
from omni_cli.report import Console

REFUSE = "import sys; from omni_cli.__main__ import run; code = run({}); print(code, 'torch' in sys.modules)"
ON_A_TERMINAL = """
from omni_cli.report import Console
with Console(quiet={quiet}, json_output={json}).passing("loading torch"):
    pass
Console().say("next")
"""


def test_every_verb_says_what_it_loads():
    assert set(_STAGES) == set(VERBS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --profile nope", "unknown profile 'nope'"),
        ("etl --profile cpu-tiny", "no data folder data; get some with: omni fetch"),
        ("train --profile cpu-tiny", "no data folder data; get some with: omni fetch"),
        ("etl --profile cpu-tiny --recipe vml", "unknown recipe 'vml'; did you mean 'vlm'?"),
        ("train --set rank", "--set rank: expected KEY=VALUE"),
        ("train --config gone.toml", "no config file gone.toml"),
        ("eval frist", "no run frist, neither a folder nor a name in runs; did you mean 'first'?"),
        ("infer a.mp4 --run frist", "did you mean 'first'?"),
        ("bench --run other", "no run other, neither a folder nor a name in runs; known: first"),
    ],
)
def test_it_is_refused_before_torch_is_imported(tmp_path, line, message):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "run.json").write_text("{}")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("OMNI_")}
    words = [sys.executable, "-c", REFUSE.format(line.split())]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=ours)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(("quiet", "as_json", "is_said"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_what_is_loaded_is_said_on_a_terminal_and_wiped_away(quiet, as_json, is_said):
    reader, terminal = pty.openpty()
    code = ON_A_TERMINAL.format(quiet=bool(quiet), json=bool(as_json))
    words = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", code], stderr=terminal, check=True, env=words)
    os.close(terminal)
    shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert ("loading torch" in shown) == is_said
    last = shown.rpartition("\x1b[2K")[2] if is_said else shown
    assert last.strip() == "next"


@pytest.mark.parametrize("colour", ["", "1"])
def test_elsewhere_nothing_is_said_of_it(colour, capsys, monkeypatch):
    """With FORCE_COLOR, as in CI, a log is a terminal to rich."""
    monkeypatch.setenv("FORCE_COLOR", colour)
    with Console().passing("loading torch"):
        pass
    assert capsys.readouterr().err == ""


def test_a_log_gets_lines_and_no_bar_whatever_its_colours(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Console().progress("etl", 2, "recordings") as step:
        step.advance(2)
    told = capsys.readouterr().err
    assert "etl: 2/2 recordings" in told
    assert "\x1b[2K" not in told


def test_the_libraries_are_loaded_before_the_verb_begins(tmp_path):
    """`omni profiles` needs none of the heavy ones."""
    code = "import sys; from omni_cli.__main__ import run; run(['profiles', '--json']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    document, has_torch = done.stdout.splitlines()
    assert json.loads(document)["profiles"]
    assert has_torch == "False"
