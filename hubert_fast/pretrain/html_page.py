"""A self-contained HTML page from a few elements. All text is escaped here, so that no file name can become markup."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template


class Markup(str):
    """Text that is HTML already; every other string is escaped when it enters a page."""


def join(parts: Iterable[str]) -> Markup:
    return Markup("\n".join(_markup(part) for part in parts))


def element(tag: str, *content: str, **attributes: str) -> Markup:
    """``<tag>content</tag>``; an attribute named ``class_`` becomes ``class``."""
    written = "".join(f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{written}>{''.join(_markup(part) for part in content)}</{tag}>")


def section(title: str, *content: str) -> Markup:
    return element("section", element("h2", title), *content)


def facts(values: Mapping[str, str]) -> Markup:
    """A table of two columns, names and values."""
    rows = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in values.items()]
    return element("table", *rows, class_="facts")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, strong: Sequence[int] = ()) -> Markup:
    """A table whose first column names the row; the rows with an index in ``strong`` are printed bold."""
    head = element("tr", *(element("th", name, scope="col") for name in header))
    body = [
        element(
            "tr",
            element("th", cells[0], scope="row"),
            *(element("td", cell) for cell in cells[1:]),
            class_="strong" if index in strong else "plain",
        )
        for index, cells in enumerate(rows)
    ]
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="wide")


def png(path: Path, description: str) -> Markup:
    """The picture itself as part of the page, so that the page can be mailed."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}">'
    return element("figure", Markup(image), element("figcaption", description))


def page(title: str, *content: str) -> str:
    """The whole of it: report_page.html with ``content`` in its place."""
    frame = Template(files("hubert_fast.pretrain").joinpath("report_page.html").read_text(encoding="utf-8"))
    return frame.substitute(title=html.escape(title), content=join(content))


def _markup(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(str(text))
