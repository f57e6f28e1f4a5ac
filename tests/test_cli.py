"""The command line as a user meets it: start-up, help, exit codes, one-line errors, completion."""

import ast
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from omni_cli import __version__, commands
from omni_cli.commands import VERBS, load_verb

HEAVY = ("torch", "numpy", "pyarrow", "pydantic", "transformers", "rich", "av")
WORK_ORDER = ["fetch", "audit", "etl", "train", "eval", "merge", "export", "infer", "bench"]
SERVANTS = ["run", "demo", "doctor", "profiles"]
IN_PROCESS = "import sys; from omni_cli.__main__ import run; "
# A verb that does what its argument says, in a process of its own: each kind of ending must reach the shell.
ENDING = """
import sys, time, types
from omni_cli import errors
from omni_cli.__main__ import run
verb = types.ModuleType("omni_cli.commands.doctor")
verb.EXAMPLE = "omni doctor"
def command(json: bool = False, quiet: bool = False) -> None:
    print("started", flush=True)
    {body}
verb.command = command
sys.modules[verb.__name__] = verb
sys.modules["omni_cli.stages.doctor"] = types.ModuleType("of that verb")
sys.exit(run(["doctor", *sys.argv[1:]]))
"""


def omni(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "omni_cli", *arguments, cwd=cwd, **environment)


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_help_is_fast():
    assert min(processor_seconds_of_help() for _ in range(5)) < 0.3


def processor_seconds_of_help():
    """The wall clock on a machine with nothing else to do; what other jobs of a busy one take does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert omni("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_no_help_imports_anything_heavy(verb):
    # to read the options of one verb, typer itself loads pydantic
    heavy = [name for name in HEAVY if not (verb and name == "pydantic")]
    arguments = [*verb.split(), "--help"]
    done = python("-c", f"{IN_PROCESS}code = run({arguments}); print(code, [m for m in {heavy} if m in sys.modules])")
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr


def test_help_lists_the_verbs_in_the_order_of_the_work():
    listed = re.findall(r"^  ([a-z]+)  ", omni("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(VERBS) == [verb for verb in WORK_ORDER + SERVANTS if verb in VERBS]


def test_without_a_verb_it_helps_and_says_that_one_is_missing():
    done = omni()
    assert done.returncode == 2
    assert done.stdout == omni("--help").stdout


def test_version():
    assert omni("--version").stdout == f"omni {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_the_table_agrees_with_the_verb(verb):
    command = load_verb(verb)
    assert command.help.partition("\n\n")[0] == VERBS[verb]
    assert {"--json", "--quiet"} <= {option for param in command.params for option in param.opts}


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_an_example_and_every_option_is_explained(verb):
    shown = omni(verb, "--help").stdout
    assert re.search(rf"Example:\n +omni {verb}\b", shown)
    assert all(param.help for param in load_verb(verb).params)


@pytest.mark.parametrize("name", [path.stem for path in Path(commands.__file__).parent.glob("[a-z]*.py")])
def test_every_module_of_a_verb_is_in_the_table(name):
    assert name in VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_is_thin(verb):
    module = ast.parse((Path(commands.__file__).parent / f"{verb}.py").read_text())
    (function,) = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    lines = {line for node in function.body[1:] for line in range(node.lineno, node.end_lineno + 1)}
    assert len(lines) <= 15


@pytest.mark.parametrize(
    ("body", "kind", "exit_code"),
    [
        ("pass", None, 0),
        ("raise errors.OmniError('the disk\\nis full')", "OmniError", 1),
        ("raise errors.UsageError('the disk is full')", "UsageError", 2),
        ("raise errors.DataError('the disk is full')", "DataError", 3),
        ("raise errors.Preempted('the disk is full')", "Preempted", 75),
    ],
)
def test_a_known_ending_is_one_line_and_its_exit_code(body, kind, exit_code):
    done = python("-c", ENDING.format(body=body), "--json")
    assert done.returncode == exit_code
    assert done.stderr == ("error: the disk is full\n" if kind else "")
    if kind:
        error = {"kind": kind, "message": "the disk is full", "exit_code": exit_code}
        assert json.loads(done.stdout.splitlines()[-1]) == {"schema_version": 1, "error": error}


def test_without_json_a_failure_leaves_stdout_alone():
    assert python("-c", ENDING.format(body="raise errors.OmniError('no')")).stdout == "started\n"


def test_a_bug_shows_its_traceback():
    done = python("-c", ENDING.format(body="raise ZeroDivisionError('oops')"), "--json")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("error: this is a bug in omni: oops\n")
    assert json.loads(done.stdout.splitlines()[-1])["error"]["kind"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "runs/x: read-only file system; choose another folder"),
        (errno.ENOTDIR, "runs/x: not a directory; a folder was expected there; choose another"),
        (errno.ENOSPC, "runs/x: no space left on device; free the disk and run the same command again"),
    ],
)
def test_what_the_machine_refuses_is_no_bug_of_ours(number, message):
    done = python("-c", ENDING.format(body=f"import os; raise OSError({number}, os.strerror({number}), 'runs/x')"))
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


def test_a_name_that_is_not_utf8_is_no_bug_of_ours():
    done = python("-c", ENDING.format(body="'runs/\\udcff'.encode()"))
    told = "error: 'runs/\\udcff': a name that is not UTF-8; rename that file or folder\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_ctrl_c_exits_with_130():
    script = ENDING.format(body="time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == b"error: interrupted; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profilse"], "No such command 'profilse'. Did you mean 'profiles'?"),
        (["profiles", "--jsno"], "No such option: --jsno (Possible options: --json)"),
        (["doctor", "--data"], "Option '--data' requires an argument."),
        (["profiles", "a", "b"], "Got unexpected extra argument(s) (b)"),
        (["profiles", "cpu-tniy"], "unknown profile 'cpu-tniy'; did you mean 'cpu-tiny'?"),
        (
            ["etl", "--worker-gb", "inf"],
            "Invalid value for '--worker-gb': Input should be less than or equal to 1048576",
        ),
        (["profiles", "absent.toml"], "no config file absent.toml; give the path of a TOML file"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments, message, tmp_path):
    done = omni(arguments[0], "--json", *arguments[1:], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout.splitlines()[-1])["error"]["exit_code"] == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(shell):
    # the environment variable stands for the shell that typer would find among the parents of the process
    done = omni("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "_OMNI_COMPLETE=complete_" in done.stdout


@pytest.mark.parametrize(
    ("typed", "expected"), [("omni ", list(VERBS)), ("omni prof", ["profiles"]), ("omni doctor --on", ["--online"])]
)
def test_completion_offers_verbs_and_options(typed, expected):
    position = str(len(typed.split(" ")) - 1)
    done = omni(_OMNI_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=position)
    assert done.stdout.split() == expected
