"""What a user may call a recording of a route."""

import pytest

from omni_cli.errors import UsageError
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
