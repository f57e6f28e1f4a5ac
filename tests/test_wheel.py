"""An installed wheel is whole: the profiles are inside it and found from there, far from the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from omni_cli.profiles import profile_files

CHECKOUT = Path(__file__).parent.parent


def call(*arguments: str, cwd: Path, **environment: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=cwd, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_profiles_and_finds_them(tmp_path):
    call("-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path), cwd=CHECKOUT)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert not (site / "profiles").exists()
    where = call("-c", "import omni_cli; print(omni_cli.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).parent == site / "omni_cli"
    document = json.loads(call("-m", "omni_cli", "profiles", "--json", cwd=tmp_path, PYTHONPATH=str(site)))
    assert [row["name"] for row in document["profiles"]] == list(profile_files())
