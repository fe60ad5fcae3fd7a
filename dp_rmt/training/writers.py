"""Writers of metrics beside `metrics.jsonl`, which stays the record: CSV, TensorBoard, Weights & Biases.

They get numbers, and what is public: names that begin with ``nonprivate/`` only if they are asked for. When a run is
resumed, they begin again with the lines that the record has kept, so that no step is there twice.
"""

from __future__ import annotations

import csv
import io
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from dp_rmt.extras import check_installed, extra
from dp_rmt.files import write_atomically

NONPRIVATE = "nonprivate/"
Kind = Literal["csv", "tensorboard", "wandb"]


class Writer(Protocol):
    """Takes the numbers of a run, step by step."""

    def begin(self, lines: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Begins with these lines, whatever was written before."""

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one line of metrics."""

    def flush(self) -> None:
        """Makes what was taken visible; called after each evaluation and at the end."""

    def close(self) -> None:
        """Ends the writing."""


class CsvWriter:
    """A table with a row for each step and a column for each metric, written whole at each evaluation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[int, dict[str, float]] = {}

    def begin(self, lines: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """See `Writer`."""
        self._rows = {}
        for step, values in lines:
            self.append(step, values)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._rows.setdefault(step, {}).update(values)

    def flush(self) -> None:
        """See `Writer`."""
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["step", *columns])
        table.writerows([step, *(row.get(name, "") for name in columns)] for step, row in sorted(self._rows.items()))
        write_atomically(self._path, text.getvalue())

    def close(self) -> None:
        """See `Writer`."""
        self.flush()


class TensorBoardWriter:
    """Event files in a folder of their own, for ``tensorboard --logdir``."""

    def __init__(self, folder: Path) -> None:
        with extra("tensorboard"):
            from tensorboard.summary import Writer as Events
        self._folder, self._new = folder, Events
        self._events: Any = None

    def begin(self, lines: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """See `Writer`."""
        self.close()
        for old in self._folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._events = self._new(str(self._folder))
        for step, values in lines:
            self.append(step, values)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """See `Writer`."""
        self._events.flush()

    def close(self) -> None:
        """See `Writer`."""
        if self._events is not None:
            self._events.close()
            self._events = None


class WandbWriter:
    """A run of Weights & Biases, online or in the folder ``wandb`` of the workdir, which ``wandb sync`` sends later.

    Nothing but the numbers and the settings leaves this machine: no command line and no console, which may show seeds
    or raw values, no code, and neither its name nor its packages nor how busy it is.

    Args:
      workdir: of the run; the file ``wandb_id`` in it lets a resumed run go on there.
      project: in which the run stands.
      name: of the run.
      config: the settings, without secrets.
      online: whether it is sent at once.
    """

    def __init__(self, workdir: Path, *, project: str, name: str, config: Mapping[str, Any], online: bool) -> None:
        with extra("wandb"):
            import wandb
        self._wandb, self._workdir, self._run = wandb, workdir, None  # type: Any, Path, Any
        self._about = {"project": project, "name": name, "config": dict(config)}
        self._mode = "online" if online else "offline"

    def begin(self, lines: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """See `Writer`; steps that the run has already are not sent again."""
        if self._run is None:
            path = self._workdir / "wandb_id"
            if not path.exists():
                write_atomically(path, secrets.token_hex(4))
            silent = {"console": "off", "save_code": False, "disable_git": True, "host": ""}
            silent |= {"x_disable_meta": True, "x_disable_stats": True, "x_save_requirements": False}
            self._run = self._wandb.init(
                dir=str(self._workdir),
                id=path.read_text(encoding="utf-8"),
                resume="allow",
                mode=self._mode,
                settings=self._wandb.Settings(**silent),
                **self._about,
            )
        for step, values in lines:
            if step >= self._run.step:
                self.append(step, values)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """See `Writer`; Weights & Biases sends what it has by itself."""

    def close(self) -> None:
        """See `Writer`."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Writers:
    """Several writers as one, which get the numbers of the lines of metrics.

    Args:
      writers: any number.
      nonprivate: whether they get ``nonprivate/...``, which is computed from raw values.
    """

    def __init__(self, writers: Sequence[Writer] = (), *, nonprivate: bool = False) -> None:
        self._writers, self._nonprivate = tuple(writers), nonprivate

    def begin(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Begins with lines of `metrics.jsonl`."""
        numbers = [(line["step"], self._numbers(line)) for line in lines] if self._writers else []
        for writer in self._writers:
            writer.begin(numbers)

    def append(self, line: Mapping[str, Any]) -> None:
        """Takes a line of `metrics.jsonl`."""
        for writer in self._writers:
            writer.append(line["step"], self._numbers(line))

    def flush(self) -> None:
        """Makes what was taken visible."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Ends the writing."""
        for writer in self._writers:
            writer.close()

    def _numbers(self, line: Mapping[str, Any]) -> dict[str, float]:
        return {
            name: value
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float) and (self._nonprivate or not _is_raw(name))
        }


def _is_raw(name: str) -> bool:
    return name.startswith(NONPRIVATE)


def check_writers(kinds: Sequence[Kind]) -> None:
    """Raises ModuleNotFoundError, with the command that installs it, if the package of a writer is missing."""
    for kind in kinds:
        if kind != "csv":
            check_installed(kind, [kind])


def open_writers(
    kinds: Sequence[Kind],
    workdir: Path,
    *,
    name: str,
    config: Mapping[str, Any],
    nonprivate: bool = False,
    project: str = "dp_rmt",
    online: bool = True,
) -> Writers:
    """The writers of a run: ``metrics.csv``, ``tensorboard/`` and Weights & Biases.

    Args:
      kinds: which.
      workdir: the run's folder.
      name: of the run, for Weights & Biases; so are `config`, without secrets, `project` and `online`.
      config: settings.
      nonprivate: whether they get ``nonprivate/...``.
      project: of Weights & Biases.
      online: whether Weights & Biases is sent at once.
    """
    writers: list[Writer] = []
    if "csv" in kinds:
        writers.append(CsvWriter(workdir / "metrics.csv"))
    if "tensorboard" in kinds:
        writers.append(TensorBoardWriter(workdir / "tensorboard"))
    if "wandb" in kinds:
        writers.append(WandbWriter(workdir, project=project, name=name, config=config, online=online))
    return Writers(writers, nonprivate=nonprivate)
