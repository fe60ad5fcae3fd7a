"""What the arms of a job have left in its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_rmt.finetuning.defaults import num_steps
from dp_rmt.finetuning.sweep.spent_runs import SpentRun
from dp_rmt.finetuning.workdir import CONFIG_FILE
from dp_rmt.training.ledger import read_ledger
from dp_rmt.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class ArmFolder:
    """An arm of a job, by the files that it has left.

    Attributes:
      name: name of the arm; empty where the job has only one.
      folder: the arm's own folder.
      config: content of its config.json.
      privacy: content of its privacy.json; empty before it has begun.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    privacy: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Updates done; -1 for a run that has not begun or cannot say how far it came."""
        return -1 if self.privacy.get("is_upper_bound") else self.privacy.get("num_steps", -1)

    @property
    def spent_steps(self) -> int:
        """Updates that have, or may have, been released, by the ledger; without a ledger those of the whole run."""
        entries = read_ledger(self.folder)
        return entries[-1].updates if entries else self.planned_steps

    @property
    def planned_steps(self) -> int:
        """Updates of the whole run, as `finetuning.plan.build_mechanism` counts them; 0 before it has begun."""
        train, batch = self.config.get("train", {}), self.privacy.get("expected_batch_size")
        if not train or not batch:
            return 0
        return num_steps(train["num_steps"], train["epochs"], self.privacy["num_examples"], batch)

    def value(self, key: str) -> Any:
        """The value of a dotted key of the config."""
        found: Any = self.config
        for part in key.split("."):
            found = found[part]
        return found

    def score(self, name: str) -> float:
        """The last value of a metric.

        Raises:
          ValueError: the run has no such metric; the message lists those that it has.
        """
        lines = read_metrics(self.folder / "metrics.jsonl")
        values = [line[name] for line in lines if line.get(name) is not None]
        if not values:
            known = sorted({key for line in lines for key in line if key.startswith("eval/")})
            raise ValueError(f"{self.folder} has no metric {name!r}; let SCORE be one of {', '.join(known)}")
        return values[-1]


def arms_of(workdir: Path) -> list[ArmFolder]:
    """The arms of a job; where the folder holds no run, one arm without steps."""
    config = _read(workdir / CONFIG_FILE)
    names = list(config.get("arms") or {}) or [""]
    folders = {name: workdir / name if len(names) > 1 else workdir for name in names}
    return [
        ArmFolder(name, folder, _read(folder / CONFIG_FILE), _read(folder / "privacy.json"))
        for name, folder in folders.items()
    ]


def spent_by(name: str, workdir: Path) -> list[SpentRun]:
    """The runs of a job that have used the data, each with the updates that its ledger counts."""
    found = [arm for arm in arms_of(workdir) if arm.privacy and arm.spent_steps > 0]
    return [SpentRun(name, {**arm.privacy, "num_steps": arm.spent_steps}, arm.config) for arm in found]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
