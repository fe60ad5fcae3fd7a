"""One table and one plot over the runs of a sweep, from what the runs have left in their folders."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_rmt.extras import extra
from dp_rmt.files import write_atomically
from dp_rmt.finetuning.sweep.arm_folders import arms_of, spent_by
from dp_rmt.finetuning.sweep.jobs import Job, Sweep
from dp_rmt.finetuning.sweep.privacy import cost_of_choosing
from dp_rmt.finetuning.workdir import is_secret
from dp_rmt.reporting.numbers import number
from dp_rmt.reporting.palette import COLORS
from dp_rmt.reporting.plots import STYLE
from dp_rmt.reporting.records import markdown_table

with extra("report"):
    import matplotlib as mpl
    from matplotlib.figure import Figure


def write(sweep: Sweep, workdir: Path, finished: Sequence[Job], failed: Mapping[str, str]) -> str:
    """Writes sweep.md and sweep.json, and sweep.csv and sweep.svg if a job is finished.

    Args:
      sweep: the sweep.
      workdir: the folder of the sweep.
      finished: the jobs whose runs are shown.
      failed: every other job -> the reason.

    Returns:
      The table and the failures, for the terminal.

    Raises:
      ValueError: a run lacks the metric of the sweep.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    changed = (key for changes in sweep.changes.values() for key in changes if not is_secret(key))
    keys = list(dict.fromkeys([sweep.swept, *changed]))
    arms = [(job.name, arm) for job in finished for arm in arms_of(job.workdir)]
    rows = [
        {
            "job": job,
            "arm": arm.name,
            **{key: arm.value(key) for key in keys},
            sweep.score: arm.score(sweep.score),
            "epsilon": arm.privacy["epsilon"],
            "delta": arm.privacy["delta"],
            "steps": arm.steps,
        }
        for job, arm in arms
    ]
    rows.sort(key=lambda row: -row[sweep.score])
    # A run that has begun belongs to the choice, whether or not it came to its end.
    runs = [run for name in sweep.changes for run in spent_by(name, workdir / "jobs" / name)]
    choice = cost_of_choosing(runs, sweep.repetitions) if runs else None
    table = _markdown(rows) if rows else "No job is finished."
    parts = [f"# {sweep.name}", f"{len(finished)} of {len(sweep.changes)} jobs are finished.", table]
    if rows:
        means = _markdown(_means(rows, sweep))
        parts += [f"## Mean {sweep.score} by {sweep.swept}", means, "![The same as a picture](sweep.svg)"]
        write_atomically(workdir / "sweep.csv", _csv(rows))
        write_atomically(workdir / "sweep.svg", _plot(rows, sweep))
    if choice is not None:
        parts += ["## The privacy of choosing the best", choice.text, _OF_THE_SCORES]
    failures = [f"### {name}\n\n{_fenced(text)}" for name, text in failed.items()]
    parts += ["## Jobs that are not finished", *failures] * bool(failures)
    write_atomically(workdir / "sweep.md", "\n\n".join(parts) + "\n")
    record = {
        "sweep": sweep.name,
        "base": sweep.base,
        "score": sweep.score,
        "swept": sweep.swept,
        "runs": rows,
        "unfinished": dict(failed),
        "choosing": dataclasses.asdict(choice) if choice else None,
    }
    write_atomically(workdir / "sweep.json", json.dumps(record, indent=1) + "\n")
    return "\n".join([table, *(f"\nNOT FINISHED: {name}: {text}" for name, text in failed.items())])


_UPPER_BOUNDS = ("epsilon", "delta")
"""The columns that are rounded up."""

_OF_THE_SCORES = (
    "This is about the training examples. If the examples on which the scores were computed are private, scores need "
    "noise, too (config.privacy.evaluation_epsilon): without it, neither they nor the choice are private."
)


def _means(rows: Sequence[Mapping[str, Any]], sweep: Sweep) -> list[dict[str, Any]]:
    """Mean and standard deviation over the runs of an arm that have the same value of the swept key."""
    groups: dict[tuple[str, Any], list[float]] = {}
    for row in rows:
        groups.setdefault((row["arm"], _hashable(row[sweep.swept])), []).append(row[sweep.score])
    return [
        {
            "arm": arm,
            sweep.swept: value,
            "runs": len(scores),
            "mean": statistics.fmean(scores),
            "standard deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        }
        for (arm, value), scores in sorted(groups.items(), key=lambda item: (item[0][0], _order(item[0][1])))
    ]


def _plot(rows: Sequence[Mapping[str, Any]], sweep: Sweep) -> str:
    """A plot with every run as a point, and the means of each arm joined by a line."""
    values = sorted({_hashable(row[sweep.swept]) for row in rows}, key=_order)
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {value: value if numeric else index for index, value in enumerate(values)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for index, arm in enumerate(dict.fromkeys(row["arm"] for row in sorted(rows, key=lambda row: row["arm"]))):
            own = [row for row in rows if row["arm"] == arm]
            color = COLORS[index % len(COLORS)]
            axes.scatter(
                [place[_hashable(row[sweep.swept])] for row in own],
                [row[sweep.score] for row in own],
                s=22,
                alpha=0.6,
                color=color,
            )
            means = _means(own, sweep)
            axes.plot(
                [place[mean[sweep.swept]] for mean in means],
                [mean["mean"] for mean in means],
                color=color,
                label=arm or "mean",
            )
        if numeric and values[0] > 0 and values[-1] >= 4 * values[0]:
            axes.set_xscale("log")
        if numeric and len(values) <= 8:
            axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
            axes.set_xticks([], minor=True)
        elif not numeric:
            axes.set_xticks(list(place.values()), [str(value) for value in values])
        axes.set_xlabel(sweep.swept)
        axes.set_ylabel(sweep.score)
        axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, without columns in which every cell is empty."""
    names = [name for name in rows[0] if any(row[name] not in ("", None) for row in rows)]
    return markdown_table(names, [[_cell(name, row[name]) for name in names] for row in rows])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float) or not math.isfinite(value):
        return html.escape(str(value), quote=False).replace("|", "\\|")  # text of a config, in a table
    return number(value, "up" if name in _UPPER_BOUNDS else "nearest")


def _fenced(text: str) -> str:
    """A log as it is, in a fence longer than any in it."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float)
    return (not is_number, float(value) if is_number else 0.0, str(value))
