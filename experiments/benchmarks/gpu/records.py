"""The JSON file of each part: what its jobs found, enough to go on from on a machine that has nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dp_rmt.files import write_atomically
from experiments.benchmarks.gpu.jobs import PARTS

DONE, SKIPPED, FAILED, CUT, TOO_LONG = "done", "skipped", "failed", "cut", "too long"
ENDED = (DONE, SKIPPED, FAILED, TOO_LONG)
"""Nothing is to be done for a job in one of these states, unless somebody asks for it."""


class PartRecords:
    """The files of all parts, in one folder.

    Args:
      folder: of the results.
      device: description of the machine, and the versions of packages, for every file.
    """

    def __init__(self, folder: Path, device: Mapping[str, Any]) -> None:
        self.folder, self._device = folder, dict(device)
        self._parts: dict[str, dict[str, Any]] = {}
        for letter, name in PARTS.items():
            path = folder / f"{letter}_{name}.json"
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            self._parts[letter] = found.get("jobs", {})

    def job(self, name: str) -> dict[str, Any]:
        """What is known of a job: ``status``, ``reason``, ``seconds``, ``cpu_seconds``, ``calls``, ``records``."""
        times = {"seconds": 0.0, "cpu_seconds": 0.0, "calls": 0}
        return self._parts[name[0]].get(name, {"status": None, "reason": None, **times, "records": {}})

    def update(self, name: str, **changes: Any) -> None:
        """Changes what is known of a job, and replaces the file of its part."""
        letter = name[0]
        self._parts[letter][name] = self.job(name) | changes
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"part": PARTS[letter], **self._device, "jobs": self._parts[letter]}, indent=1)
        write_atomically(self.folder / f"{letter}_{PARTS[letter]}.json", text + "\n")

    def restore(self, name: str, folder: Path) -> None:
        """Writes the job's records out again, where the machine has forgotten them: a study goes on from them."""
        folder.mkdir(parents=True, exist_ok=True)
        for file, record in self.job(name)["records"].items():
            if not (folder / file).exists():
                write_atomically(folder / file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def collect(self, name: str, folder: Path) -> dict[str, Any]:
        """The JSON files in a folder, by name, over those that are known already."""
        return self.job(name)["records"] | dict(_json_files(folder))


def _json_files(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield path.name, json.loads(path.read_text(encoding="utf-8"))


def without_folders(text: str) -> str:
    """Takes the folders off absolute paths, which say something of a machine or its user.

    >>> without_folders("no file '/home/ada/models/minilm' and /tmp/x.json: see configs/base.py or https://a.b/c")
    "no file 'minilm' and x.json: see configs/base.py or https://a.b/c"
    """
    return re.sub(r"(?<![\w./:-])~?/(?:[^\s/'\":]+/)*", "", text)
