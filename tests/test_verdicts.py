"""What `omni eval` says in words: a table that shows a blind model must not be overlooked."""

import pytest

from omni_cli.recipe import Metric
from omni_cli.stages.evaluate import is_silent, table_of, verdicts

METRIC = Metric("ade_2s", "ADE 2 s", "m")


def report(**values: float | None) -> dict:
    rows = [
        {"name": name.replace("_", " "), "ade_2s": value, "ade_2s_interval": (0.0, 1.0), "unreadable": 0.0}
        for name, value in values.items()
    ]
    return {"conditions": rows, "reference": "constant velocity", "recordings": 8}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": 0.8, "pictures_swapped": 3.2, "constant_velocity": 2.0}, []),
        ({"model": 0.8, "constant_velocity": 2.0}, []),  # one stretch of one drive: no control
        ({"model": None, "pictures_swapped": None, "constant_velocity": 2.0}, []),
        (
            {"model": 8.53, "pictures_swapped": 8.53, "constant_velocity": 0.15},
            [
                "the answers hardly depend on the pictures: ADE 2 s is 8.53 m with the right pictures, 8.53 with those",
                "no better than constant velocity, which sees nothing: 8.53 and 0.15",
            ],
        ),
        ({"model": 1.0, "pictures_swapped": 1.04, "constant_velocity": 2.0}, ["the answers hardly depend on"]),
        ({"model": 1.0, "pictures_swapped": 0.5, "constant_velocity": 2.0}, ["the answers hardly depend on"]),
        ({"model": 2.0, "pictures_swapped": 4.0, "constant_velocity": 2.0}, ["no better than constant velocity"]),
        (
            {"model": 1.0, "pictures_swapped": 3.0, "cameras_shuffled": 1.02, "time_shuffled": 0.9},
            [
                "the order of the frames hardly matters to it, which a model of motion would need: ADE 2 s is 1.00 m",
                "which camera sees what hardly matters to it: ADE 2 s is 1.00 m, and 1.02 with cameras shuffled",
            ],
        ),
        ({"model": 1.0, "pictures_swapped": 3.0, "cameras_shuffled": 1.2, "time_shuffled": 1.2}, []),
        (  # of pictures that hardly matter, neither does their order
            {"model": 1.0, "pictures_swapped": 1.0, "cameras_shuffled": 1.0, "time_shuffled": 1.0},
            ["the answers hardly depend on the pictures"],
        ),
    ],
)
def test_a_model_that_needs_no_pictures_is_told(values, said):
    found = verdicts(report(**values), METRIC)
    assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said


@pytest.mark.parametrize(
    ("recordings", "whose"), [(1, "another stretch of the same drive"), (2, "another drive"), (8, "another drive")]
)
def test_whose_pictures_were_shown_is_said(recordings, whose):
    """Of one recording they are swapped between stretches of it: see `conditions`."""
    found = verdicts({**report(model=8.0, pictures_swapped=8.1), "recordings": recordings}, METRIC)
    assert found == [
        "the answers hardly depend on the pictures: ADE 2 s is 8.00 m with the right pictures, 8.10 with those of "
        + whose
    ]


def test_without_intervals_it_says_why():
    one = report(model=0.8, pictures_swapped=3.2, constant_velocity=2.0)
    one["conditions"][0]["ade_2s_interval"], one["recordings"] = None, 1
    assert verdicts(one, METRIC) == ["no intervals: they need several recordings, this is 1"]
    one["recordings"] = 50
    assert verdicts(one, METRIC) == ["no intervals: they need several recordings, of 50 one alone counts in it"]
    one["conditions"][0]["ade_2s"] = None  # it counts in none: nothing is to be said of how sure it is
    assert verdicts(one, METRIC) == []


def test_a_model_that_said_nothing_is_told_first_and_is_not_judged():
    one = report(model=2.0, pictures_swapped=2.0, constant_velocity=2.0)
    for row in one["conditions"]:
        row["ade_2s_of_reference"] = 1.0
    for row in one["conditions"][:2]:
        row["unreadable"] = 1.0
    assert is_silent(one)
    assert verdicts(one, METRIC) == []
    _, rows = table_of(one, [METRIC])
    assert rows[0] == ["model", "no answer", "n/a", "n/a", "100.0%"]
    assert rows[2] == ["constant velocity", "2.00", "0.00 .. 1.00", "1.00", "0.0%"]
    one["conditions"][0]["unreadable"] = 0.99
    assert not is_silent(one)
    assert verdicts(one, METRIC)
