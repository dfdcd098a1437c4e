"""HTML that cannot be unbalanced or unescaped, and numbers as the report writes them."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template


class Html(str):
    """Text that is HTML already; all other text is escaped where it enters."""


def tag(name: str, *children: object, **attributes: str) -> Html:
    """An element; attribute names may end in `_` where Python reserves the word."""
    words = [f'{key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items()]
    start = " ".join([name, *words])
    return Html(f"<{start}>" if name == "img" else f"<{start}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """Children one after the other; those that are not HTML are escaped."""
    return Html(
        "".join(c if isinstance(c, Html) else html.escape(str(c), quote=False) for c in children)
    )


def table(head: Sequence[object], rows: Iterable[Sequence[object]], class_: str) -> Html:
    """A table whose rows begin with their heading; wide ones scroll."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in cells))
        for first, *cells in rows
    ]
    inside = tag("table", tag("thead", top), tag("tbody", *body), class_=class_)
    return tag("div", inside, class_="scroll")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(markdown_text, line))} |" for line in lines)


def markdown_text(text: str) -> str:
    """Text inside Markdown: one line, in which nothing is HTML, a link, or the end of a cell."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return line.replace("](", "]\\(").replace("|", "\\|")


def figure(png: bytes, caption: str) -> Html:
    """A picture inside the page, with its caption."""
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return tag("figure", tag("img", src=source, alt=caption), tag("figcaption", caption))


def document(title: str, headline: Html, sections: Mapping[str, tuple[str, Html]]) -> str:
    """A whole page that needs nothing else; each section has an id, a heading and its content."""
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    parts = [
        tag("section", tag("h2", heading), content, id=name)
        for name, (heading, content) in sections.items()
    ]
    return Template(template).substitute(
        title=html.escape(title), headline=headline, sections=join(parts)
    )


def number(value: float) -> str:
    """Four digits, so that the numbers of a column line up."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def metric_label(task_name: str, metric: str) -> str:
    """How tables name a metric of a task."""
    return f"{task_name}: {metric.replace('_', ' ')}"
