"""The lower bound of an audit beside a run's privacy statement: `audit.json` in the run's folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_rmt.files import write_atomically

FILE = "audit.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditBound:
    """What an attack on this code showed, and what it attacked: the run, or its mechanism on a small problem.

    Attributes:
      epsilon: the lower bound.
      delta: the delta of the bound.
      confidence: the confidence with which the bound holds.
      subject: what was attacked, in words that go on from "An attack on".
      is_this_run: whether the very run was attacked; otherwise the same code was, with the settings below.
      noise_multiplier: that of what was attacked, as in the next two fields.
      sampling_probability: the probability with which a step uses an example.
      num_steps: the number of updates.
    """

    epsilon: float
    delta: float
    confidence: float
    subject: str
    is_this_run: bool
    noise_multiplier: float
    sampling_probability: float
    num_steps: int

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AuditBound:
        """The bound in the content of an `audit.json`.

        Raises:
          ValueError: the record has other fields.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(record, Mapping) or names != set(record):
            raise ValueError(f"not the record of an audit: its fields must be {', '.join(sorted(names))}")
        return cls(**record)


def write_audit(workdir: str | os.PathLike[str], bound: AuditBound) -> None:
    """Writes `audit.json` into a run's folder."""
    write_atomically(Path(workdir) / FILE, json.dumps(dataclasses.asdict(bound), indent=2) + "\n")


def read_audit(workdir: str | os.PathLike[str]) -> AuditBound | None:
    """The bound in a run's folder; None if no audit was run.

    Raises:
      ValueError: the file is not what `write_audit` writes; the message names it.
    """
    path = Path(workdir) / FILE
    if not path.exists():
        return None
    try:
        return AuditBound.from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Repeat the audit (dp-rmt audit --workdir=...)") from error
