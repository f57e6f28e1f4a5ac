"""After fetch no stage of any recipe asks for a network: the first socket ends the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.driving import write_drives

OFFLINE = """
import os, sys, traceback

def refuse(event, args):
    named = event in ("socket.getaddrinfo", "socket.gethostbyname")
    made = event == "socket.__new__" and args[1] not in (-1, 1)  # AF_UNIX is how a process talks to its own
    if named or made or (event == "socket.connect" and args[0].family != 1):
        print("SOCKET", event, args, file=sys.stderr, flush=True)
        traceback.print_stack()
        os._exit(97)

sys.addaudithook(refuse)
from pathlib import Path
from tests.test_offline import all_stages
print(all_stages(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def all_stages(data: Path, out: Path) -> int:
    """Take an adapter of each recipe from raw data to a merged model; return the windows that were measured."""
    from omni_cli.samples.shards import open_shards
    from omni_cli.stages import models
    from omni_cli.stages.audit import AuditRequest, audit
    from omni_cli.stages.etl import EtlRequest, etl
    from omni_cli.stages.evaluate import EvalRequest, evaluate
    from omni_cli.stages.export import ExportRequest, export
    from omni_cli.stages.infer import InferRequest, infer, subject_of_model
    from omni_cli.stages.merge import MergeRequest, merge
    from omni_cli.stages.runs import open_finished
    from omni_cli.stages.train import TrainRequest, train
    from tests.support.driving import FRONT, tiny_student
    from tests.support.pipeline import QUIET, tiny_recipe

    measured = 0
    audit(AuditRequest(data), QUIET)
    for recipe in (tiny_student(mode="dora"), tiny_recipe(cameras=FRONT, mode="lora")):
        folder = out / recipe.name
        shards = Path(etl(recipe, EtlRequest(data=data, out=folder / "shards", workers=1), QUIET)["shards"])
        run = open_finished(Path(train(recipe, TrainRequest(shards, data, folder, "r", "test"), QUIET)["run"]))
        measured += evaluate(recipe, run, EvalRequest(blind=False), QUIET)["windows"]
        model = models.open_model(Path(merge(recipe, run, MergeRequest(), QUIET)["model"]))
        request = InferRequest((open_shards(shards).manifest.recordings[0].id,), data=data, out=folder)
        infer(model.recipe_settings(type(recipe)), subject_of_model(model), request, QUIET)
        if "hf" in recipe.export_formats:
            export(recipe, run, ExportRequest("hf"), QUIET)
    return measured


@pytest.mark.fault("F31")
def test_from_audit_to_export_no_recipe_opens_a_socket(tmp_path):
    write_drives(tmp_path / "data")
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "data"), str(tmp_path)]
    can_unshare = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
    command = ["unshare", "-rn", *command] if can_unshare else command
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, int(done.stdout or 0) > 0) == (0, True), done.stderr
