"""Code of a model card in a process of its own, which has torchvision: `python -m tests.support.with_torchvision FILE`.

transformers' video processors need torchvision, and omni does not. Its wheels are made for one build of torch each: on
another all but its compiled operators works, once they are declared. A folder with an unpacked wheel is named by
OMNI_TORCHVISION (pip install --no-deps --target DIR torchvision==0.28.0).
"""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = os.environ.get("OMNI_TORCHVISION", "")
REASON = "no torchvision here: name a folder that holds it with OMNI_TORCHVISION"


def is_here() -> bool:
    return bool(FOLDER) or importlib.util.find_spec("torchvision") is not None


def run(code: str, folder: Path) -> str:
    """Run code as somebody would who copied it into FOLDER, and return what it prints."""
    (folder / "snippet.py").write_text(code)
    path = os.pathsep.join([FOLDER, str(Path.cwd())])
    command = [sys.executable, "-m", "tests.support.with_torchvision", "snippet.py"]
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    (folder / "snippet.py").unlink()
    assert done.returncode == 0, done.stderr
    return done.stdout


def main(script: str) -> None:
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    runpy.run_path(script)


if __name__ == "__main__":
    main(sys.argv[1])
