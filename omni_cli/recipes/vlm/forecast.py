"""What an answer says of the way ahead: a path, and maybe a reason; how wrong it is, and what it must beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from omni_cli.recipe import Metric, Pair, Prediction, Row, Stroke
from omni_cli.recipes.vlm.answers import CONSTANT, Medians, column
from omni_cli.samples.reasoning import usable_texts
from omni_cli.samples.sync import PlannedWindow
from omni_cli.samples.waypoints import NUM_FUTURE, NUM_HISTORY, known_waypoints
from omni_cli.scene.clock import Float64Array
from omni_cli.scene.ground_paths import path_runs
from omni_cli.scene.recording import Recording
from omni_cli.scores import strata
from omni_cli.scores import waypoints as scores
from omni_cli.scores.strata import Strata
from omni_cli.scores.texts import words_off

_SHOWN = (("ade", 3.0), ("ade", 6.4), ("fde", 6.4))
_WORDS_OFF = Metric("reasoning_words_off", "reasoning, words off", "")
_TURN_STEPS = 2  # of the history, over which the yaw rate of the constant curvature is taken
_DRAWN = 29  # of the waypoints, which pairs show: after 3 s
_PREDICTED, _TRUE, _BENEATH_PX = (250, 210, 60), (90, 220, 90), 7  # truth shows on both sides of a path on it
_DECIMALS = 3


@dataclass(frozen=True)
class Forecast:
    """Answers of 64 waypoints (`xy_m`), with a reason where `says_why`."""

    says_why: bool

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Displacement errors at each horizon, and how far the reason is from the one given."""
        errors = [
            Metric(f"{key}_{horizon:g}s", f"{key.upper()} {horizon:g} s", "m", is_shown=(key, horizon) in _SHOWN)
            for horizon in scores.HORIZONS_S
            for key in ("ade", "fde")
        ]
        return (*errors, _WORDS_OFF) if self.says_why else tuple(errors)

    def medians(self, rows: Sequence[Row]) -> dict[str, float | tuple[float, ...]]:
        """Return the median of each coordinate."""
        return {"xy_m": tuple(np.median(_truths(rows), axis=0).ravel().tolist())}

    def errors(
        self, predictions: Sequence[Prediction], rows: Sequence[Row], medians: Medians
    ) -> dict[str, Float64Array]:
        """Return the errors (windows,); an answer that could not be read counts as the median, and as no word."""
        instead = {"xy_m": _median_path(medians), "reasoning": ""}
        values = [instead if one.values is None else one.values for one in predictions]
        found = scores.displacement_errors(np.array([one["xy_m"] for one in values]), _truths(rows))
        by_key = {
            f"{key}_{horizon:g}s": error[:, column]
            for key, error in zip(("ade", "fde"), found, strict=True)
            for column, horizon in enumerate(scores.HORIZONS_S)
        }
        if self.says_why:
            by_key[_WORDS_OFF.key] = np.array([_words_off(one, row) for one, row in zip(values, rows, strict=True)])
        return by_key

    def baselines(self, rows: Sequence[Row], medians: Medians, *, past_speed: bool) -> dict[str, list[Prediction]]:
        """Return the median, the car that stands, and two that keep their speed as the log knows it at the end."""
        speed, turn = np.array([row["end_speed_mps"] for row in rows]), np.array([_yaw_rate(row) for row in rows])
        paths = {
            CONSTANT: np.broadcast_to(_median_path(medians), (len(rows), NUM_FUTURE, 2)),
            "stationary": np.zeros((len(rows), NUM_FUTURE, 2)),
            "constant velocity": scores.arcs(speed, 0 * turn, NUM_FUTURE),
            "constant curvature": scores.arcs(speed, turn, NUM_FUTURE),
        }
        return {name: [Prediction("", {"xy_m": path}) for path in of_all] for name, of_all in paths.items()}

    def strata(self, rows: Sequence[Row]) -> tuple[Strata, ...]:
        """Return windows by what the car does in the 6.4 s after them, and by its speed as these begin."""
        now_mps, futures = column(rows, "end_speed_mps"), _truths(rows)
        duration_s = np.full(len(rows), NUM_FUTURE * scores.STEP_S)
        mean_mps = strata.per_second(scores.path_lengths(futures), duration_s)
        turn_rad = np.array([float(row["future_yaw_rad"][-1]) for row in rows])
        acceleration_mps2 = strata.mean_acceleration(np.abs(now_mps), mean_mps, duration_s)
        return strata.motion_strata(mean_mps, acceleration_mps2, strata.per_second(turn_rad, duration_s), now_mps)

    def drawn_metrics(self, count: int) -> dict[str, Metric]:
        """Return minADE_k and minFDE_k at each horizon."""
        paths = [metric for metric in self.metrics if metric is not _WORDS_OFF]
        return {
            one.key: replace(
                one, key=f"min_{one.key}_of_{count}", title=f"min{_of_count(one.title, count)}", is_drawn=True
            )
            for one in paths
        }

    def pairs(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> tuple[Pair, ...]:
        """Return where the car is after three seconds."""
        truth = _truths(rows)[:, _DRAWN]
        nowhere = np.full((NUM_FUTURE, 2), np.nan)
        said = np.array([nowhere if one.values is None else one.values["xy_m"] for one in predictions])[:, _DRAWN]
        titles = ("metres ahead after 3 s", "metres to the left after 3 s")
        return tuple(Pair(title, "m", truth[:, axis], said[:, axis]) for axis, title in enumerate(titles))

    def caption(self, values: Mapping[str, Any] | None) -> str:
        """Return `in 3 s 20.1 m ahead, 0.3 m left: REASON`."""
        if values is None:
            return "no readable answer"
        if "xy_m" not in values:
            return "unknown"
        ahead, left = values["xy_m"][_DRAWN]
        why = f": {values['reasoning']}" if "reasoning" in values else ""
        return f"in 3 s {ahead:.1f} m ahead, {abs(left):.1f} m {'left' if left > 0 else 'right'}{why}"

    def plain(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the path as lists, rounded to a millimetre, and the reason."""
        said = {"reasoning": values["reasoning"]} if "reasoning" in values else {}
        return {"xy_m": np.round(values["xy_m"], _DECIMALS).tolist(), **said}

    def truth(
        self, recording: Recording, windows: Sequence[PlannedWindow], motion: Sequence[Mapping[str, float]]
    ) -> list[dict[str, Any]]:
        """Return the paths driven, where poses reach; a reason only where one was given at a window's last instant."""
        texts = usable_texts(recording)[0] if self.says_why else {}
        known = known_waypoints(recording, windows)
        return [
            {} if path is None else _driven(path.xyz_m, texts.get(window.end_us))
            for window, path in zip(windows, known, strict=True)
        ]

    def spoken_at(self, num_frames: int) -> Sequence[int]:
        """The last instant alone: the path begins there."""
        return (num_frames - 1,)

    def strokes(
        self, recording: Recording, camera: str, values: Mapping[str, Any], seen_us: tuple[int, int]
    ) -> tuple[Stroke, ...]:
        """Return the path on the road, where the camera's place is known; the truth is wide, and beneath."""
        stream = recording.cameras.get(camera)  # a mosaic has none of them
        if stream is None or stream.calibration is None or "xy_m" not in values:
            return ()
        calibration = stream.calibration
        xyz_m = values.get("xyz_m", np.column_stack([values["xy_m"], np.zeros(NUM_FUTURE)]))
        colour, width_px = (_TRUE, _BENEATH_PX) if "xyz_m" in values else (_PREDICTED, 3)
        size_px = (calibration.model.width_px, calibration.model.height_px)
        runs = path_runs(calibration, recording.ego, xyz_m, *seen_us)
        return tuple(Stroke(pixels, size_px, colour, width_px) for pixels in runs)


def _truths(rows: Sequence[Row]) -> Float64Array:
    return np.array([np.asarray(row["future_xyz_m"], np.float64).reshape(-1, 3)[:, :2] for row in rows])


def _of_count(title: str, count: int) -> str:
    """Return `ADE_6 3 s` of `ADE 3 s`."""
    name, _, horizon = title.partition(" ")
    return f"{name}_{count} {horizon}"


def _median_path(medians: Medians) -> Float64Array:
    return np.reshape(medians["xy_m"], (NUM_FUTURE, 2))


def _words_off(values: Mapping[str, Any], row: Row) -> float:
    """Return NaN for what gives no reason at all, such as a baseline."""
    return words_off(values["reasoning"], row["reasoning"]) if "reasoning" in values else float("nan")


def _yaw_rate(row: Row) -> float:
    return float(-row["history_yaw_rad"][-1 - _TURN_STEPS]) / (_TURN_STEPS * scores.STEP_S)


def _driven(xyz_m: Float64Array, why: str | None) -> dict[str, Any]:
    """Return the future in the form of a prediction, and how high it is."""
    future, said = xyz_m[NUM_HISTORY:], {} if why is None else {"reasoning": why}
    return {"xy_m": future[:, :2], "xyz_m": future, **said}
