"""`omni bench gpu`: rows in processes of their own, each on disk before the next, and the table made of them."""

import json

import pytest

from omni_cli.errors import OmniError, UsageError
from omni_cli.report import Console
from omni_cli.stages.bench import rows as bench_rows_module
from omni_cli.stages.bench.rows import ROWS, Row, RowsRequest, bench_gpu, bench_rows, markdown
from tests.support.pipeline import QUIET
from tests.support.small_configs import write_small_config

SMALL = ("sample.cameras=1-cam", "sample.window=4", "tune.mode=lora", "train.batch_size=2", "sample.stride=8")
UNKNOWN = Row("a typing mistake", ("train.batch=2",), is_beside_stock=True)


class Watching(Console):
    """Keeps what lay on disk whenever a row was spoken of: what is measured so far, and what was asked for."""

    def __init__(self, out):
        super().__init__(quiet=True)
        self.out, self.part, self.seen = out, part_of(out), []

    def say(self, line):
        rows = json.loads(self.part.read_text())["rows"] if self.part.is_file() else []
        self.seen.append((line, rows, self.out.read_text()))


def part_of(out):
    return out.with_name(f"{out.name}.part")


def of_failure(message):
    """What is known of a row that failed so."""
    document = json.dumps({"error": {"message": message}})
    return {"name": "it", **bench_rows_module._result(document, 1)}


def test_rows_are_measured_one_by_one_and_one_that_fails_costs_no_other(tmp_path):
    """The whole way of `make bench-gpu`, with a small model of random weights on a CPU."""
    model = f"model=random:{write_small_config(tmp_path / 'config', 'qwen2_5_vl')}"
    out, small = tmp_path / "out" / "rows.json", Row("small", (model,), True, repeats=1)
    out.parent.mkdir()
    out.write_text("those of last week")
    console = Watching(out)
    result = bench_rows([UNKNOWN, small], RowsRequest("vlm", "cpu-tiny", out, 10.0, SMALL), "this CPU", console)
    document = json.loads(out.read_text())
    failed, measured = document["rows"]
    assert "no setting" in failed["failed"] or "batch" in failed["failed"]
    begun = next(seen for line, *seen in console.seen if line == "measuring small")
    assert begun == [[failed], "those of last week"]
    assert not part_of(out).exists()
    assert (document["failed"], result["failed"]) == (1, 1)
    assert console.seen[-1][0].startswith(f"{out} holds what was measured, 1 of 2 rows failed; as a table:")
    train = measured["train"]
    assert train["on"].startswith("random:")
    assert {"step", "stock TRL: step"} <= train["lines"].keys()
    assert 0 < train["ratios"]["MFU"] < 1
    assert train["ratios"]["stock TRL: step / step"] > 0
    head, _, titles, _, *lines = result["table"].splitlines()
    assert head.startswith(f"this CPU, {document['date']}, torch ")
    assert titles.startswith("| training | samples/s |")
    assert [line.count("|") for line in lines] == [8, 8]
    assert lines[1].endswith(f"| {train['ratios']['stock TRL: step / step']:.2f}x |")


def test_no_row_is_begun_once_the_time_is_over(tmp_path):
    """And what was measured before stays."""
    request = RowsRequest("vlm", "cpu-tiny", tmp_path / "rows.json", 0.0)
    request.out.write_text("those of last week")
    over = r"no row could be measured, see .*rows\.json\.part; the first: not begun: the 0 minutes are over"
    with pytest.raises(OmniError, match=over):
        bench_rows(ROWS, request, "this CPU", QUIET)
    assert request.out.read_text() == "those of last week"
    document = json.loads(part_of(request.out).read_text())
    assert (len(document["rows"]), document["failed"]) == (len(ROWS), len(ROWS))


def test_a_failure_of_many_lines_and_bars_is_one_cell():
    rows = [of_failure("expected a | b. More\nthan | that"), of_failure("\n  one\ntwo"), of_failure("")]
    table = markdown({"device": "it", "date": "today", "machine": {"packages": {}}, "rows": rows})
    _, _, _, _, *lines = table.splitlines()
    assert [line.split(" | ")[1] for line in lines] == ["expected a / b", "one", ""]
    assert [line.count("|") for line in lines] == [8, 8, 8]


def test_a_row_that_takes_longer_than_there_is_time_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_rows_module, "_LEAST_S", 0.0)
    request = RowsRequest("vlm", "cpu-tiny", tmp_path / "rows.json", 0.3 / 60)
    with pytest.raises(OmniError, match=r"the first: stopped: the 0.005 minutes are over"):
        bench_rows([UNKNOWN], request, "this CPU", QUIET)


def test_a_compiled_row_stands_beside_the_same_that_is_not():
    """So that their rates say whether compiling pays."""
    (compiled,) = (row for row in ROWS if "train.compile=true" in row.sets)
    alike = tuple(each for each in compiled.sets if each != "train.compile=true")
    assert alike in [row.sets for row in ROWS]


def test_the_rows_of_a_gpu_are_refused_without_one(tmp_path):
    with pytest.raises(UsageError, match="torch sees no GPU"):
        bench_gpu(RowsRequest("vlm", "h200-bf16", tmp_path / "rows.json", 9.0), QUIET)
