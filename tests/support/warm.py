"""Processes that are forked from one that has imported torch and its libraries: seven seconds of a core are paid once.

    process = warm.start("omni_cli", "train", "--profile", "cpu-tiny", cwd=folder)
    assert process.wait() == 0, process.stderr

What forks is a process of its own: it has one thread, and one that runs tests may have more.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HEAVY = ("omni_cli.recipes.vlm", "omni_cli.stages.etl", "omni_cli.stages.infer", "omni_cli.stages.train")


@dataclass
class WarmProcess:
    """One process, as far as subprocess.Popen tells of one; what it says lies in files."""

    warm: "Warm"
    pid: int
    folder: Path
    returncode: int | None = None

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self.warm.ask({"of": self.pid})
        return self.returncode

    def wait(self, seconds: float = 300.0) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"process {self.pid} did not end in {seconds} s: {self.stderr}")
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # of one that has ended, the number may be another's
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """Starts processes; its folder takes what they say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        command = [sys.executable, "-m", "tests.support.warm"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: dict[str, Any]) -> Any:
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self, module: str, *words: str, cwd: Path | None = None, environment: Mapping[str, str] = os.environ
    ) -> WarmProcess:
        """Run a module as `python -m` does, in a folder; what its libraries read of the environment they have read."""
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        asked = {"module": module, "words": words, "cwd": str(cwd or Path.cwd()), "said": str(folder)}
        return WarmProcess(self, self.ask({**asked, "environment": dict(environment)}), folder)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def serve() -> None:
    """Answer questions, one a line: what is to be started, or how something ended."""
    for name in _HEAVY:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _how_it_ended(asked["of"]) if "of" in asked else _forked(asked)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _how_it_ended(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _forked(asked: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(_run(asked))
    return pid


def _run(asked: dict[str, Any]) -> int:
    """Become what was asked for; return its exit code."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(asked["said"]) / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = [asked["module"], *asked["words"]]
    try:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
