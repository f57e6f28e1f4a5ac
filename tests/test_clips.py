"""What a user may call a recording of a route."""

import pytest

from omni_cli.errors import UsageError
from omni_cli.stages import clips
from omni_cli.stages.clips import find_clips
from tests.support.driving import tiny_student, write_routes
from tests.support.openpilot import DONGLE


def test_a_route_may_be_called_as_openpilot_does_or_by_its_log(tmp_path):
    ids, preprocess = write_routes(tmp_path, 4), tiny_student(cameras="qcamera").preprocess()

    def found(word: str) -> list[str]:
        return [clip.name for clip in find_clips(preprocess, (word,), {}, tmp_path, tiled=False)]

    log = ids[1].removeprefix(f"{DONGLE}_")
    for word in (ids[1], f"{DONGLE}|{log}", f"{DONGLE}/{log}", log):
        assert found(word) == [ids[1]]
    for word in (DONGLE, "0"):
        with pytest.raises(UsageError, match=rf"no recording of that id .*, or an id: {ids[0]}, {ids[1]}$"):
            found(word)
    with pytest.raises(UsageError, match=rf"no recording of that id .*; did you mean '{ids[1]}'\?$"):
        found(log[1:])


def test_of_very_many_ids_a_word_is_compared_with_those_alone_that_begin_or_end_as_it_does(monkeypatch):
    monkeypatch.setattr(clips, "_COMPARED", 3)
    ids = ["2b7e-0001", "2b7e-0002", "91c4-0001", "91c4-0003"]
    assert clips._comparable("2b7f-0001", ids[:3]) == ids[:3]
    assert clips._comparable("91c5-0003", ids) == ["91c4-0003"]
    assert clips._remedy("91c5-0003", ids) == "did you mean '91c4-0003'?"
    assert clips._remedy("2b77-0077", ids).startswith("give a file that is there, or an id: 2b7e-0001, ")
