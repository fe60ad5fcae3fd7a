"""The record of a run: `metrics.jsonl`, one JSON object per line, each with its `step`.

A line survives the death of the process that wrote it. A run that is killed at any moment therefore loses at most the
line that it is writing, and a resumed run continues the same file. The names of metrics that were computed from raw
private values begin with `nonprivate/`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dp_rmt.files import write_atomically
from dp_rmt.training.writers import Writers

_LARGEST_ARRAY = 10_000


class MetricsWriter:
    """Appends lines to a metrics file, and rewinds it when a run resumes from a checkpoint.

    An unfinished last line that a killed run left behind is removed when the writer is made. To resume from
    the checkpoint of step t, call `truncate_after(t)`. If a run writes the lines of step t before the checkpoint of
    step t, its file has every line once.

    Args:
      path: the file; it and its folder are made if missing.
      others: get the numbers of each line, too.

    Raises:
      ValueError: an existing file has a broken line that is not its last.
    """

    def __init__(self, path: str | os.PathLike[str], others: Writers | None = None) -> None:
        self.path = Path(path)
        self._others = others or Writers()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self.truncate_after(math.inf)

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line and hands it to the operating system before returning.

        Args:
          step: number of updates done.
          metrics: names to numbers, strings, None, NumPy or JAX scalars and small arrays, and lists or
            mappings of these. A number that is not finite becomes null: JSON has no NaN.

        Raises:
          ValueError: a metric is called `step`, or is too large to be a metric.
          TypeError: a value has no counterpart in JSON.
        """
        if "step" in metrics:
            raise ValueError("a metric cannot be called 'step': every line has its step already; rename it")
        line = {"step": int(step)} | {name: _to_json(name, value) for name, value in metrics.items()}
        with self.path.open("a", encoding="ascii") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self._others.append(line)

    def flush(self) -> None:
        """Makes what other writers have taken visible; the file itself lags behind nothing."""
        self._others.flush()

    def close(self) -> None:
        """Ends the other writers."""
        self._others.close()

    def truncate_after(self, step: float) -> None:
        """Removes, atomically, all lines with a step greater than `step`, and a broken last line.

        Args:
          step: the step that was restored; -1 empties the file.

        Raises:
          ValueError: a line that is not the last is broken.
        """
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if text.encode() != self.path.read_bytes():
            write_atomically(self.path, text)
        self._others.begin(kept)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file, in the order of writing.

    Args:
      path: the file.

    Returns:
      One dict per line, each with an integer `step`. A broken last line (the run was killed, or is still
      writing) is left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another line is not a JSON object with an integer `step`; the message names file and line.
    """
    lines = Path(path).read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("not an object with an integer 'step'")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number} is not a line of metrics: {error}. Only the last line of a killed "
                "run may be broken; remove this line by hand if it is of no use"
            ) from error
        records.append(record)
    return records


def _to_json(name: str, value: Any) -> Any:
    """The value in the types of JSON."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _to_json(f"{name}[{key}]", item) for key, item in value.items()}
    if isinstance(value, Iterable) and not hasattr(value, "dtype"):
        return [_to_json(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if not hasattr(value, "dtype"):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}, which JSON lacks; pass plain numbers")
    array = np.asarray(value)
    if array.dtype.kind in "cOSUmM":
        raise TypeError(f"metric {name!r} is an array of {array.dtype}, which JSON lacks; pass plain numbers")
    if array.size > _LARGEST_ARRAY:
        raise ValueError(
            f"metric {name!r} has shape {array.shape}: more than {_LARGEST_ARRAY} numbers are data, not a "
            "metric; summarise it, or save it to a file of its own"
        )
    return _nested_list(array)


def _nested_list(array: np.ndarray) -> Any:
    """Nested lists of Python numbers; a float has the fewest digits that tell it apart in its own precision."""
    if array.ndim:
        return [_nested_list(item) for item in array]
    if array.dtype.kind in "biu":
        return array.item()
    # bfloat16 and its kin have no decimal form of their own; float32 holds them exactly.
    number = (array if array.dtype.kind == "f" else array.astype(np.float32))[()]
    return float(str(number)) if np.isfinite(number) else None
