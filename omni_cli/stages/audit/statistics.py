"""What the facts of many recordings add up to: plain numbers for JSON, from which the report is drawn too."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from omni_cli.scene.clock import seconds
from omni_cli.stages.checks.facts import (
    CURVATURE_EDGES_PER_M,
    SKEW_EDGES_MS,
    SPEED_EDGES_MPS,
    CameraFacts,
    Counts,
    MotionFacts,
    RecordingFacts,
)
from omni_cli.stages.checks.seen_motion import MIN_CORRELATION

_MICROSECONDS_PER_MS = 1000


def statistics(facts: Sequence[RecordingFacts]) -> dict[str, Any]:
    """Add up recordings.

    Returns:
        `recordings` measured, `cameras` (name -> counts, rate, jitter, phase, what decoding
        showed, and how its pictures turn with the log), `skew_ms`,
        `speed_mps` and `curvature_per_m` as histograms (`edges`, one more than `counts`; every 0.1 s counts once), of
        `motion` the kilometres and where an instant has 1.6 s of motion behind and 6.4 s ahead, and `rigs`.
    """
    names = sorted({camera for one in facts for camera in one.cameras})
    motions = [one.motion for one in facts if one.motion is not None]
    return {
        "recordings": len(facts),
        "cameras": {name: _camera([one.cameras[name] for one in facts if name in one.cameras]) for name in names},
        "skew_ms": {
            **_histogram((one.skew_counts for one in facts), SKEW_EDGES_MS),
            "max": max((one.max_skew_us for one in facts), default=0) / _MICROSECONDS_PER_MS,
        },
        "speed_mps": _histogram((one.speed_counts for one in motions), SPEED_EDGES_MPS),
        "curvature_per_m": _histogram((one.curvature_counts for one in motions), CURVATURE_EDGES_PER_M),
        "motion": _motion(motions),
        "rigs": dict(sorted(Counter(one.rig for one in facts if one.rig).items())),
    }


def rig_line(rigs: dict[str, int]) -> str:
    """Return what to know about the rigs of a folder; nothing where no calibration tells them."""
    told = ", ".join(f"{count} of rig {name}" for name, count in rigs.items())
    is_mixed = len(rigs) > 1
    return f"{told}{'; do not crop or project around the middle of a picture' if is_mixed else ''}" if rigs else ""


def _camera(found: Sequence[CameraFacts]) -> dict[str, Any]:
    pictures = [one.pictures for one in found if one.pictures is not None]
    phases, periods = np.array([one.phase_us for one in found]), np.array([one.period_us for one in found])
    told: dict[str, Any] = {
        "recordings": len(found),
        "frames": sum(one.num_frames for one in found),
        "rate_hz": round(1e6 / float(np.median(periods)), 3),
        "jitter_ms": {"median": _ms(np.median([one.jitter_us for one in found])),
                      "max": _ms(max(one.jitter_us for one in found))},
        "phase_ms": {"min": _ms(phases.min()), "median": _ms(np.median(phases)), "max": _ms(phases.max())},
    }  # fmt: skip
    sums = {name: sum(getattr(one, f"num_{name}") for one in pictures) for name in ("decoded", "black", "frozen")}
    return told | (sums if pictures else {}) | _seen_turns(found)


def _seen_turns(found: Sequence[CameraFacts]) -> dict[str, Any]:
    """Tell how a camera's pictures turn with the log, of the recordings where that was measured."""
    seen = [one.seen_turn for one in found if one.seen_turn is not None]
    if not seen:
        return {}
    likeness = [one.correlation for one in seen]
    told = {
        "recordings": len(seen),
        "correlation": {"min": round(min(likeness), 3), "median": round(float(np.median(likeness)), 3)},
        "logged_radps": round(float(np.median([one.logged_radps for one in seen])), 4),
        "seen_radps": round(float(np.median([one.seen_radps for one in seen])), 4),
    }
    return {"seen_turn": told | _lags([one.lag_us for one in seen if one.correlation >= MIN_CORRELATION])}


def _lags(lags_us: Sequence[int]) -> dict[str, Any]:
    """Tell by how much pictures turn after the log, of the recordings that turn enough to tell it."""
    if not lags_us:
        return {}
    spread = {"min": _ms(min(lags_us)), "median": _ms(np.median(lags_us)), "max": _ms(max(lags_us))}
    return {"lag_ms": {"recordings": len(lags_us)} | spread}


def _motion(motions: Sequence[MotionFacts]) -> dict[str, Any]:
    usable = [one.t0_us for one in motions if one.t0_us is not None]
    return {
        "recordings": len(motions),
        "kilometres": round(sum(one.distance_m for one in motions) / 1000, 3),
        "max_speed_mps": round(max((one.max_speed_mps for one in motions), default=0.0), 3),
        "past_video_s": round(max((one.past_video_s for one in motions), default=0.0), 3),
        "with_horizon": len(usable),
        "horizon_s": round(sum(seconds(last - first) for first, last in usable), 3),
    }


def _histogram(counts: Iterable[Counts], edges: np.ndarray) -> dict[str, Any]:
    total = np.zeros(len(edges) - 1, dtype=np.int64)
    for one in counts:
        total += np.array(one, dtype=np.int64) if one else 0
    return {"edges": edges.tolist(), "counts": total.tolist()}


def _ms(duration_us: float) -> float:
    return round(float(duration_us) / _MICROSECONDS_PER_MS, 3)
