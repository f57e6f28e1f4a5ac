"""One fetch in a process of its own: `python -m tests.support.fetch_once DATA '{"chunks": "2", "workers": 2}'`."""

import json
import subprocess
import sys
from pathlib import Path

from omni_cli.report import Console
from omni_cli.stages.fetch import FetchRequest, fetch


def start(data: Path, **options) -> subprocess.Popen:
    """Begin a fetch of PhysicalAI-AV; the options are fields of its request."""
    return subprocess.Popen([sys.executable, "-m", "tests.support.fetch_once", str(data), json.dumps(options)])


def main(data: Path, options: dict) -> None:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    fetch(FetchRequest("physical_ai_av", data, **fields), Console(quiet=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
