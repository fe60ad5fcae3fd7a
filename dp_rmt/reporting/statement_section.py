"""The privacy statements of all arms as one text: what they share is said once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dp_rmt.reporting.markup import escape, inline, table
from dp_rmt.reporting.numbers import number
from dp_rmt.reporting.privacy_statement import PrivacyStatement, table_rows
from dp_rmt.reporting.privacy_text import sections
from dp_rmt.reporting.series import Run, labels


def statement_section(runs: Mapping[str, Run]) -> list[str]:
    """The statement of the runs, with what all of them say once, and the name of the arm before what only some say."""
    records = {label: run.privacy for label, run in zip(labels(runs), runs.values(), strict=True)}
    parts = [_joint_release(runs)]
    if without := [label for label, record in records.items() if not record]:
        names = f"{escape(', '.join(without))}: " if len(records) > 1 else ""
        parts.append(f"<p>{names}No privacy statement was written: assume no privacy.</p>")
    statements = {label: PrivacyStatement.from_json(record) for label, record in records.items() if record}
    if not statements:
        return parts
    text = "".join(
        f"<h3>{escape(title)}</h3><ul>{''.join(f'<li>{inline(line)}</li>' for line in lines)}</ul>"
        for title, lines in _shared(statements).items()
    )
    return [*parts, f"<div class='statement'><div>{text}</div>{_numbers(statements)}</div>"]


def _shared(statements: Mapping[str, PrivacyStatement]) -> dict[str, list[str]]:
    """Title -> paragraphs, each once; one that some arms have and others have not begins with their names."""
    said: dict[str, dict[str, list[str]]] = {}
    for label, statement in statements.items():
        for title, lines in sections(statement):
            for line in lines:
                said.setdefault(title, {}).setdefault(line, []).append(label)
    return {
        title: [line if len(by) == len(statements) else f"**{', '.join(by)}:** {line}" for line, by in lines.items()]
        for title, lines in said.items()
    }


def _numbers(statements: Mapping[str, PrivacyStatement]) -> str:
    columns: list[dict[str, Any]] = [dict(table_rows(statement)) for statement in statements.values()]
    quantities = dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column)
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in quantities]
    if len({tuple(column.items()) for column in columns}) == 1:
        return table(["quantity", "value"], [row[:2] for row in rows])
    return table(["quantity", *statements], rows, joins_equal=True)


def _joint_release(runs: Mapping[str, Run]) -> str:
    """What releasing all private arms together would cost."""
    private = [run.privacy for run in runs.values() if run.privacy.get("epsilon") is not None]
    if len(private) < 2:
        return ""
    if any(record.get("seeds_from") != "os entropy" for record in private):
        text = (
            "Seeds were given, not drawn: runs that share them share noise, which cancels in their "
            "difference. **Release one of the models at most.**"
        )
    else:
        epsilon, delta = (sum(record[name] for record in private) for name in ("epsilon", "delta"))
        text = (
            f"Releasing the models of all {len(private)} private runs together costs ε = {number(epsilon, 'up')}, "
            f"δ = {number(delta, 'up')} (basic composition)."
        )
    return f"<p>{inline(text)}</p>"
