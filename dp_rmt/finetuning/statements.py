"""What of a run's privacy statement goes into a record that is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dp_rmt.reporting.privacy_statement import read_privacy


def privacy_record(workdir: Path) -> dict[str, Any]:
    """What privacy.json says, without folders of this machine, for a record that is published."""
    record = read_privacy(workdir)
    if record.get("about"):
        record["about"] |= {"command": None, "base_model": Path(record["about"]["base_model"] or "").name}
    return record
