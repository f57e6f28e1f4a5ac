"""What a user typed is heeded or refused: a rank in full tuning, epochs beside steps, a shape beside a student."""

import json
from pathlib import Path

import pytest

from omni_cli.__main__ import run
from omni_cli.commands._compose import compose_recipe
from omni_cli.errors import UsageError
from omni_cli.models.driving_net import new_net, save_net
from omni_cli.profiles import load_profile
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmTrain, VlmTune
from omni_cli.report import Console
from omni_cli.stages.train import TrainRequest
from omni_cli.stages.train.plan import dry_run

FULL_VLM = ["rank=64", "alpha=3", "dropout=0.1", "targets=q_proj", "rank_stabilised=true", "rank=16"]
FULL_VLM += ["vision_targets=qkv", "train_merger=true", "train_merger=false", "vision_targets=[]"]
FULL_DISTILL = ["rank=64", "alpha=3", "dropout=0.1", "targets=out", "rank_stabilised=true"]


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [*(("vlm", setting) for setting in FULL_VLM), *(("distill", setting) for setting in FULL_DISTILL)],
)
def test_what_tells_of_adapters_is_refused_in_full_tuning(recipe, setting):
    """A rank that is given and ignored looks obeyed; one that says what is so already is no better."""
    tiny, typed = load_profile("cpu-tiny"), f"tune.{setting}"
    key = typed.partition("=")[0]
    said = rf"^--set: {key} is for adapters, and tune.mode is full; say --set tune.mode=lora, or leave it out$"
    with pytest.raises(UsageError, match=said):
        compose_recipe(recipe, tiny, sets=[typed])
    assert compose_recipe(recipe, tiny, sets=[typed, "tune.mode=lora"]).origin_of(key) == "--set"


def test_every_adapter_setting_is_known_to_full_tuning():
    """A new one must not slip by."""
    tune = compose_recipe("vlm", load_profile("cpu-tiny")).value.tune
    assert {*type(tune).model_fields} - {*tune.unheeded()} == {"mode", "freeze"}
    assert not tune.model_copy(update={"mode": "dora"}).unheeded()


def test_a_profile_may_hold_what_another_way_of_tuning_heeds():
    composed = compose_recipe("vlm", load_profile("h200-bf16"), sets=["tune.mode=full"])
    assert (composed.value.tune.mode, composed.value.tune.rank) == ("full", 128)


def test_a_file_may_hold_what_another_way_of_tuning_heeds(tmp_path: Path):
    """A run's config.toml lists every key: it asks for the same again, on any machine and of any age."""
    config, profile = tmp_path / "run.toml", load_profile("h200-bf16")
    config.write_text('[tune]\nmode = "full"\nrank = 64\n[train]\nepochs = 3.0\n')
    again = compose_recipe("vlm", profile, config=config, sets=["train.max_steps=2"])
    assert (again.value.tune.mode, again.value.tune.rank, again.value.train.epochs) == ("full", 64, 3.0)
    assert compose_recipe("vlm", profile, config=config, sets=["tune.mode=dora"]).value.tune.rank == 64
    with pytest.raises(UsageError, match=r"^--set: tune\.rank is for adapters"):
        compose_recipe("vlm", profile, config=config, sets=["tune.rank=64"])


def test_epochs_are_refused_where_steps_are_counted():
    tiny = load_profile("cpu-tiny")
    said = r"^--set: train\.epochs has no effect where train\.max_steps is 800; say --set train\.max_steps=-1 too, or "
    with pytest.raises(UsageError, match=said):
        compose_recipe("vlm", tiny, sets=["train.epochs=2"])
    assert compose_recipe("vlm", tiny, sets=["train.epochs=2", "train.max_steps=-1"]).value.train.epochs == 2


def test_the_shape_of_a_student_that_is_named_is_its_own(tmp_path: Path):
    tiny = load_profile("cpu-tiny")
    save_net(new_net("tiny:convnextv2", num_hypotheses=1, hidden=8, seed=0), tmp_path)
    sets = [f"model={tmp_path}", "tune.mode=dora"]
    for typed in ("hidden=64", "hypotheses=3"):
        said = (
            rf"^--set: {typed.partition('=')[0]} has no effect where model = {tmp_path}, a student that has its own; "
        )
        with pytest.raises(UsageError, match=said):
            compose_recipe("distill", tiny, sets=[*sets, typed])
    assert compose_recipe("distill", tiny, sets=sets).value.hidden == 64  # the profile's


def test_an_adapters_rank_is_refused_in_full_tuning_and_nothing_is_planned(tmp_path, capsys, monkeypatch) -> None:
    """The prototypes ignored the rank that they were given; a profile that tunes in full passed it over as well."""
    monkeypatch.chdir(tmp_path)
    assert run(["train", "--profile", "cpu-tiny", "--dry-run", "--set", "tune.rank=64"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "error: --set: tune.rank is for adapters, and tune.mode is full; say --set tune.mode=lora, or leave it out"
    ]


def test_parts_to_freeze_may_be_typed_with_commas(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    learning = []
    for typed in ("vision,merger", '["vision", "merger"]', "vision", "[]"):
        command = ["train", "--profile", "cpu-tiny", "--dry-run", "--json", "--set", f"tune.freeze={typed}"]
        assert run(command) == 0
        learning.append(json.loads(capsys.readouterr().out)["trainable_parameters"])
    assert learning[0] == learning[1] < learning[2] < learning[3]


def test_an_empty_text_is_no_list() -> None:
    """A shell's variable that was never set."""
    with pytest.raises(UsageError, match=r"tune\.targets = '': input should be a valid tuple, such as"):
        compose_recipe("vlm", load_profile("h200-bf16"), sets=["tune.targets="])


def test_the_notes_of_a_plan_are_sentences_of_their_own(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    train = {"sharding": "fsdp2", "max_steps": 2}
    vlm = Vlm(model="tiny:qwen2_5_vl", precision="bfloat16", tune=VlmTune(mode="full"), train=VlmTrain(**train))
    first, *others = vlm.size(vlm.preprocess()).notes
    request = TrainRequest(None, tmp_path, tmp_path, "r", "cpu-tiny", dry_run=True)
    dry_run(vlm, request, Console(), processes=2)
    assert others
    assert "; ".join([first, *others]) in capsys.readouterr().err
