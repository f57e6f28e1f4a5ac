"""Why the synthetic driver does what follows, in words that are true by construction.

On a winding road the car slows for bends and for nothing else, so bends are the reason of its speed. On a gentle road
speed follows no reason that can be seen; only the steering has one.
"""

from typing import Any

import numpy as np

from omni_cli.scene.clock import Float64Array
from omni_cli.world.clip import SyntheticSpec, build_drive
from omni_cli.world.motion import Drive

_RATE_HZ = 10  # of event_start_frame
_AHEAD_S = 3.0  # what an event speaks of
_FIRST_S, _LEFT_S = 1.6, 6.5  # of a clip before and after an event that a model may learn from
_NEAR_END_S = 1.0
_BEND_RAD, _CHANGE_MPS, _STILL_MPS = 0.1, 1.0, 0.3
_CYCLE, _NULL, _NEAR_END = 8, 5, 0  # of eight clips one has no events and one has one that comes too late


def reasoning_events(spec: SyntheticSpec, chunk: int, index: int) -> list[dict[str, Any]] | None:
    """Return the events of a clip, as the dataset's table writes them; None: a null row."""
    number = (chunk * spec.clips_per_chunk + index) % _CYCLE
    if number == _NULL:
        return None
    drive = build_drive(spec, chunk, index)
    frames = [_eventful_frame(drive)]
    if number == _NEAR_END:
        frames.append(max(round((drive.seconds - _NEAR_END_S) * _RATE_HZ), 0))
    return [_event(spec, drive, frame) for frame in dict.fromkeys(frames)]


def _event(spec: SyntheticSpec, drive: Drive, frame: int) -> dict[str, Any]:
    at_us = frame * 1_000_000 // _RATE_HZ
    text = _winding(drive, at_us / 1e6) if spec.roads == "winding" else _gentle(drive, at_us / 1e6)
    return {"event_start_frame": frame, "event_start_timestamp": at_us, "coc": text}


def _eventful_frame(drive: Drive) -> int:
    """Return the frame from which on speed and heading change most; of a short clip the middle one."""
    frames = np.arange(np.ceil(_FIRST_S * _RATE_HZ), np.floor((drive.seconds - _LEFT_S) * _RATE_HZ) + 1)
    if not frames.size:
        return round(drive.seconds * _RATE_HZ / 2)
    at_s = frames / _RATE_HZ
    speed, yaw = (_change(drive, values, at_s) for values in (drive.speed_mps, drive.yaw_rad))
    return int(frames[np.argmax(np.abs(speed) + 10 * np.abs(yaw))])


def _winding(drive: Drive, at_s: float) -> str:
    speed, change, turn = _state(drive, at_s)
    side, later = _side(_bend_ahead(drive, at_s)), f"{speed + change:.0f} m/s"
    if change < -_CHANGE_MPS:
        return f"Slow down to {later} because the road bends to the {side} ahead."
    if change > _CHANGE_MPS:
        return f"Speed up to {later} because the road becomes straighter ahead."
    if abs(turn) > _BEND_RAD:
        return f"Keep about {later} and steer {_side(turn)} because the road bends to the {_side(turn)}."
    return f"Keep about {later} because the road ahead hardly bends."


def _gentle(drive: Drive, at_s: float) -> str:
    speed, change, turn = _state(drive, at_s)
    if max(speed, speed + change) < _STILL_MPS:
        return "Stand still."
    way = f"Steer {_side(turn)} because the road bends to the {_side(turn)}"
    if abs(turn) <= _BEND_RAD:
        way = "Go straight on because the road hardly bends"
    if abs(change) <= _CHANGE_MPS:
        return f"{way}, at about {speed + change:.0f} m/s."
    return f"{way}, and {'speed up' if change > 0 else 'slow down'} to {speed + change:.0f} m/s."


def _state(drive: Drive, at_s: float) -> tuple[float, float, float]:
    """Return the speed, and by how much speed and heading will change."""
    at = np.array([at_s])
    speed, turn = (float(_change(drive, values, at)[0]) for values in (drive.speed_mps, drive.yaw_rad))
    return float(_at(drive, drive.speed_mps, at)[0]), speed, turn


def _bend_ahead(drive: Drive, at_s: float) -> float:
    """Return the strongest curvature within `_AHEAD_S` and a second."""
    ahead = (drive.time_us >= at_s * 1e6) & (drive.time_us <= (at_s + _AHEAD_S + 1) * 1e6)
    bends = drive.curvature_per_m[ahead]
    return float(bends[np.argmax(np.abs(bends))])


def _change(drive: Drive, values: Float64Array, at_s: Float64Array) -> Float64Array:
    return _at(drive, values, at_s + _AHEAD_S) - _at(drive, values, at_s)


def _at(drive: Drive, values: Float64Array, at_s: Float64Array) -> Float64Array:
    return np.interp(at_s * 1e6, drive.time_us, values)


def _side(left_positive: float) -> str:
    return "left" if left_positive > 0 else "right"
