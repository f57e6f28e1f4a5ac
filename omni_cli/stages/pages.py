"""Pages for people that need no other file; every word that comes from data is escaped here."""

import base64
import html
from collections.abc import Sequence

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222}
h1{font-size:1.6rem;margin-bottom:.3rem}h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:13.5px}td,th{text-align:right;padding:.28rem .9rem;vertical-align:top;
border-bottom:1px solid #eee;overflow-wrap:anywhere}th{color:#666;font-weight:600}
td:first-child,th:first-child{text-align:left}table.facts td{text-align:left}table.facts td:first-child{color:#666;
white-space:nowrap}img{max-width:100%}pre{font-size:12.5px}
"""


def page(title: str, blocks: Sequence[str]) -> str:
    """Return a whole page.

    Args:
        title: also its heading.
        blocks: what the other functions here return.
    """
    name = html.escape(title)
    head = f'<meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{name}</h1>{"".join(blocks)}</body></html>\n'


def heading(text: str) -> str:
    """Return the heading of what follows."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, *, is_strong: bool = False) -> str:
    """Return a paragraph, nothing for an empty one."""
    said = f"<b>{html.escape(text)}</b>" if is_strong else html.escape(text)
    return f"<p>{said}</p>" if text else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of numbers, with words in its first column."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    return f"<table><tr>{head}</tr>{_rows(rows)}</table>"


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of what is said of what."""
    return f'<table class="facts">{_rows(rows)}</table>'


def listed(lines: Sequence[str]) -> str:
    """Return a list."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def picture(name: str, png: bytes) -> str:
    """Return a picture that lies in the page itself."""
    content = base64.b64encode(png).decode()
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{content}"></p>'


def folded(summary: str, text: str) -> str:
    """Return a text that opens on a click."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
