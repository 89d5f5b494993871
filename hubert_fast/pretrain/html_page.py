"""A self-contained HTML page from a few elements. All text is escaped here, so that no file name can become markup."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
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


def folded(summary: str, *content: str) -> Markup:
    """Content that a click unfolds."""
    return element("details", element("summary", summary), *content)


def png(path: Path, description: str) -> Markup:
    """The picture itself as part of the page, so that the page can be mailed."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}">'
    return element("figure", Markup(image), element("figcaption", description))


def page(title: str, *content: str) -> str:
    return _PAGE.substitute(title=html.escape(title), content=join(content), style=_STYLE)


def _markup(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(str(text))


_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$content
</main>
</body>
</html>
"""
)

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f8; color: #1d2329; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
section { margin-top: 1.25rem; padding: 1.25rem 1.5rem; }
section { background: #fff; border: 1px solid #dde1e5; border-radius: 8px; }
p { margin: .5rem 0; max-width: 48rem; }
.subtitle, figcaption, .note { color: #58626b; font-size: .92rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: 1.25rem; }
.card { background: #fff; border: 1px solid #dde1e5; border-radius: 8px; padding: .75rem 1rem; flex: 1 1 9rem; }
.card b { display: block; font-size: 1.4rem; line-height: 1.3; }
.card span { color: #58626b; font-size: .88rem; }
.warning { margin: 1.25rem 0 0; padding: .5rem .9rem; background: #fdf3ec; border-left: 4px solid #d55e00; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e8ebee; }
th, td { text-align: right; vertical-align: top; font-weight: normal; }
thead th { color: #58626b; font-size: .88rem; vertical-align: bottom; border-bottom: 1px solid #b9c0c7; }
tr th:first-child { text-align: left; }
.facts th { color: #58626b; white-space: nowrap; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.strong th, .strong td { font-weight: 600; }
figure { margin: 1rem 0 0; }
img { max-width: 100%; height: auto; }
pre { padding: .75rem 1rem; overflow-x: auto; background: #f2f4f6; border-radius: 6px; }
pre { font-size: .85rem; line-height: 1.45; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .9em; }
dt { font-weight: 600; margin-top: .75rem; }
dd { margin: .1rem 0 0; max-width: 48rem; }
details { margin-top: .75rem; }
summary { cursor: pointer; color: #0b5a94; }
@media print {
  body { background: #fff; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section, .card { border: none; padding: 0; }
  section, figure, tr { break-inside: avoid; }
}
"""
