"""Training on a disk that cannot hold it, or that fills up; and workers of its loader that fail or are killed."""

import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from omni_cli.errors import DataError, OmniError
from omni_cli.recipes.vlm.settings import VlmTrain
from omni_cli.report import Console
from omni_cli.samples.shards import frames_path, open_shards
from omni_cli.stages import disk, runs
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.loading import Patient, in_words_of_workers
from omni_cli.stages.train import TrainRequest, train
from tests.support.folders import tree
from tests.support.injection import REFUSED, needs_strace, run_traced
from tests.support.pipeline import QUIET, tiny_recipe, write_synthetic


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("training")
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    return data


@pytest.fixture(scope="module")
def shards(data) -> Path:
    return Path(etl(recipe_of(), EtlRequest(data=data, workers=0), QUIET)["shards"])


def recipe_of(mode="full", **changes):
    values = {"batch_size": 2, "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2, "log_steps": 2, "workers": 0}
    return tiny_recipe(
        cameras="1-cam", mode=mode, train=VlmTrain(**{**values, "gradient_checkpointing": False, **changes})
    )


def run_train(recipe, shards, folder, console=QUIET, **options):
    return train(recipe, TrainRequest(shards, folder, folder, "r", "test", **options), console)


def weights(folder: Path) -> dict[str, str]:
    return tree(folder / "r" / "final")


@pytest.mark.fault("F3")
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_what_a_training_writes_is_known_before_it_begins(mode, shards, tmp_path):
    recipe = recipe_of(mode, max_steps=8)
    plan = run_train(recipe, shards, tmp_path, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    run_train(recipe, shards, tmp_path)
    (newest,) = tmp_path.glob("r/checkpoints/checkpoint-8")
    found = sum(path.stat().st_size for path in newest.iterdir() if path.suffix in (".safetensors", ".pt"))
    assert plan["checkpoint_bytes"] - disk._BESIDE_BYTES == pytest.approx(found, rel=0.01, abs=40_000)
    final = sum(path.stat().st_size for path in tmp_path.glob("r/final/*.safetensors"))
    size = recipe.size(recipe.preprocess())
    assert disk.final_bytes(size, mode) - disk._BESIDE_BYTES == pytest.approx(final, rel=0.01, abs=40_000)
    assert plan["disk_bytes"] == 3 * plan["checkpoint_bytes"] + 3 * disk.final_bytes(size, mode)
    once = run_train(recipe_of(mode, max_steps=2), shards, tmp_path, dry_run=True)
    assert once["disk_bytes"] == plan["checkpoint_bytes"] + 2 * disk.final_bytes(size, mode)
    unmeasured = run_train(recipe_of(mode, max_steps=8, validation_windows=0), shards, tmp_path, dry_run=True)
    assert unmeasured["disk_bytes"] == 3 * plan["checkpoint_bytes"] + disk.final_bytes(size, mode)


@pytest.mark.fault("F3")
def test_a_disk_that_cannot_hold_a_training_is_told_before_it_begins(shards, tmp_path, monkeypatch):
    run_train(recipe_of(), shards, tmp_path)
    before = tree(tmp_path / "r")
    monkeypatch.setattr(disk, "_BESIDE_BYTES", 1 << 60)  # a tokenizer that fits no disk
    told = rf"^{tmp_path}/r: checkpoints and weights need about [\d.]+ GiB, [\d.]+ GiB are free; free .*--runs$"
    with pytest.raises(OmniError, match=told) as caught:
        run_train(recipe_of(learning_rate=2e-3), shards, tmp_path, fresh=True)
    assert caught.value.exit_code == 1
    assert tree(tmp_path / "r") == before
    run_train(recipe_of(), shards, tmp_path)  # nothing is left to be written


def test_what_a_run_holds_counts_as_room_for_it(tmp_path):
    empty = disk.free_bytes(tmp_path / "r")
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    with (tmp_path / "r" / "checkpoints" / "weights").open("wb") as stream:
        stream.truncate(1 << 40)  # takes no room
    assert disk.free_bytes(tmp_path / "r") - empty == pytest.approx(1 << 40, rel=0.01)


@needs_strace
@pytest.mark.fault("F3", "F26")
@pytest.mark.parametrize(
    "part",
    [
        "checkpoints/checkpoint-4/model.safetensors",
        "checkpoints/checkpoint-4/optimizer.pt",
        pytest.param("checkpoints/checkpoint-4/trainer_state.json", marks=pytest.mark.storm),
        pytest.param("checkpoints/checkpoint-4/rng_state.pth", marks=pytest.mark.storm),
        "final/model.safetensors",
    ],
)
def test_a_disk_that_fills_up_while_it_saves_keeps_the_checkpoint_before(part, shards, tmp_path):
    again = partial(run_train, recipe_of(), shards, tmp_path / "here")
    run_train(recipe_of(), shards, tmp_path)
    fault = "inject=write,pwrite64,renameat:error=ENOSPC"  # safetensors are written under another name
    assert run_traced(again, fault, only=tmp_path / "here" / "r" / part) == REFUSED
    folder, step = tmp_path / "here" / "r", 4 if part.startswith("final") else 2
    found = sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*"))
    assert found[-2:] == [f"checkpoint-{step}", f"checkpoint-{step}.receipt.json"]
    assert runs.verified_folder(folder / "checkpoints" / f"checkpoint-{step}")
    assert not list(folder.glob("final*"))
    again()
    assert weights(tmp_path / "here") == weights(tmp_path)


SMALL = """
mkdir -p "$PLACE/disk" && mount -t tmpfs -o size=24m tmpfs "$PLACE/disk"
"$PYTHON" -m omni_cli train --profile cpu-tiny --shards "$SHARDS" --runs "$PLACE/disk" --run r \
  --set sample.cameras=camera_front_wide_120fov --set sample.window=4 --set split.validation=0.5 2>&1 || echo "rc $?"
ls -A "$PLACE/disk"
"""


@pytest.mark.storm
@pytest.mark.fault("F3")
def test_a_small_disk_is_told_in_one_line(shards, tmp_path):
    from tests.test_faults_machine import in_a_mount_of_its_own

    variables = {"PYTHON": os.sys.executable, "SHARDS": str(shards), "PLACE": str(tmp_path)}
    said = in_a_mount_of_its_own(SMALL, **variables).stdout
    assert re.search(
        r"^error: .*/disk/r: checkpoints and weights need about 0\.\d\d GiB, 0\.02 GiB are free", said, re.M
    )
    assert "rc 1" in said
    assert "Traceback" not in said


# -- workers of the loader


class Failing(Console):
    """When the training is about to begin, one bit of a shard flips."""

    def __init__(self, path: Path) -> None:
        super().__init__(quiet=True)
        self._path = path

    def say(self, text: str) -> None:
        if " learn from " in text:
            content = self._path.read_bytes()
            middle = len(content) // 2
            self._path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.fault("F6", "F26")
def test_a_shard_that_is_damaged_while_training_is_one_line(shards, tmp_path):
    """pain 10: no other window takes the place of one that cannot be read."""
    shutil.copytree(shards, tmp_path / "shards")
    entry = next(entry for entry in open_shards(shards).manifest.recordings if entry.windows.get("train"))
    path = frames_path(tmp_path / "shards", entry.id)
    recipe = recipe_of(workers=1, verify_shards=True)
    with pytest.raises(DataError) as caught:
        run_train(recipe, tmp_path / "shards", tmp_path, Failing(path))
    assert str(caught.value).startswith(str(path))
    assert not re.search(r"\n|Traceback|DataLoader", str(caught.value))


class Odd(Dataset):
    """A row of it fails."""

    def __init__(self, fail) -> None:
        self._fail = fail

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        return self._fail() if index else index


def signal_self():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    return signal.alarm(0)


def refuse_data():
    raise DataError("here: found a, expected b; do c: or d")


def refuse_file():
    raise OSError(5, "Input/output error", "/a/frames.arrow")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def bug():
    raise KeyError("ours")


@pytest.mark.fault("F20")
@pytest.mark.parametrize(
    ("fail", "kind", "said"),
    [
        (refuse_data, DataError, r"^here: found a, expected b; do c: or d$"),
        (refuse_file, OSError, r"^\[Errno 5\] Input/output error: '/a/frames.arrow'$"),
        (die, OmniError, r"^a worker that reads shards was killed, perhaps for memory; run .*workers=0$"),
        (bug, KeyError, r"Traceback"),  # ours, and told as such
    ],
)
def test_what_a_worker_says_is_said_in_its_words(fail, kind, said):
    with pytest.raises(kind, match=said) as caught, in_words_of_workers():
        list(DataLoader(Odd(fail), num_workers=1, multiprocessing_context="fork"))
    assert type(caught.value) is kind


@pytest.mark.fault("F2")
def test_a_signal_to_every_process_does_not_end_a_worker_at_once():
    """The process that trains hears it too, and needs its workers to end the step and save it."""
    first, left_s = DataLoader(
        Odd(signal_self), num_workers=1, multiprocessing_context="fork", batch_size=None, worker_init_fn=Patient(None)
    )
    assert first == 0
    assert 100 < left_s <= 120  # then it ends, should nobody have ended it
