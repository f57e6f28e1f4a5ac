"""The bars of an audit's page: as many as can be told apart, and none lost."""

from itertools import pairwise

import numpy as np
import pytest

from omni_cli.stages.audit.drawing import coverage, grouped, histogram
from omni_cli.stages.checks.facts import SKEW_EDGES_MS


def test_one_value_far_away_does_not_make_bars_into_lines():
    counts = np.zeros(len(SKEW_EDGES_MS) - 1, int)
    counts[8], counts[9], counts[-1] = 600, 398, 2
    (axis,) = histogram({"edges": SKEW_EDGES_MS.tolist(), "counts": counts.tolist()}, "skew").axes
    low, high = axis.get_xlim()
    widths = np.array([bar.get_width() for bar in axis.patches[:-1]])  # the last may be what is left over
    assert (widths / (high - low)).min() > 0.03
    assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(100)
    assert axis.patches[-1].get_height() == pytest.approx(0.2)
    assert [bar.get_linewidth() > 0 for bar in axis.patches] == [bar.get_height() > 0 for bar in axis.patches]


@pytest.mark.parametrize("count", [1, 25, 26, 27, 50, 51])
def test_grouping_keeps_every_count_and_both_ends(count):
    edges, counts = np.arange(count + 1.0), np.arange(count) + 1
    wide, sums = grouped(edges, counts)
    assert len(wide) == len(sums) + 1 <= 27
    assert (wide[0], wide[-1], sums.sum()) == (edges[0], edges[-1], counts.sum())
    expected = [counts[(edges[:-1] >= low) & (edges[:-1] < high)].sum() for low, high in pairwise(wide)]
    assert sums.tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_recordings_are_counted_in_whole_numbers(count):
    state = np.ones((2, count), np.int8)
    (axis,) = coverage([str(number) for number in range(count)], ["front", "rear"], state).axes
    assert not (axis.get_xticks() % 1).any()
