"""What `omni eval` says of a student, on rows made by hand: scales, the constant baseline, the teacher, the picture."""

from types import MappingProxyType

import numpy as np
import pytest
import torch

from omni_cli.config import read_document
from omni_cli.files import write_json
from omni_cli.formats.driving_model import T_IDXS_S
from omni_cli.recipe import Prediction
from omni_cli.stages.runs import LEARNED, Learned
from tests.support.driving import tiny_student

STEPS, WARMUP = 4, 1
CAR, SEEING = (
    tiny_student(sample={"teacher": teacher, "window": STEPS + 1}, train={"warmup_steps": WARMUP})
    for teacher in ("motion", "log")
)
SHAPES = MappingProxyType(
    {
        "driven_xy_m": (33, 2),
        "target_xy_m": (33, 2),
        "speed_mps": (),
        "yaw_rate_radps": (),
        "scene_lane_lines_m": (4, 33, 2),
        "scene_lane_line_prob": (4,),
    }
)
WHOLE = (1, 1, 1, 1)
ALL_POINTS = (33, 33, 33, 33)


def row_of(seed: int, *, counts=WHOLE, driven=ALL_POINTS, taught=ALL_POINTS) -> dict:
    """A window of noise, labelled as a seeing teacher labels it; all numbers are as a shard's, flat."""
    rng = np.random.default_rng(seed)
    values = {name: rng.random((STEPS, *shape), dtype=np.float32).ravel() for name, shape in SHAPES.items()}
    numbers = {"counts": counts, "driven_points": driven, "target_points": taught}
    numbers["scene_is_known"] = [int(points > 0) for points in taught]
    values |= {name: np.array(value, dtype=np.int32) for name, value in numbers.items()}
    return {name: torch.from_numpy(value) for name, value in values.items()}


def column(row: dict, name: str) -> np.ndarray:
    return row[name].numpy().reshape(STEPS, *SHAPES[name]).astype(float)


def says(**values) -> Prediction:
    return Prediction("", values)


# -- the scale


def fit_of(factor: float) -> dict[str, float]:
    """The means over windows whose errors are one draw each, of a student that states their scale times `factor`."""
    rng, row = np.random.default_rng(5), row_of(0)
    truth, said = column(row, "driven_xy_m"), []
    for _ in range(400):
        scale_m = rng.uniform(0.5, 2)
        error_m = rng.laplace(scale=scale_m)
        said.append(says(xy_m=truth + error_m, scale_m=np.full_like(truth, factor * scale_m)))
    errors = CAR.errors(said, [row] * len(said), {})
    return {key: float(values.mean()) for key, values in errors.items()}


def test_of_errors_that_go_together_a_calibrated_scale_fits_best():
    """Each window lies inside an interval or outside as a whole: only the mean over windows knows a good scale."""
    narrow, calibrated, wide = (fit_of(factor) for factor in (0.5, 1.0, 2.0))

    def miss(fit: dict[str, float]) -> np.ndarray:
        return np.abs([fit["inside_50"] - 0.5, fit["inside_90"] - 0.9, np.log(fit["scale_m"] / fit["error_m"])])

    assert (miss(calibrated) < (0.05, 0.03, 0.1)).all()
    assert (miss(narrow) > (0.15, 0.15, 0.5)).all()
    assert (miss(wide) > (0.15, 0.06, 0.5)).all()
    assert narrow["inside_50"] < calibrated["inside_50"] < wide["inside_50"]


def test_what_states_no_scale_is_not_scored_for_one():
    rows = [row_of(0)]
    errors = CAR.errors(CAR.baselines(rows, {})["constant velocity"], rows, {})
    assert all(np.isnan(errors[key]) for key in ("inside_50", "inside_90", "scale_m", "error_m"))
    assert np.isfinite(errors["ade_2s"])


def test_how_scales_fit_is_no_error_by_which_one_student_is_better():
    assert {one.key for one in CAR.metrics if not one.is_error} == {"inside_50", "inside_90", "scale_m", "error_m"}
    assert not any(one.is_drawn for one in CAR.metrics)


# -- the constant baseline


def learned_from(recipe, rows, folder) -> dict:
    """The medians as eval reads them: through the file that train writes."""
    learned = Learned(recordings=("a",), windows=len(rows), medians=recipe.medians(rows))
    write_json(folder / LEARNED, learned.model_dump(mode="json"))
    return read_document(folder / LEARNED, Learned, "").medians


def test_the_median_drive_is_that_of_the_steps_that_count_and_the_points_that_are_known(tmp_path):
    """Brute force, number by number; the first step is of the warm-up, and no path that counts goes past point 30."""
    rows = [
        row_of(1, counts=(1, 1, 0, 1), driven=(33, 20, 33, 7)),
        row_of(2, driven=(33, 0, 30, 12), taught=(33, 33, 33, 0)),
    ]
    rows[1]["scene_lane_line_prob"][:] = torch.tensor([0.9, 0.5, 0.4, 0.1]).repeat(STEPS)
    rows[0]["scene_lane_line_prob"][:] = torch.tensor([0.9, 0.4, 0.6, 0.1]).repeat(STEPS)
    (median,) = SEEING.baselines(rows[:1], learned_from(SEEING, rows, tmp_path))["constant median"]
    counting = [(rows[0], 1), (rows[0], 3), (rows[1], 1), (rows[1], 2), (rows[1], 3)]
    for at in range(33):
        known = [column(row, "driven_xy_m")[step, at] for row, step in counting if row["driven_points"][step] > at]
        expected = [np.median([one[axis] for one in known]) if known else np.nan for axis in (0, 1)]
        np.testing.assert_allclose(median.values["xy_m"][:, at], np.tile(expected, (STEPS, 1)))
    assert np.isnan(median.values["xy_m"][:, 30:]).all()
    of_both, first, second = counting[:4], counting[:2], counting[2:4]  # the teacher is silent at the fifth
    for line, those in enumerate((of_both, second, first, of_both)):  # where it is there; the last line never is
        expected = np.median([column(row, "scene_lane_lines_m")[step, line] for row, step in those], axis=0)
        np.testing.assert_allclose(median.values["lane_lines_m"][:, line], np.tile(expected, (STEPS, 1, 1)))


def test_the_median_is_measured_as_far_as_any_path_went_and_beside_a_teachers_zero(tmp_path):
    rows = [row_of(seed, driven=(20, 20, 20, 20)) for seed in range(5)]  # 3.5 s
    learned = learned_from(SEEING, rows, tmp_path)
    far = [row_of(7), row_of(8)]
    said = SEEING.baselines(far, learned)
    errors = {name: SEEING.errors(those, far, learned) for name, those in said.items()}
    assert (errors["constant median"]["ade_2s"] < errors["constant velocity"]["ade_2s"]).all()
    assert np.isfinite(errors["constant median"]["fde_3s"]).all()
    assert np.isnan(errors["constant median"]["ade_5s"]).all()
    assert (errors["constant median"]["lane_l1"] > 0).all()
    assert not errors["teacher"]["lane_l1"].any()
    assert np.isnan(errors["constant velocity"]["lane_l1"]).all()


def test_the_cars_own_motion_tells_of_no_median_lane(tmp_path):
    rows = [row_of(seed) for seed in range(2)]
    for row in rows:
        for name in [name for name in row if name.startswith("scene_")]:
            row[name] = torch.zeros(0, dtype=row[name].dtype)
    learned = learned_from(CAR, rows, tmp_path)
    assert list(learned) == ["driven_xy_m"]
    assert [one.values.keys() for one in CAR.baselines(rows, learned)["constant median"]] == [{"xy_m"}, {"xy_m"}]


def test_a_run_that_kept_no_median_path_is_measured_without():
    """Older runs kept the medians of numbers alone."""
    rows = [row_of(seed) for seed in range(2)]
    said = SEEING.baselines(rows, {"start_us": 17.0})["constant median"]
    assert [one.values for one in said] == [None, None]
    errors = SEEING.errors(said, rows, {})
    assert all(np.isnan(values).all() for values in errors.values())
    assert errors.keys() == {metric.key for metric in SEEING.metrics}


# -- the teacher


def test_a_teacher_is_measured_beside_others_at_the_steps_where_it_speaks():
    """It is exact at the one step where it speaks, and would win by the others' errors at steps that it left out."""
    rows = [row_of(1, taught=(0, 0, 33, 0)), row_of(2)]
    for row in rows:
        row["target_xy_m"] = row["driven_xy_m"].clone()
    said = SEEING.baselines(rows, {})
    teacher, others = (SEEING.errors(said[name], rows, {}) for name in ("teacher", "constant velocity"))
    assert np.isnan(teacher["ade_2s"]).tolist() == [True, False]
    assert teacher["ade_2s"][1] == teacher["teacher_ade_2s"][0] == teacher["ade_2s_taught"][0] == 0
    truth = column(rows[0], "driven_xy_m")
    straight = column(rows[0], "speed_mps")[:, None] * T_IDXS_S
    error = np.stack([truth[..., 0] - straight, truth[..., 1]], axis=-1)
    grid_s = np.arange(1, 21) / 10

    def ade(step: int) -> float:
        apart = [np.interp(grid_s, T_IDXS_S, error[step, :, axis]) for axis in (0, 1)]
        return float(np.hypot(*apart).mean())

    assert others["ade_2s_taught"][0] == pytest.approx(ade(2))
    assert others["ade_2s"][0] == pytest.approx(np.mean([ade(1), ade(2), ade(3)]))
    assert others["ade_2s_taught"][1] == others["ade_2s"][1]


def test_where_the_car_is_the_teacher_no_one_is_measured_beside_it():
    names = {metric.key for metric in SEEING.metrics} - {metric.key for metric in CAR.metrics}
    assert names == {"ade_2s_taught", "ade_5s_taught", "teacher_ade_2s", "teacher_ade_5s", "lane_l1"}


# -- what is drawn


def test_only_steps_that_count_are_drawn():
    at = int(np.searchsorted(T_IDXS_S, 2.0))
    rows = [
        row_of(1),  # the last step
        row_of(2, counts=(1, 1, 1, 0)),  # the one before
        row_of(3, driven=(33, at + 1, at, 0)),  # the one before that
        row_of(4, counts=(1, 0, 0, 0)),  # none but the warm-up's
        row_of(5, driven=(33, at, at, at)),  # none whose path goes so far
    ]
    said = [says(xy_m=column(row, "driven_xy_m") + 1) for row in rows]
    drawn = [(rows[0], 3), (rows[1], 2), (rows[2], 1)]
    for axis, pair in enumerate(CAR.pairs(said, rows)):
        truth = [column(row, "driven_xy_m")[step, at, axis] for row, step in drawn]
        np.testing.assert_array_equal(pair.truth, truth)
        np.testing.assert_array_equal(pair.predicted, np.add(truth, 1))


# -- kinds of driving


def test_windows_of_steps_are_told_apart_by_what_the_car_did_in_them():
    def row(speeds, turn=0.0):
        row = row_of(1)
        row["speed_mps"], row["yaw_rate_radps"] = torch.tensor(speeds), torch.full((STEPS,), turn)
        return row

    steady, slowing = [9.0] * STEPS, [9.0, 8.6, 8.2, 7.8]  # 0.6 s: 2 m/s^2
    rows = [row(steady), row(steady, 0.1), row(steady, -0.1), row(slowing), row([0.1] * STEPS)]
    by_manoeuvre, by_speed = CAR.strata(rows)
    names = [by_manoeuvre.names[one] for one in by_manoeuvre.of]
    assert names == ["straight", "left", "right", "braking", "standing"]
    assert [by_speed.names[one] for one in by_speed.of] == [*["7 to 14 m/s"] * 4, "under 2 m/s"]
