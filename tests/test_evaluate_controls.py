"""What `omni eval` shows a model, how many windows at once, and what it does with the answers: without training one."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from omni_cli.errors import OmniError
from omni_cli.models.drawing import SeededNoise
from omni_cli.recipe import Metric, Prediction
from omni_cli.recipes.vlm.settings import VlmSample
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import open_shards
from omni_cli.scores.strata import Strata
from omni_cli.stages.etl import EtlRequest, ensure_sidecar, etl
from omni_cli.stages.evaluate import Asker, Condition, Scored
from omni_cli.stages.evaluate.asking import batch_ends, seed_of
from omni_cli.stages.evaluate.conditions import shown
from omni_cli.stages.evaluate.scored import FEWEST_RECORDINGS, FEWEST_WINDOWS
from omni_cli.stages.evaluate.tables import strata_table
from tests.support.pipeline import QUIET, tiny_recipe, write_synthetic

TWO = ("camera_front_wide_120fov", "camera_cross_left_120fov")


@pytest.fixture(scope="module")
def recipe():
    return tiny_recipe(cameras=",".join(TWO))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("controls") / "data"
    write_synthetic(data, cameras=TWO)
    return data


@pytest.fixture(scope="module")
def dataset(recipe, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    shards = open_shards(etl_into(recipe, data, out))
    return WindowDataset(shards, "all", ensure_sidecar(shards, recipe, QUIET))


def etl_into(recipe, data, out):
    etl(recipe, EtlRequest(data=data, out=out, workers=0), QUIET)
    return out


@pytest.fixture(scope="module")
def few(dataset):
    """Windows of one recording: a tiny untrained model answers at length."""
    return WindowDataset(dataset.shards, "val", dataset.sidecar_key)


@pytest.fixture(scope="module")
def built(recipe, dataset):
    return recipe.load_base_to_ask(dataset.preprocess)[0]


# -- what is shown


def places(pictures: torch.Tensor, whole: torch.Tensor, axis: int) -> list[int]:
    """Where on an axis of the whole each slice of the pictures comes from."""
    return [
        next(at for at, candidate in enumerate(whole.unbind(axis)) if torch.equal(candidate, one))
        for one in pictures.unbind(axis)
    ]


@pytest.mark.parametrize(("name", "axis"), [("time shuffled", 0), ("cameras shuffled", 1)])
def test_nothing_keeps_its_place_on_the_axis_that_is_shuffled_and_nothing_else_moves(dataset, name, axis):
    see, orders = shown(dataset, "all", QUIET)[name], []
    for index in range(len(dataset)):
        whole, pictures = dataset.pictures(index), see(index)
        assert pictures.shape == whole.shape
        orders.append(places(pictures, whole, axis))
        assert sorted(orders[-1]) == list(range(whole.shape[axis]))
        assert all(at != origin for at, origin in enumerate(orders[-1]))
        assert torch.equal(pictures, see(index))
    assert (len({tuple(order) for order in orders}) > 1) == (axis == 0)  # two cameras have one other order


def test_how_many_controls_are_shown_is_the_users_choice(dataset):
    everything = ["model", "pictures swapped", "first frame repeated", "cameras shuffled", "time shuffled"]
    assert [list(shown(dataset, controls, QUIET)) for controls in ("all", "basic", "none")] == [
        everything, everything[:3], everything[:1]
    ]  # fmt: skip


def test_what_one_camera_or_one_frame_cannot_show_is_left_out_with_a_line(data, tmp_path, capsys):
    recipe = tiny_recipe(cameras=TWO[0])
    alone = recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"window": 1})})
    dataset = WindowDataset(open_shards(etl_into(alone, data, tmp_path)), "all")
    assert list(shown(dataset, "all", Console())) == ["model", "pictures swapped", "first frame repeated"]
    said = capsys.readouterr().err
    assert "no control with shuffled cameras: the model looks through one" in said
    assert "no control with shuffled time: a window is one frame" in said


# -- how many at once


def test_batches_hold_32_windows_or_as_many_tokens_as_one_may_have():
    rng = np.random.default_rng(0)
    for most in (100, 5_000, 90_000):
        lengths = rng.integers(1, most, size=300).tolist()
        ends = batch_ends(lengths, None)
        assert (ends[0], ends[-1]) == (0, 300)
        for index, (start, end) in enumerate(pairwise(ends)):
            size, longest = end - start, max(lengths[start:end])
            assert 1 <= size <= 32
            assert size == 1 or size * longest <= 65_536
            if index + 2 < len(ends):  # one more would not have fitted
                assert size == 32 or (size + 1) * max(lengths[start : end + 1]) > 65_536
    assert batch_ends([90_000] * 7, 3) == [0, 3, 6, 7]  # who says how many gets as many
    assert batch_ends([0] * 6, 3) == [0, 3, 6]


def test_a_batch_that_does_not_fit_is_said_with_one_that_may(dataset):
    class TooLarge:
        def predict(self, built, rows, preprocess):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    for batch, advice in ((3, "for 3 windows at once; ask about fewer with --batch 1"), (1, "a larger device")):
        with pytest.raises(OmniError, match=advice):
            Asker(TooLarge(), None, dataset, QUIET, batch).ask("model", dataset.pictures)


def test_answers_do_not_depend_on_how_many_windows_are_asked_about_at_once(recipe, built, few):
    together, apart = (Asker(recipe, built, few, QUIET, batch).ask("model", few.pictures) for batch in (None, 4))
    assert [one.text for one in together.predictions] == [one.text for one in apart.predictions]


# -- answers by chance


def test_what_is_drawn_of_a_window_depends_on_no_other(recipe, built, few):
    together, apart = (Asker(recipe, built, few, QUIET, batch).draw(0, 2, 1.0) for batch in (None, 4))
    assert [one.text for one in together] == [one.text for one in apart]
    assert len({one.text for one in together}) == len(few) > 4
    another = Asker(recipe, built, few, QUIET).draw(1, 2, 1.0)
    assert all(one.text != other.text for one, other in zip(together, another, strict=True))


def test_cold_draws_are_the_greedy_answers(recipe, built, few):
    asker = Asker(recipe, built, few, QUIET)
    greedy = asker.ask("model", few.pictures).predictions
    assert [one.text for one in asker.draw(0, 1, 1e-6)] == [one.text for one in greedy]


def test_tokens_are_drawn_as_the_softmax_at_a_temperature_says():
    logits, temperature, draws = torch.tensor([0.5, -1.0, 2.0, 0.0]), 1.7, 4000
    drawn = SeededNoise(range(draws), temperature)(None, logits.expand(draws, 4)).argmax(-1)
    expected = torch.softmax(logits.double() / temperature, 0).numpy() * draws
    assert stats.chisquare(np.bincount(drawn, minlength=4), expected).pvalue > 1e-3


def test_a_seed_is_of_one_window_and_one_draw():
    rows = [{"recording": name, "start_us": at, "end_us": at + 5} for name in "ab" for at in (0, 10)]
    seeds = {seed_of(row, number) for row in rows for number in range(3)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**48 for seed in seeds)


# -- what becomes of the answers


def speed_row(recording: int, number: int, speed: float) -> dict:
    still = {"start_us": number, "end_us": number + 1_000_000, "start_speed_mps": speed, "dyaw_rad": 0.0}
    return {"recording": f"r{recording}", "mean_speed_mps": speed, "displacement_m": speed, **still}


def says(speed: float | None) -> Prediction:
    values = None if speed is None else {"mean_speed_mps": speed, "displacement_m": speed}
    return Prediction("said", values)


def scored(recipe, rows, said, **more):
    medians = {"mean_speed_mps": 10.0, "displacement_m": 10.0}
    constant = Condition("constant median", [says(10.0)] * len(rows), ([says(10.0)] * len(rows),))
    return Scored(recipe, rows, medians, [Condition("model", said, **more), constant], len(more.get("drawn", ())))


def test_each_stratum_is_measured_beside_the_constant_in_it(recipe):
    rng = np.random.default_rng(4)
    slow = [speed_row(number % FEWEST_RECORDINGS, number, rng.uniform(3, 6)) for number in range(FEWEST_WINDOWS)]
    fast = [speed_row(number % FEWEST_RECORDINGS, number, 30.0) for number in range(100, 99 + FEWEST_WINDOWS)]
    of_few = [speed_row(number % (FEWEST_RECORDINGS - 1), number, 20.0) for number in range(200, 250)]
    rows = slow + fast + of_few
    said = [says(row["mean_speed_mps"] + 0.5) for row in rows]
    lines = {(line["strata"], line["name"]): line for line in scored(recipe, rows, said).strata()}
    assert {name for strata, name in lines if strata == "speed"} == {"2 to 7 m/s", "14 to 22 m/s", "22 m/s and more"}
    found = lines["speed", "2 to 7 m/s"]
    assert (found["windows"], found["recordings"]) == (FEWEST_WINDOWS, FEWEST_RECORDINGS)
    assert found["speed_mae"] == pytest.approx(0.5)
    assert found["speed_mae_of_reference"] == pytest.approx(0.5 / np.mean([10 - row["mean_speed_mps"] for row in slow]))
    assert found["speed_mae_interval"] == pytest.approx((0.5, 0.5))
    for few, windows in (("22 m/s and more", FEWEST_WINDOWS - 1), ("14 to 22 m/s", 50)):
        assert lines["speed", few]["windows"] == windows
        assert lines["speed", few]["speed_mae"] is None
    assert lines["manoeuvre", "straight"]["windows"] == len(rows)


def test_too_few_are_the_windows_of_a_stratum_in_which_a_metric_counts():
    """Of a hundred windows a car that stops soon may leave few whose path goes on for ten seconds."""
    count = np.array([100, FEWEST_WINDOWS - 1, 0, FEWEST_WINDOWS, 100])
    recipe, known = Counting(), np.arange(100)[:, None] < count
    recordings = np.arange(100) % 10
    known[:, 4] &= recordings < FEWEST_RECORDINGS - 1
    rows = [{"recording": f"r{of}", "known": of_row} for of, of_row in zip(recordings, known, strict=True)]
    told = [Condition(name, [Prediction("", {})] * 100) for name in ("model", "constant")]
    found = Scored(recipe, rows, {}, told)
    (line,) = found.strata()
    assert line["windows"] == 100
    assert [line[f"m{at}_windows"] for at in range(5)] == [*count[:4], known[:, 4].sum()]
    assert [line[f"m{at}"] for at in range(5)] == [1.0, None, None, 1.0, None]
    report = {"conditions": found.lines(), "strata": [line], "reference": "constant"}
    _, (cells,) = strata_table(report, recipe.metrics)
    assert cells[3::3] == ["1.00", "too few", "n/a", "1.00", "too few"]
    report["conditions"][0]["unreadable"] = 1.0
    assert strata_table(report, recipe.metrics)[1][0][3::3] == ["no answer"] * 5


class Counting:
    """Five metrics, each of one at the windows where a row says that it is known; one stratum."""

    reference = "constant"
    metrics = tuple(Metric(f"m{at}", f"m {at}", "m") for at in range(5))

    def errors(self, predictions, rows, medians):
        known = np.array([row["known"] for row in rows])
        return {metric.key: np.where(known[:, at], 1.0, np.nan) for at, metric in enumerate(self.metrics)}

    def strata(self, rows):
        return (Strata("kind", ("all",), np.zeros(len(rows), int)),)


def test_the_best_drawn_answer_stands_beside_the_same_constant(recipe):
    rows = [speed_row(number, number, 20.0) for number in range(3)]
    drawn = [[says(19.0), says(None), says(None)], [says(22.0), says(23.0), says(None)]]
    model, constant = scored(recipe, rows, [says(25.0)] * 3, drawn=drawn).lines()
    assert model["speed_mae"] == pytest.approx(5.0)
    assert model["min_speed_mae_of_2"] == pytest.approx((1 + 3 + 10) / 3)  # of the third none could be read
    assert model["drawn_unreadable"] == pytest.approx(3 / 6)
    assert (model["unreadable"], model["unreadable_windows"]) == (0.0, 0)
    assert constant["min_speed_mae_of_2"] == constant["speed_mae"] == pytest.approx(10.0)


def test_min_ade_k_of_a_recipe_of_waypoints_by_brute_force():
    rng, horizons = np.random.default_rng(8), {"1s": 10, "2s": 20, "3s": 30, "6.4s": 64}
    recipe = tiny_recipe(sample=VlmSample(labels="waypoints"))
    truth, told = rng.normal(size=(4, 64, 3)), rng.normal(size=(3, 4, 64, 2))
    rows = [{"recording": f"r{number}", "future_xyz_m": path.ravel()} for number, path in enumerate(truth)]
    median, readable = rng.normal(size=(64, 2)), np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1]], bool)
    drawn = [[Prediction("", {"xy_m": told[d, w]} if readable[d, w] else None) for w in range(4)] for d in range(3)]
    still = [Prediction("", {"xy_m": np.zeros((64, 2))})] * 4
    constant = Condition("constant median", [Prediction("", {"xy_m": median})] * 4)
    conditions = [Condition("model", still, drawn), Condition("stationary", still, (still,)), constant]
    found = Scored(recipe, rows, {"xy_m": tuple(median.ravel())}, conditions, 3)
    model, stationary, _ = found.lines()
    titles = {metric.key: metric.title for metric in found.metrics}
    assert titles["min_ade_6.4s_of_3"] == "minADE_3 6.4 s"
    assert titles["min_fde_1s_of_3"] == "minFDE_3 1 s"
    for horizon, steps in horizons.items():
        best = {"ade": [], "fde": []}
        for window in range(4):
            paths = [told[draw, window] for draw in range(3) if readable[draw, window]] or [median]
            apart = [[math.dist(path[step], truth[window, step, :2]) for step in range(steps)] for path in paths]
            best["ade"].append(min(sum(one) / steps for one in apart))
            best["fde"].append(min(one[-1] for one in apart))
        for kind, of_each in best.items():
            assert model[f"min_{kind}_{horizon}_of_3"] == pytest.approx(np.mean(of_each))
            assert stationary[f"min_{kind}_{horizon}_of_3"] == stationary[f"{kind}_{horizon}"]


def test_every_window_is_written_with_what_was_said_and_how_wrong_it_was(recipe):
    rows = [speed_row(0, 0, 20.0), speed_row(1, 1, 12.0)]
    first, second = scored(recipe, rows, [says(21.0), says(None)]).windows()
    assert (first["recording"], first["text"], first["is_readable"]) == ("r0", "said", True)
    assert first["errors"] == {"speed_mae": pytest.approx(1.0), "displacement_mae": pytest.approx(1.0)}
    assert second["errors"] == second["reference"]
    assert not second["is_readable"]
    assert math.isfinite(second["errors"]["speed_mae"])
