"""One push in a process of its own: `python -m tests.support.push_once FOLDER ORG/NAME`."""

import subprocess
import sys
from pathlib import Path

from omni_cli.report import Console
from omni_cli.stages.push import PushRequest, push


def start(folder: Path, repository: str) -> subprocess.Popen:
    """Begin a push of a sealed folder; the hub is told by the environment."""
    return subprocess.Popen([sys.executable, "-m", "tests.support.push_once", str(folder), repository])


if __name__ == "__main__":
    push(Path(sys.argv[1]), PushRequest(sys.argv[2]), Console(quiet=True))
