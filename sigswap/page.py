"""Reports as HTML: a page in one file, with tables that sort, and what notebooks show."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from typing import Any

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: 1rem 0 }
caption { caption-side: top; text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible { outline: 2px solid #36c }
th[aria-sort=ascending] button::after { content: " \\25b2" }
th[aria-sort=descending] button::after { content: " \\25bc" }
img { max-width: 100% }
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent.trim();
      const number = (value) => (/^[-+]?[0-9.]/.test(value) ? parseFloat(value) : NaN);
      const order = (a, b) => {
        if (a === "" || b === "") return a === b ? 0 : a === "" ? (up ? 1 : -1) : up ? -1 : 1;  // unknown is last
        const x = number(a), y = number(b);
        return isNaN(x) || isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
      };
      const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * order(text(a), text(b)));
      body.append(...rows);
    });
  });
}
"""


def document(title: str, parts: Iterable[Any], picture: tuple[str, str] | None = None) -> str:
    """A page that needs no other file, whose tables sort by a click on a heading.

    ``parts``: as for :func:`fragment`. ``picture``: what it shows, and a PNG in base64.
    """
    title, drawn = html.escape(title), ""
    if picture is not None:
        drawn = f'<img alt="{html.escape(picture[0])}" src="data:image/png;base64,{picture[1]}">'
    body = "\n".join(fragment(part) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style>'
        f"</head>\n<body><h1>{title}</h1>\n{drawn}\n{body}\n<script>{_SCRIPT}</script></body></html>\n"
    )


def fragment(item: Any) -> str:
    """What rich prints of ``item`` (a table, a string, or something that is made of these), as HTML."""
    return "\n".join(_html(part) for part in _parts(item))


def _parts(item: Any) -> Iterator[Any]:
    if isinstance(item, str) or hasattr(item, "columns"):
        yield item
    elif hasattr(item, "__rich__"):
        yield from _parts(item.__rich__())
    else:
        for part in item.__rich_console__(None, None):
            yield from _parts(part)


def _html(part: Any) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    heads = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in part.columns)
    kinds = [' class="number"' if column.justify == "right" else "" for column in part.columns]
    rows = ""
    for cells in zip(*(column.cells for column in part.columns), strict=True):
        each = "".join(f"<td{kind}>{html.escape(str(cell))}</td>" for kind, cell in zip(kinds, cells, strict=True))
        rows += f"<tr>{each}</tr>\n"
    title = f"<caption>{html.escape(str(part.title))}</caption>" if part.title else ""
    notes = "".join(f"<p>{html.escape(line)}</p>" for line in str(part.caption or "").splitlines())
    return f"<table>{title}<thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table>{notes}"
