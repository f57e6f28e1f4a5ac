"""Reports of an evaluation as one HTML page each that needs no other file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.recipe import Metric
from omni_cli.stages import pages
from omni_cli.stages.evaluate.tables import notes_of, strata_table, table_of, title_of, verdicts


@dataclass(frozen=True)
class Table:
    """A table of a page."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Page:
    """What a page holds, from its top to its end."""

    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    drawn: Sequence[Path]
    numbers: Mapping[str, Any]


def write_report_page(path: Path, report: Mapping[str, Any], metrics: Sequence[Metric], drawn: Sequence[Path]) -> None:
    """Write the page of one model's report: its notes and verdicts, every metric, every stratum, its pictures."""
    shown = [metric for metric in metrics if metric.is_shown]
    tables = [Table(metric.title, *table_of(report, [metric])) for metric in metrics]
    if report["strata"]:
        tables += [Table(f"{metric.title}, by kind of driving", *strata_table(report, [metric])) for metric in shown]
    notes = [*notes_of(report), *verdicts(report, shown[0])]
    write_page(path, Page(title_of(report), notes, tables, drawn, report))


def write_page(path: Path, page: Page) -> None:
    """Write a page."""
    blocks = [pages.paragraph(note, is_strong=True) for note in page.notes]
    for table in page.tables:
        blocks += [pages.heading(table.title), pages.table(table.header, table.rows)]
    blocks += [pages.picture(one.stem, one.read_bytes()) for one in page.drawn]
    blocks.append(pages.folded("numbers", json.dumps(page.numbers, indent=2, sort_keys=True)))
    files.write_text(path, pages.page(page.title, blocks))
