"""Train and validation never share a drive, and every choice is a function of names and a seed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_cli.errors import DataError, UsageError
from omni_cli.samples.splits import assign_splits, check_no_leak, read_split_file, time_split

S = 1_000_000


@given(st.lists(st.text(max_size=8), max_size=40), st.floats(0.01, 0.99), st.integers(0, 9), st.randoms())
def test_the_split_depends_on_names_alone_and_has_two_sides(groups, validation, seed, random):
    splits = assign_splits(groups, validation=validation, seed=seed)
    shuffled = [*groups, *groups[:3]]
    random.shuffle(shuffled)
    assert assign_splits(shuffled, validation=validation, seed=seed) == splits
    assert splits.keys() == set(groups)
    sides = list(splits.values())
    if len(splits) >= 2:
        assert {"train", "val"} == set(sides)
        assert abs(sides.count("val") - validation * len(splits)) <= 1
    else:
        assert set(sides) <= {"train"}


def test_another_seed_holds_out_other_drives():
    groups = [f"drive-{k}" for k in range(40)]
    first, second = (assign_splits(groups, validation=0.25, seed=seed) for seed in (0, 1))
    assert first != second
    assert list(first.values()).count("val") == 10


def test_a_drive_is_cut_in_time_with_a_gap_before_validation():
    def split(start_s, end_s):
        return time_split(start_s * S, end_s * S, first_us=0, last_us=60 * S, validation=0.25, gap_s=5)

    assert split(38, 40) == "train"
    assert split(39, 41) is None
    assert split(44, 46) is None
    assert split(45, 47) == "val"


def test_a_split_file_is_csv_or_json(tmp_path):
    (tmp_path / "a.csv").write_text("recording,split\none,train\ntwo,val\n")
    (tmp_path / "a.json").write_text(json.dumps({"one": "train", "two": "val"}))
    expected = {"one": "train", "two": "val"}
    assert read_split_file(tmp_path / "a.csv") == read_split_file(tmp_path / "a.json") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "clip,part\none,train\n", "expected the CSV columns recording,split"),
        ("a.json", "[1]", "or a JSON object"),
        ("a.json", '{"one": "test"}', "recording one has split 'test'; expected train or val"),
    ],
)
def test_a_wrong_split_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_split_file(tmp_path / name)
    with pytest.raises(UsageError, match="no split file"):
        read_split_file(tmp_path / "absent.csv")


def test_a_drive_on_both_sides_is_a_leak_unless_the_split_is_by_time():
    one_drive = [("a", "drive", {"train": 3, "val": 0}), ("b", "drive", {"train": 0, "val": 2})]
    with pytest.raises(DataError, match="drive has windows in train and in val"):
        check_no_leak(one_drive, "hash")
    check_no_leak(one_drive, "time")
    check_no_leak([("a", "", {"train": 3}), ("b", "", {"val": 2})], "hash")
