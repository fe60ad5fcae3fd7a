"""The privacy statement of a run as it may be published: without the command and the folders of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dp_rmt.reporting.privacy_statement import read_privacy


def privacy_record(workdir: Path) -> dict[str, Any]:
    """The content of privacy.json, without the command and the folders of this machine."""
    record = read_privacy(workdir)
    if record.get("about"):
        record["about"] |= {"command": None, "base_model": Path(record["about"]["base_model"] or "").name}
    return record
