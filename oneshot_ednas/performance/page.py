"""The table in `docs/performance.md`, made from the JSON of a run of the benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneshot_ednas.store import write_text

BEGIN = "<!-- bench: begin -->"
END = "<!-- bench: end -->"
COLUMNS = ("name", "what", "measured", "quartiles", "bound", "holds")


def table_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of `Row.to_json` as `COLUMNS` of text."""
    unit = row["unit"]
    suffix = {"x": "x", "exponent": ""}.get(unit, f" {unit}")
    bound = "" if row["bound"] is None else f"{'>=' if row['is_least'] else '<='} {row['bound']:g}"
    holds = {None: "", True: "yes", False: "no"}[row["holds"]]
    spread = "" if row["repeats"] == 1 else f"{row['low']:.3g} to {row['high']:.3g}"
    measured = f"{row['measured']:.3g}{suffix}"
    return row["name"], row["what"], measured, spread, bound and f"{bound}{suffix}", holds


def markdown(results: Mapping[str, Any]) -> str:
    """The table of a run, with what it was made on."""
    on = results["environment"]
    lines = [
        f"`{results['command']}` on {on['date']}: {on['machine']} ({on['device']}), "
        f"torch {on['torch']}, {on['threads']} thread{'s' if on['threads'] > 1 else ''}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    lines += [f"| {' | '.join(table_cells(row))} |" for row in results["rows"]]
    return "\n".join(lines)


def with_table(text: str, results: Mapping[str, Any], *, source: str) -> str:
    """A page with the table of a run between its two markers.

    Raises:
        ValueError: unless each marker is there once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{source}: expected one line {BEGIN} and after it one line {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{after}"


def update_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the table of a run into a page.

    Raises:
        FileNotFoundError: if there is no such page.
        ValueError: if it has no place for the table.
    """
    text = path.read_text(encoding="utf-8")
    write_text(path, with_table(text, results, source=str(path)))
