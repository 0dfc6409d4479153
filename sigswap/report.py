"""What a conversion did, or would do: one record per attention, with the reason for each that was left."""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigswap import files
from sigswap.errors import ArgumentError
from sigswap.page import document, fragment

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class SiteRecord:
    """One softmax. ``status``: "swapped", "swappable" (in a dry run) or "left" (with its ``reason``).

    ``kind``: "sdpa", "softmax" or "multi_head_attention"; ``heads`` and ``head_dim`` as far as they are known;
    ``mask``: "none", "causal", "boolean", "additive" or a sum of these, as the example inputs showed it.
    """

    path: str
    kind: str
    heads: int | None
    head_dim: int | None
    mask: str
    status: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The sites of a model in the order in which they run, and notes on the run that found them."""

    sites: list[SiteRecord]
    notes: list[str] = dataclasses.field(default_factory=list)

    def count(self, status: str) -> int:
        """How many sites have this status."""
        return sum(site.status == status for site in self.sites)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .html page, in one file, whose table sorts: repeated layers folded, then each by itself.

        Raises ArgumentError for another suffix or a directory that is not there.
        """
        each = self._table("each softmax", [(site.path, site) for site in self.sites])
        write_page(path, "sigswap: softmax and sigmoid attention", [self, each])

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        return cls([SiteRecord(**site) for site in data["sites"]], list(data["notes"]))

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return fragment(self)

    def __rich__(self) -> Table:
        """A table in which repeated layers share a line (``layers.{0..11}.attn``)."""
        counts = ", ".join(f"{self.count(s)} {s}" for s in ("swapped", "swappable", "left") if self.count(s))
        table = self._table(f"softmax sites: {counts or 'none'}", folded(self.sites))
        table.caption = "\n".join(self.notes) or None
        table.caption_justify = "left"
        return table

    @staticmethod
    def _table(title: str, rows: Sequence[tuple[str, SiteRecord]]) -> Table:
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for column in ("path", "kind", "heads", "head_dim", "mask", "status", "reason"):
            table.add_column(column, overflow="fold", justify="right" if column.startswith("head") else "left")
        for path, site in rows:
            numbers = ("" if value is None else str(value) for value in (site.heads, site.head_dim))
            table.add_row(path or "(the model)", site.kind, *numbers, site.mask, site.status, site.reason)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=140).print(self)
        return stream.getvalue()


def write_page(path: str | os.PathLike[str], title: str, parts: Sequence[Any]) -> None:
    """Writes what :func:`sigswap.page.document` makes of ``parts``. Raises ArgumentError as :meth:`Report.save`."""
    path = path_of(path)
    check_page(path)
    files.write_text(path, document(title, parts))


def path_of(path: str | os.PathLike[str]) -> Path:
    """``path`` as a Path. Raises ArgumentError if it is none."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"{{argument}} must be the path of a file, not a {type(path).__name__}.", argument="path")
    return Path(path)


def check_page(path: Path) -> None:
    """Raises ArgumentError unless a page can be written to ``path``, which is better known before there is one."""
    if path.suffix.lower() != ".html":
        raise ArgumentError(f"{path}: the suffix must be .html.", argument="path")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"{path} cannot be written: there is no directory {path.parent}.", argument="path")


def folded(sites: Sequence[Any]) -> list[tuple[str, Any]]:
    """Records with a ``path`` that differ by one number in it only, with those numbers written as a range."""
    groups: dict[Any, list[tuple[str, SiteRecord]]] = {}
    for site in sites:
        numbers = re.split(r"(?<![^.])(\d+)(?![^.])", site.path)
        key = (tuple(numbers[::2]), dataclasses.replace(site, path=""))
        groups.setdefault(key, []).append((site.path, site))
    lines = []
    for (_, _), members in groups.items():
        columns = list(zip(*(re.split(r"(?<![^.])(\d+)(?![^.])", path)[1::2] for path, _ in members), strict=True))
        parts = re.split(r"(?<![^.])(\d+)(?![^.])", members[0][0])
        for index, column in enumerate(columns):
            values = sorted({int(value) for value in column})
            if len(values) > 1:
                whole = values == list(range(values[0], values[-1] + 1))
                inner = f"{values[0]}..{values[-1]}" if whole else ",".join(map(str, values))
                parts[2 * index + 1] = "{" + inner + "}"
        times = f" ({len(members)}x)" if len(members) > 1 else ""
        lines.append(("".join(parts) + times, members[0][1]))
    return lines
