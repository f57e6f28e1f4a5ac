"""Make tests/assets/tiny_base: the base that `omni demo` trains in full, which the adapter tests start from.

An adapter on a random base learns nothing (measured), so the tests need one that was really trained.
About nine minutes:

    python tests/make_tiny_base.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).parent / "assets" / "tiny_base"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "omni_cli", "demo", "--dir", folder], check=True)
        shutil.rmtree(TARGET, ignore_errors=True)
        shutil.copytree(Path(folder) / "runs" / "base" / "final", TARGET)


if __name__ == "__main__":
    main()
