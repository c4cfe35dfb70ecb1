"""A small HTML table for notebooks: `_repr_html_` of runs, comparisons and diagnoses."""

from collections.abc import Iterable, Sequence
from html import escape

_TABLE_STYLE = "border-collapse:collapse;margin:0.3em 0"
_CELL_STYLE = "text-align:left;vertical-align:top;padding:0.15em 0.9em 0.15em 0"


def html_table(
    title: str,
    rows: Iterable[Sequence[str]],
    *,
    header: Sequence[str] = (),
    notes: Iterable[str] = (),
) -> str:
    """Return a self-contained HTML table: no script, no link, every text escaped.

    title:  the caption above the table.
    rows:   the cells of each row; the first cell is the row's name. A line break stays one.
    header: the names of the columns; empty for a table of names and values.
    notes:  sentences below the table, one paragraph each.
    """
    head = f"<thead><tr>{_cells('th', header, 'col')}</tr></thead>" if header else ""
    body = "".join(
        f"<tr>{_cells('th', row[:1], 'row')}{_cells('td', row[1:])}</tr>" for row in rows
    )
    return (
        f'<table style="{_TABLE_STYLE}"><caption style="text-align:left"><strong>{_html(title)}'
        f"</strong></caption>{head}<tbody>{body}</tbody></table>"
        + "".join(f"<p>{_html(note)}</p>" for note in notes)
    )


def _cells(tag: str, texts: Sequence[str], scope: str = "") -> str:
    attribute = f' scope="{scope}"' if scope else ""
    return "".join(f'<{tag}{attribute} style="{_CELL_STYLE}">{_html(t)}</{tag}>' for t in texts)


def _html(text: str) -> str:
    return escape(text).replace("\n", "<br>")
