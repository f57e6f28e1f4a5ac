"""A stand-in for the package wandb, as far as the Trainer's own callback calls it; what it is told lies in a file."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

_PACKAGE = """
import json, os, pathlib, sys, threading, types
from . import errors

class _Config(dict):
    def update(self, values, allow_val_change=False): pass

class _Run:
    summary, url = {}, None
    def _label(self, code): pass
    def finish(self, exit_code=0):
        note(finished=exit_code)
        globals()["run"] = None
        os.write(1, b"wandb: goodbye")
        if "WANDB_BROKEN" in os.environ:
            raise ConnectionError("service is gone")
        threading.Event().wait(float(os.environ.get("WANDB_UPLOADS_S", 0)))

config, run = _Config(), None

def note(**told):
    with (pathlib.Path(__file__).parent / "told.jsonl").open("a") as stream:
        stream.write(json.dumps(told) + chr(10))

def init(project, name):
    asked = sys.stdin.readline() if sys.stdin.isatty() else ""
    os.write(1, b"wandb: hello")
    if not os.environ.get("WANDB_API_KEY"):
        raise errors.UsageError("No API key configured. Use `wandb login` to log in.")
    if os.environ["WANDB_API_KEY"] == "unheard":
        raise errors.CommError("Timed out: no such host\\nConsider more patience")
    globals()["run"] = _Run()
    note(project=project, name=name)
    return run

def define_metric(*_, **__): pass

def log(values): note(**values)
"""
_ERRORS = """
class Error(Exception): pass
class CommError(Error): pass
class AuthenticationError(CommError): pass
class UsageError(Error): pass
"""


@contextmanager
def stand_in_wandb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the package where Python finds it; yield the file of what it is told, a document a line."""
    files = {"wandb/__init__.py": _PACKAGE, "wandb/errors.py": _ERRORS, "wandb/sdk/__init__.py": ""}
    files |= {"wandb/sdk/lib/__init__.py": "", "wandb/sdk/lib/config_util.py": "class ConfigError(Exception): pass"}
    files |= {"wandb-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: wandb\nVersion: 1.0\n"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    monkeypatch.syspath_prepend(folder)
    # TRL looks for it once, when it is loaded
    monkeypatch.setattr("trl.trainer.base_trainer.wandb", import_module("wandb"), raising=False)
    try:
        yield folder / "wandb" / "told.jsonl"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
            del sys.modules[name]
