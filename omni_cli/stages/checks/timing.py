"""Checks of time: does it increase, has it holes, do the cameras look at the same span. Pure functions."""

from collections.abc import Iterator, Mapping

import numpy as np

from omni_cli.scene.clock import Int64Array, seconds, typical_period_us
from omni_cli.stages.checks.findings import Finding, refuse, warn

GAP_PERIODS = 2.5  # an interval longer than this many typical ones is a gap
MAX_GAP_US = 1_000_000  # a longer one leaves no window around it worth keeping
MAX_SPREAD_US = 500_000  # between the starts, or the ends, of a recording's cameras
MIN_COVERED_SHARE = 0.5  # of the cameras' span, by the ego motion
PLAUSIBLE_PERIOD_US = (1_000, 2_000_000)  # of a camera or a log; others are of another unit
MAX_JITTER_SHARE = 0.35  # of a period, by which one interval in twenty may differ from the typical one


def timestamp_findings(timestamp_us: Int64Array, what: str, *, is_joined: bool = False) -> Iterator[Finding]:
    """Check that times increase and have no holes.

    Args:
        timestamp_us: (n,) as logged.
        what: names the times in a detail: `frame times`, `egomotion times`.
        is_joined: of a recording of several parts, which a hole between two does not spoil.
    """
    if len(timestamp_us) < 2:
        yield refuse("too-short", f"{what}: {len(timestamp_us)} found, at least 2 expected")
        return
    steps = np.diff(timestamp_us)
    if len(backward := np.flatnonzero(steps <= 0)):
        row = int(backward[0]) + 1
        yield refuse(
            "non-monotonic-time",
            f"{what}: row {row} is {timestamp_us[row]} us after {timestamp_us[row - 1]} us, {len(backward)} such rows; "
            "strictly increasing expected",
        )
        return
    period_us = typical_period_us(timestamp_us)
    if not PLAUSIBLE_PERIOD_US[0] <= period_us <= PLAUSIBLE_PERIOD_US[1]:
        yield refuse("wrong-unit", f"{what}: one every {period_us} us (median), no camera or log does that; are they "
                     "microseconds?")  # fmt: skip
        return
    yield from _gap_findings(timestamp_us, steps, what, longest_us=None if is_joined else MAX_GAP_US)


def jitter_findings(timestamp_us: Int64Array, what: str) -> Iterator[Finding]:
    """Check that a camera ticks evenly.

    Args:
        timestamp_us: (n,) increasing, two or more.
        what: names the times in a detail.
    """
    period_us = typical_period_us(timestamp_us)
    jitter_us = float(np.percentile(np.abs(np.diff(timestamp_us) - period_us), 95))
    if jitter_us > MAX_JITTER_SHARE * period_us:
        yield warn("jitter", f"{what}: one interval in twenty is {jitter_us / 1000:.1f} ms off the typical "
                   f"{period_us / 1000:.1f} ms")  # fmt: skip


def spread_findings(spans_us: Mapping[str, tuple[int, int]]) -> Iterator[Finding]:
    """Check that cameras start and end together.

    Args:
        spans_us: camera -> first and last frame time.
    """
    for end, index in (("start", 0), ("end", 1)):
        times = {camera: span[index] for camera, span in spans_us.items()}
        first, last = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
        if (spread_us := times[last] - times[first]) > MAX_SPREAD_US:
            yield warn(
                "cameras-apart",
                f"{last} {end}s {seconds(spread_us):.2f} s after {first}; at most {seconds(MAX_SPREAD_US)} s expected",
            )


def coverage_findings(log_span_us: tuple[int, int], camera_span_us: tuple[int, int], what: str) -> Iterator[Finding]:
    """Check that a log of the car's motion covers the span of the cameras.

    Args:
        log_span_us: first and last time of the log.
        camera_span_us: from the first camera's first frame to the last camera's last.
        what: names the log: `egomotion`, `speed`.
    """
    start, end = max(log_span_us[0], camera_span_us[0]), min(log_span_us[1], camera_span_us[1])
    length = max(camera_span_us[1] - camera_span_us[0], 1)
    share = max(end - start, 0) / length
    if share < 1:
        make = warn if share >= MIN_COVERED_SHARE else refuse
        yield make(
            "ego-does-not-cover",
            f"{what} spans {_span(log_span_us)}, the cameras {_span(camera_span_us)}: {share:.0%} of it is covered",
        )


def _gap_findings(
    timestamp_us: Int64Array, steps: Int64Array, what: str, *, longest_us: int | None
) -> Iterator[Finding]:
    typical_us = typical_period_us(timestamp_us)
    gaps = np.flatnonzero(steps > GAP_PERIODS * typical_us)
    if len(gaps):
        widest = int(gaps[np.argmax(steps[gaps])])
        make = refuse if longest_us is not None and steps[widest] > longest_us else warn
        yield make(
            "time-gap",
            f"{what}: {len(gaps)} gaps, the widest {seconds(int(steps[widest])):.3f} s after row {widest}; "
            f"every {seconds(typical_us):.3f} s expected",
        )


def _span(span_us: tuple[int, int]) -> str:
    return f"{seconds(span_us[0]):.2f}..{seconds(span_us[1]):.2f} s"
