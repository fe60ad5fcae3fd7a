"""The HTML of a report, element by element. All text that comes in is escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from dp_rmt.reporting.plots import Plot


def section(title: str, *parts: str, css: str = "") -> str:
    """A section with a heading; nothing if all its parts are empty."""
    content = "\n".join(part for part in parts if part)
    return f"<section class='{css}'><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def grid(plots: Sequence[Plot]) -> str:
    """Plots beside each other where there is room; nothing without any."""
    return f"<div class='grid'>{''.join(map(figure, plots))}</div>" if plots else ""


def figure(plot: Plot) -> str:
    """A plot in its natural size, with its caption; what is too wide for a phone scrolls."""
    source = base64.b64encode(plot.svg).decode("ascii")
    css = "light" if plot.keeps_colors else "inverts"
    return (
        f"<figure class='{css}'><div class='scroll'>"
        f"<img alt='{escape(plot.alt)}' src='data:image/svg+xml;base64,{source}'></div>"
        f"<figcaption>{inline(plot.caption)}</figcaption></figure>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, joins_equal: bool = False) -> str:
    """A table, which scrolls where it is too wide.

    Args:
      header: names of the columns.
      rows: the cells; the first of a row names it.
      joins_equal: whether a row whose cells are all equal has one wide cell.
    """
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        if joins_equal and len(rest) > 1 and len(set(rest)) == 1:
            cells = f"<td colspan='{len(rest)}'>{escape(rest[0])}</td>"
        body += f"<tr><th scope='row'>{escape(first)}</th>{cells}</tr>"
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def inline(text: str) -> str:
    """Escaped text with `code` and **bold**."""
    return _marked_up(escape(text))


def _marked_up(text: str) -> str:
    """Every element is closed inside the one that it began in, whatever marks a name has of its own."""

    def element(found: re.Match[str]) -> str:
        code, bold = found.groups()
        return f"<strong>{_marked_up(bold)}</strong>" if code is None else f"<code>{code}</code>"

    return re.sub(r"`([^`]+)`|\*\*(.+?)\*\*", element, text)


def escape(text: str) -> str:
    """Text as it stands in an element or an attribute."""
    return html.escape(text, quote=True)
