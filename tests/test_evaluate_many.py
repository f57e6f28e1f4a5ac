"""`omni eval` of several runs, of model folders and of revisions on the hub: one set of windows, one table."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from omni_cli import files
from omni_cli.__main__ import run as omni
from omni_cli.recipe import Metric
from omni_cli.recipes.vlm import Vlm
from omni_cli.scores.intervals import paired_difference
from omni_cli.stages import runs
from omni_cli.stages.cards import put_card
from omni_cli.stages.evaluate import candidate_of_base, candidate_of_model
from omni_cli.stages.evaluate.comparison import (
    WindowErrors,
    notes_of_all,
    pair_lines,
    pairs_of,
    scores_with_intervals,
)
from omni_cli.stages.evaluate.tables import condition_row, notes_of
from omni_cli.stages.export import ExportRequest, export
from omni_cli.stages.locate import names_model
from omni_cli.stages.models import open_model
from omni_cli.stages.train import TrainRequest, train
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic

QUICK = ("--no-blind", "--controls", "none")
ONE = ("camera_front_wide_120fov",)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs on the same shards of which `a` learned to answer, one on others, and what `a` was exported to."""
    home = tmp_path_factory.mktemp("many")
    write_synthetic(home / "data", cameras=ONE, clips_per_chunk=2)
    recipe = tiny_recipe(cameras="1-cam")
    enough = {"learning_rate": 3e-3, "batch_size": 4, "max_steps": 40}
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update=enough)})
    made = make_run(home, longer, data=home / "data", name="a")
    slower = recipe.train.model_copy(update={"learning_rate": 1e-3, "publish": "best", "validation_windows": 2})
    train_on(made, made.recipe.model_copy(update={"train": slower}), made.shards, "b")
    export(made.recipe, made.run, ExportRequest("hf"), QUIET)
    shutil.copytree(made.run.folder / "export" / "hf", home / "bought")
    short = tiny_recipe(cameras="1-cam", sample=made.recipe.sample.model_copy(update={"labels": "speed"}))
    make_run(home, short, data=home / "data", name="short")
    return home


def train_on(made, recipe, shards, name):
    train(recipe, TrainRequest(shards, made.data, made.run.folder.parent, name, "test"), QUIET)


@pytest.fixture(autouse=True)
def _at_home(home, monkeypatch):
    monkeypatch.chdir(home)


def asked(capsys, *words: str) -> tuple[int, dict, str]:
    """Ask the command line; return its exit code, its document and what it said."""
    code = omni(["eval", *words, *QUICK, "--json"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}, captured.err


# -- several runs


def test_two_runs_are_measured_at_the_same_windows_in_one_table(home, capsys):
    code, found, said = asked(capsys, "a", "b", "--out", "both")
    assert code == 0
    assert [line["name"] for line in found["models"]] == ["a", "b"]
    assert [line["run"] for line in found["models"]] == ["runs/a", "runs/b"]
    assert (found["split"], found["recordings"]) == ("val", 2)
    for line, report in zip(found["models"], found["reports"], strict=True):
        assert report["windows"] == found["windows"] == len(Path(report["answers"]).read_text().splitlines())
        assert line["speed_mae"] == report["conditions"][0]["speed_mae"]
        own = files.read_json(Path("runs", line["name"], "eval", "report.json"))
        assert own["conditions"] == report["conditions"]
    page = (home / "both" / "comparison.html").read_text()
    assert found["report"] == "both/comparison.html"
    for note in ("no answer could be read, of 12 in all", "the weights were chosen by their loss on this very split"):
        assert note in page
        assert any(line.startswith("b: ") and note in line for line in found["notes"])
    assert page.count("<h2>") == 2  # of no pairs no table: the constant's numbers, which b has, are no score of it
    assert (found["pairs"], "b - a" in said) == ([], False)
    assert "data:image/png;base64," in page
    again = asked(capsys, "a", "b", "--out", "both")
    assert again[2].count("nothing to do") == 2
    assert again[1]["models"] == found["models"]


def test_whose_shards_these_are_decides_which_windows_all_are_asked_about(home, capsys):
    """Alone, a model of which nobody knows what it learned from would be asked about every window."""
    words = ("bought", "a", "--shards", "shards/a", "--out", "shared")
    code, found, said = asked(capsys, *words)
    assert code == 0, said
    assert [report["split"] for report in found["reports"]] == ["val", "val"]
    assert {(pair["one"], pair["other"], pair["metric"]) for pair in found["pairs"]} == {
        ("bought", "a", "speed_mae"), ("bought", "a", "displacement_mae")
    }  # fmt: skip
    assert {(pair["difference"], pair["says"]) for pair in found["pairs"]} == {
        (0.0, "too few recordings to say: 2, and it takes 6")
    }
    assert "a - bought" in said
    assert (home / "shared" / "comparison.html").read_text().count("<h2>") == 4


def test_runs_of_one_name_are_told_apart_by_their_folders(home, capsys, tmp_path):
    """However long the names of folders are, the picture has room for them."""
    other = tmp_path / ("x" * 90) / "a"
    shutil.copytree("runs/a", other)
    code, found, said = asked(capsys, "a", str(other), "--out", str(tmp_path / "out"))
    assert code == 0, said
    assert [line["name"] for line in found["models"]] == ["runs/a", str(other)]
    assert {(pair["one"], pair["other"]) for pair in found["pairs"]} == {("runs/a", str(other))}
    assert omni(["eval", "a", str(Path("runs/a").resolve())]) == 2
    assert "a is named twice" in capsys.readouterr().err


def windows(errors: dict[str, list[float | None]], recordings: str) -> WindowErrors:
    rows = [dict(zip(errors, row, strict=True)) for row in zip(*errors.values(), strict=True)]
    return WindowErrors(tuple((name, number, number + 1) for number, name in enumerate(recordings)), tuple(rows))


def test_a_pair_is_compared_where_both_have_an_error_and_by_recording():
    rng, recordings = np.random.default_rng(3), "aabbccddeeff"
    ones, apart = rng.gamma(2, 2, size=12), rng.normal(-1.0, 0.2, size=12)
    metrics = [Metric("error", "error", "m"), Metric("never", "never", "m"), Metric("share", "", "", is_error=False)]
    no_error = [None] * 12
    one = windows({"error": [*ones[:11], None], "never": no_error, "share": [0.5] * 12}, recordings)
    other = windows({"error": [*(ones + apart)[:11], 5.0], "never": no_error, "share": [0.1] * 12}, recordings)
    (better,) = pair_lines("A", "B", one, other, metrics)
    assert (better["metric"], better["windows"], better["says"]) == ("error", 11, "B is better")
    assert better["recordings"] == 6
    assert better["difference"] == pytest.approx(apart[:11].mean())
    assert better["interval"] == pytest.approx(paired_difference(0 * ones[:11], apart[:11], list(recordings[:11]))[1])
    (worse,) = pair_lines("B", "A", other, one, metrics)
    assert (worse["difference"], worse["says"]) == (pytest.approx(-better["difference"]), "A is worse")
    (same,) = pair_lines("A", "A", one, one, metrics)
    assert (same["difference"], same["says"]) == (0.0, "no difference shown")
    lone = windows({"error": [1.0, 2.0]}, "aa")
    assert pair_lines("A", "B", lone, lone, metrics[:1])[0]["says"] == "one recording says nothing of others"
    five = [windows({"error": [of] * 5}, "abcde") for of in (1.0, 9.0)]
    assert pair_lines("A", "B", *five, metrics[:1])[0]["says"] == "too few recordings to say: 5, and it takes 6"


ERROR, BEST = Metric("error", "error", "m"), Metric("best", "best", "m", is_drawn=True)


def measured(folder: Path, name: str, **more) -> dict:
    """A report of eight windows of eight recordings, and what is written beside it."""
    folder.mkdir(exist_ok=True)
    errors, constant = more.pop("errors", {"error": 1.0, "best": 1.0}), more.pop("constant", 4.0)
    lines = [{"recording": str(at), "start_us": 0, "end_us": 1, "errors": errors} for at in range(8)]
    answers = folder / f"{name}.jsonl"
    answers.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = [
        {"name": of, "unreadable": 0.0, **summed({"error": value, "best": value})}
        for of, value in (("model", 1.0), ("constant", constant))
    ]
    model = {**rows[0], **summed(errors), "unreadable": more.pop("silent", 0.0), "drawn_unreadable": 0.0, **more}
    facts = {"learned_from": {}, "chosen_on": None, "windows": 8, "temperature": 1.0, "reference": "constant"}
    return {**facts, "name": name, "run": f"runs/{name}", "answers": str(answers), "conditions": [model, rows[1]]}


def summed(errors: dict[str, float | None]) -> dict:
    return {f"{key}{part}": value for key, value in errors.items() for part in ("", "_interval", "_of_reference")} | {
        f"{key}_interval": None for key in errors
    }


def drawn_of(reports: list[dict], metric: Metric) -> list[int]:
    """How many dots there are of each model, the first first."""
    found = {"models": [{**report["conditions"][0], "name": report["name"]} for report in reports]}
    (axis,) = scores_with_intervals(found, [metric]).axes
    dots = [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "o"]
    return [dots.count(place) for place in reversed(range(len(reports)))]


def test_a_silent_model_is_neither_drawn_nor_judged(tmp_path):
    """What it has are the constant's numbers; greedy and drawn answers are silent each by themselves."""
    speaks, mute = measured(tmp_path, "speaks"), measured(tmp_path, "mute", silent=1.0)
    hot = measured(tmp_path, "hot", drawn_unreadable=1.0)
    reports = [speaks, mute, hot]
    pairs = {(line["one"], line["other"], line["metric"]) for line in pairs_of(reports, [ERROR, BEST])}
    assert pairs == {("speaks", "hot", "error"), ("speaks", "mute", "best")}
    assert (drawn_of(reports, ERROR), drawn_of(reports, BEST)) == ([1, 0, 1], [1, 1, 0])
    cells = [[condition_row(report["conditions"][0], [metric])[1:] for report in reports] for metric in (ERROR, BEST)]
    said, silent = ["1.00", "n/a", "1.00", "0.0%"], ["no answer", "n/a", "n/a", "100.0%"]
    assert cells == [[said, silent, said], [said, said, silent]]
    assert condition_row(speaks["conditions"][1], [BEST])[-1] == "n/a"  # nothing was drawn of it
    (note,) = notes_of(hot)
    assert note == "none of the answers drawn at temperature 1 could be read: no number is a score of them"


def test_a_metric_that_counts_at_no_window_is_not_drawn(tmp_path):
    short = measured(tmp_path, "short", errors={"error": None, "best": 1.0})
    assert drawn_of([measured(tmp_path, "long"), short], ERROR) == [1, 0]


def test_a_comparison_says_what_its_reports_say_and_that_their_constants_differ(tmp_path):
    best = measured(tmp_path, "best") | {"chosen_on": "val"}
    last = measured(tmp_path, "last", silent=0.25)
    flattered, unread = notes_of_all([best, last], [ERROR])
    assert flattered.startswith("best: the weights were chosen by their loss on this very split, val")
    assert unread == "last: 25.0% of the answers could not be read; they count as the constant"
    other = measured(tmp_path, "other", constant=5.0)
    (constants,) = notes_of_all([measured(tmp_path, "one"), other], [ERROR])
    assert constants.startswith("The constant is not the same for all")
    assert "(one 4.00 m, other 5.00 m)" in constants


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("a", "short"),
            "a is measured by speed MAE and displacement MAE beside constant median, short by speed MAE beside",
        ),
        (("a", "b", "a"), "a is named twice; name each model once"),
        (("a", "bought"), "bought: nothing says what to measure it on; name windows with --shards"),
        (("a", "--revision", "v1"), "--revision goes with one model on the hub"),
        (("runs/aa",), "no run runs/aa, neither a folder nor a name in runs; did you mean 'a'?"),
        (("a", "--controls", "most"), "--controls most: expected all, basic or none"),
    ],
)
def test_what_no_table_can_hold_is_refused_in_one_line(words, message, capsys):
    assert omni(["eval", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_runs_of_other_shards_need_windows_that_none_of_them_learned_from(home, capsys, tmp_path):
    """Another split seed, so that the two learn from other recordings."""
    short = tiny_recipe(cameras="1-cam")
    other = make_run(tmp_path, short.model_copy(update={"split": short.split.model_copy(update={"seed": 2})}),
                     data=home / "data", name="other")  # fmt: skip
    folder = str(other.run.folder)
    assert omni(["eval", "a", folder, *QUICK]) == 2
    assert "a, other learned from different shards; name windows that none" in capsys.readouterr().err
    assert omni(["eval", folder, "a", *QUICK, "--shards", str(other.shards), "--split", "val"]) == 3
    assert "trained on:" in capsys.readouterr().err
    assert not (other.run.folder / "eval").exists()  # nothing is measured before all are checked


# -- how the weights were chosen


def test_weights_that_were_chosen_on_the_split_are_said_to_be(home, capsys):
    chosen, last = asked(capsys, "b"), asked(capsys, "a")
    assert [report["chosen_on"] for _, report, _ in (chosen, last)] == ["val", None]
    line = "the weights were chosen by their loss on this very split, val"
    assert line in chosen[2]
    assert line in Path(chosen[1]["report"]).read_text()
    assert line not in last[2]


# -- model folders


def test_a_model_in_its_runs_folder_is_measured_as_the_run_is(home, capsys):
    _, of_run, _ = asked(capsys, "a")
    code, of_model, _ = asked(capsys, "runs/a/export/hf", "--out", "models")
    assert code == 0
    assert of_model["conditions"] == of_run["conditions"]
    assert of_model["learned_from"] == of_run["learned_from"]
    assert of_model["constant_of"] == "the windows that it learned from"
    assert "run" not in of_model
    assert of_model["model"] == "runs/a/export/hf"
    assert Path(of_model["report"]).parent.parent == Path("models")


def test_of_a_model_from_elsewhere_nothing_is_known_and_that_is_said(home, capsys):
    words = ("bought", "--shards", "shards/a", "--split", "val", "--out", "models")
    code, report, said = asked(capsys, *words)
    assert code == 0
    assert report["learned_from"] is None
    assert "warning: nobody can say what bought learned from" in said
    assert report["constant_of"] == "the training windows of shards/a"
    _, of_run, _ = asked(capsys, "a")
    assert report["conditions"] == of_run["conditions"]
    _, both, _ = asked(capsys, "bought", "a", "--shards", "shards/a", "--split", "val", "--out", "models")
    assert [line["learned_from"] is None for line in both["models"]] == [True, False]
    assert "bought: nobody can say what bought learned from" in Path(both["report"]).read_text()


def test_another_precision_is_another_question_to_a_base(home):
    recipe = tiny_recipe(cameras="1-cam", mode="lora")

    def key(**loaded):
        return candidate_of_base(recipe.model_copy(update=loaded), Path("shards/a"), "test", Path("out"), QUIET).key

    assert key() == key()
    assert len({key(), key(precision="bfloat16"), key(quantization="nf4"), key(model="tiny:qwen3_vl")}) == 4


def test_a_models_card_is_no_part_of_it(home, tmp_path):
    """Export writes it anew from what was measured: that must not ask the model all over again."""
    folder = tmp_path / "bought"
    shutil.copytree("bought", folder)
    shutil.copy(files.receipt_path(Path("runs/a/export/hf")), files.receipt_path(folder))

    def key():
        model = open_model(folder)
        return candidate_of_model(model.recipe_settings(Vlm), model, tmp_path, "bought").key

    first = key()
    put_card(folder, "measured since")
    assert (folder / "README.md").read_text().startswith("measured since")
    assert key() == first
    (folder / "model.safetensors").write_bytes(b"others")
    runs.seal_folder(folder)
    assert key() != first


# -- the hub


@pytest.fixture
def cached_hub(home, tmp_path, monkeypatch):
    """The hub's cache with two revisions of one model: what run a was exported to, and the same changed a little."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = cache / "models--org--driver"
    for name, commit in (("v1", "1" * 40), ("v2", "2" * 40)):
        shutil.copytree(home / "bought", folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    return folder


def test_revisions_of_one_model_on_the_hub_are_compared(home, cached_hub, capsys):
    card = cached_hub / "snapshots" / ("2" * 40) / "omni.json"
    files.write_json(card, {**files.read_json(card), "from_run": "another"})
    words = ("org/driver", "--revision", "v1", "--revision", "v2", "--shards", "shards/a", "--split", "val")
    code, found, said = asked(capsys, *words, "--out", "hub")
    assert code == 0, said
    assert [line["model"] for line in found["models"]] == ["org/driver@v1", "org/driver@v2"]
    assert [Path(line["report"]).parent.name for line in found["models"]] == ["org--driver@v1", "org--driver@v2"]
    _, of_run, _ = asked(capsys, "a")
    assert found["reports"][0]["conditions"] == of_run["conditions"]


def test_a_base_model_is_asked_zero_shot_at_a_revision(home, cached_hub, capsys):
    """Without omni's card it is a base like any other, which transformers itself loads at that revision."""
    for snapshot in (cached_hub / "snapshots").iterdir():
        (snapshot / "omni.json").unlink()
    words = ("org/driver@v2", "--shards", "shards/a", "--split", "val", "--out", "hub", "--profile", "cpu-tiny")
    code, report, said = asked(capsys, *words)
    assert code == 0, said
    assert report["model"] == "org/driver@v2"
    assert "no training of ours: org/driver@v2, zero-shot" in said
    assert "nobody can say what org/driver@v2 learned from" in said
    assert omni(["eval", "org/driver@v9", *QUICK, "--shards", "shards/a", "--profile", "cpu-tiny"]) == 1
    assert "'org/driver@v9'" in capsys.readouterr().err


def test_a_word_means_a_run_a_folder_or_a_model_on_the_hub(home):
    runs_folder = Path("runs")
    models = ("bought", "runs/a/export/hf", "org/driver", "org/driver@refs/pr/1", "tiny:qwen3_vl")
    assert [names_model(word, runs_folder) for word in models] == [True] * 5
    assert [names_model(word, runs_folder) for word in ("a", "runs/a", "nowhere", "runs/aa", "a/b/c")] == [False] * 5
