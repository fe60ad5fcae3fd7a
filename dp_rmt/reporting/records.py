"""Records of studies: JSON with a line for each row, and numbers of five digits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_rmt.files import write_atomically


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record as JSON, one line for each row of its tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, separators=(",", ":"))
    for between in ("],[", "},{", '},"', '],"'):
        text = text.replace(between, f"{between[:2]}\n{between[2:]}")
    write_atomically(path, text + "\n")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder, by name."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown.

    >>> print(markdown_table(["arm", "loss"], [["row", "1.1"]]))
    | arm | loss |
    |---|---|
    | row | 1.1 |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def learning_rate(config: Mapping[str, Any]) -> float:
    """The learning rate of a record's config, which old records keep with the optimizer.

    >>> learning_rate({"train": {"learning_rate": 0.5}}), learning_rate({"optimizer": {"learning_rate": 0.25}})
    (0.5, 0.25)
    """
    train = config.get("train", {})
    return train["learning_rate"] if "learning_rate" in train else config["optimizer"]["learning_rate"]


def five_digits(values: Iterable[float]) -> list[float]:
    """Numbers rounded to five significant digits, as a list.

    >>> five_digits([1 / 3, 12345678.0])
    [0.33333, 12346000.0]
    """
    return [float(f"{value:.5g}") for value in values]
