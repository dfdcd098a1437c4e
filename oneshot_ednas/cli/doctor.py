"""The command that looks at the machine."""

import json
import sys
from collections import Counter
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from oneshot_ednas.cli.common import bad_input, console, json_option, main
from oneshot_ednas.doctor import diagnose
from oneshot_ednas.doctor.finding import State

STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}


@main.command()
@json_option
@bad_input
def doctor(as_json: bool) -> None:
    """What this machine has for a run: Python, torch, devices, interpreters, compilers, room.

    Nothing is installed or changed. What is not right comes with its cure; the exit status is 1 if
    something keeps the package from working here, and 0 if there are notes only.

    Example: oneshot-ednas doctor --json
    """
    findings = diagnose()
    counts = Counter(finding.state for finding in findings)
    if as_json:
        found = [asdict(one) for one in findings]
        print(json.dumps({"findings": found, "counts": {name: counts[name] for name in STYLES}}))
    else:
        table = Table(show_edge=False)
        for column in ("", "what", "found", "cure"):
            table.add_column(column, overflow="fold")
        for one in findings:
            state = Text(one.state, style=STYLES[one.state])
            table.add_row(state, one.name, one.found, one.cure or "")
        console().print(table)
        print(f"{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok")
    if counts["problem"]:
        sys.exit(1)
