"""Run omni; a user's mistake is one line and an exit code, only our bug is a traceback.

Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 data refused, 75 pre-empted but saved, 130 interrupted.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer

from omni_cli import SCHEMA_VERSION
from omni_cli.commands import app
from omni_cli.errors import OmniError, UsageError, refused_by_machine

INTERRUPTED = 130


def main() -> None:
    """Run the command line of this process."""
    _calm_libraries(quiet="--quiet" in sys.argv or not sys.stderr.isatty())
    sys.exit(run(sys.argv[1:]))


def _calm_libraries(*, quiet: bool) -> None:
    """Keep libraries from talking to the user over omni: their plans to change, and bars where a log is written."""
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers heeds it too


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; with `--json` a failure too ends stdout with one document."""
    as_json = "--json" in arguments
    try:
        # typer returns the code of an `Exit` here, and 130 for Ctrl-C
        code = typer.main.get_command(app).main(list(arguments), prog_name="omni", standalone_mode=False) or 0
    except OmniError as error:
        return _fail(type(error).__name__, str(error), error.exit_code, as_json)
    except typer.TyperException as error:
        return _fail("UsageError", error.format_message(), error.exit_code, as_json)
    except Exception as error:
        return _unforeseen(error, as_json)
    if code == INTERRUPTED:
        return _fail("KeyboardInterrupt", "interrupted; run the same command again to go on", code, as_json)
    return int(code)


def _unforeseen(error: Exception, as_json: bool) -> int:
    if isinstance(error, OSError) and (what := refused_by_machine(error)):
        return _fail("OSError", what, 1, as_json)
    if isinstance(error, UnicodeEncodeError) and error.reason.startswith("surrogates"):
        return _fail("OmniError", f"{error.object!r}: a name that is not UTF-8; rename that file or folder", 1, as_json)
    traceback.print_exc()
    return _fail(type(error).__name__, f"this is a bug in omni: {error}", 1, as_json)


def _fail(kind: str, message: str, exit_code: int, as_json: bool) -> int:
    """Say what ended this process, once for all that torchrun started.

    Wrong usage the processes of a machine meet alike, before they join: the first of them says it. Once they have
    joined, what one alone meets the first of all says (`Ranks.alike`), which alone writes a document.
    """
    line = " ".join(message.split())
    if exit_code != UsageError.exit_code or _is_first("LOCAL_RANK"):
        sys.stderr.write(f"error: {line}\n")
    if as_json and _is_first("RANK"):
        error = {"kind": kind, "message": line, "exit_code": exit_code}
        sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, "error": error}, sort_keys=True) + "\n")
    return exit_code


def _is_first(name: str) -> bool:
    """Say whether this process is the first of those that a launcher numbers so, or is by itself."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get(name, "0") == "0"


if __name__ == "__main__":
    main()
