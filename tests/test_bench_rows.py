"""`omni bench gpu`: rows in processes of their own, each on disk before the next, and the table made of them."""

import json

import pytest

from omni_cli.errors import OmniError, UsageError
from omni_cli.report import Console
from omni_cli.stages.bench import rows as bench_rows_module
from omni_cli.stages.bench.rows import ROWS, Row, RowsRequest, bench_gpu, bench_rows
from tests.support.pipeline import QUIET
from tests.support.small_configs import write_small_config

SMALL = ("sample.cameras=1-cam", "sample.window=4", "tune.mode=lora", "train.batch_size=2", "sample.stride=8")
UNKNOWN = Row("a typing mistake", ("train.batch=2",), is_beside_stock=True)


class Watching(Console):
    """Keeps what lay on disk whenever a row was spoken of."""

    def __init__(self, out):
        super().__init__(quiet=True)
        self.out, self.seen = out, []

    def say(self, line):
        self.seen.append((line, json.loads(self.out.read_text())["rows"] if self.out.is_file() else []))


def test_rows_are_measured_one_by_one_and_one_that_fails_costs_no_other(tmp_path):
    """The whole way of `make bench-gpu`, with a small model of random weights on a CPU."""
    model = f"model=random:{write_small_config(tmp_path / 'config', 'qwen2_5_vl')}"
    out, small = tmp_path / "out" / "rows.json", Row("small", (model,), True, repeats=1)
    console = Watching(out)
    result = bench_rows([UNKNOWN, small], RowsRequest("cpu-tiny", out, 10.0, SMALL), "this CPU", console)
    document = json.loads(out.read_text())
    failed, measured = document["rows"]
    assert "no setting" in failed["failed"] or "batch" in failed["failed"]
    begun = next(rows for line, rows in console.seen if line == "measuring small")
    assert begun == [failed]
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
    request = RowsRequest("cpu-tiny", tmp_path / "rows.json", 0.0)
    with pytest.raises(OmniError, match=r"no row could be measured, .*; the first: not begun: the 0 minutes are over"):
        bench_rows(ROWS, request, "this CPU", QUIET)
    assert len(json.loads(request.out.read_text())["rows"]) == len(ROWS)


def test_a_row_that_takes_longer_than_there_is_time_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_rows_module, "_LEAST_S", 0.0)
    request = RowsRequest("cpu-tiny", tmp_path / "rows.json", 0.3 / 60)
    with pytest.raises(OmniError, match=r"the first: stopped: the 0.005 minutes are over"):
        bench_rows([UNKNOWN], request, "this CPU", QUIET)


def test_the_rows_of_a_gpu_are_refused_without_one(tmp_path):
    with pytest.raises(UsageError, match="torch sees no GPU"):
        bench_gpu(RowsRequest("h200-bf16", tmp_path / "rows.json", 9.0), QUIET)
