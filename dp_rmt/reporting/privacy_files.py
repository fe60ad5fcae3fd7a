"""The privacy statement beside a run's model: `privacy.json` for programs and `privacy.md` for people."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dp_rmt.files import write_atomically
from dp_rmt.reporting.privacy_statement import PrivacyStatement, table_rows
from dp_rmt.reporting.privacy_text import sections


def write_privacy(workdir: str | os.PathLike[str], statement: PrivacyStatement) -> None:
    """Writes `privacy.json` and `privacy.md` into a run's folder, each replaced atomically.

    Args:
      workdir: the run's folder; made if missing.
      statement: the numbers at this point of the run.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(statement.to_json(), indent=2, allow_nan=False)
    write_atomically(folder / "privacy.json", text + "\n")
    write_atomically(folder / "privacy.md", markdown(statement))


def markdown(statement: PrivacyStatement) -> str:
    """The statement as a page of Markdown, the content of `privacy.md`."""
    parts = ["# Privacy statement"]
    for heading, paragraphs in sections(statement):
        parts += [f"## {heading}", "\n".join(f"- {text}" for text in paragraphs)]
    rows = "\n".join(f"| {name} | {value} |" for name, value in table_rows(statement))
    return "\n\n".join([*parts, "## Numbers", f"| quantity | value |\n|:--|--:|\n{rows}"]) + "\n"
