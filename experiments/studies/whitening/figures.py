"""Draws the figures of the study of whitened coordinates from its records.

    python -m experiments.studies.whitening.figures --results=experiments/studies/whitening/results --output=docs/images

whitening_steps.png      steps to the target against the noise, for every arm
whitening_accuracy.png   accuracy along the best run of each arm, SST-2
whitening_curves.png     training loss along the best run of each arm, E2E
whitening_spectra.png    one matrix's noisy spectrum in raw and in whitened coordinates, and the edge of the noise
whitening_advisor.png    how many steps overshot, against what half the learning rate did

A figure without records is left out, and so is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from dp_rmt.finetuning import command_line
from dp_rmt.random_matrix import marchenko_pastur
from dp_rmt.reporting.advice import TOO_FAST
from dp_rmt.reporting.palette import BLACK, COLORS, DARK_GREY, PICTURE_STYLE
from dp_rmt.reporting.records import read_records
from experiments.studies.spectra.figures import plot_spectrum
from experiments.studies.whitening.advisor import HALF_RATE, cases
from experiments.studies.whitening.table import BASELINES, best_runs, by_cell, stays_from, target_of

Record = dict[str, Any]
_MARKERS = "osD^vPX"


def noise_over_clip_norm(record: Record) -> float:
    """nu: the length of the noise in the mean gradient over the clip norm, ``sigma sqrt(d) / B`` for d entries."""
    return record["noise_multiplier"] / record["config"]["privacy"]["expected_batch_size"]


def draw_steps(records: Sequence[Record]) -> Figure | None:
    """Steps to 95% of the better baseline's final accuracy against sigma / B, a line for each arm; seeds as points."""
    groups = by_cell(records)
    lines: dict[str, list[tuple[float, list[int]]]] = {}
    for (batch, epsilon, arm), runs in sorted(groups.items()):
        target = target_of([groups.get((batch, epsilon, name), []) for name in BASELINES])
        best = best_runs(runs)
        if target is None or not best or not best[0]["accuracy"]:
            continue
        reached = [min(_steps(run, target), run["steps"] + 1) for run in best]
        lines.setdefault(arm, []).append((noise_over_clip_norm(best[0]), reached))
    if not lines:
        return None
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (arm, points) in enumerate(lines.items()):
        points.sort()
        style: Any = {"color": COLORS[number % len(COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot([x for x, _ in points], [statistics.fmean(y) for _, y in points], label=arm, lw=1.8, ms=7, **style)
        for x, reached in points:
            axes.plot([x] * len(reached), reached, ls="", ms=4, alpha=0.5, mew=0, **style)
    axes.set(xlabel="noise of one entry over the clip norm, σ / B", ylabel="steps to 95% of the best DP-Adam")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="x", scilimits=(0, 0))
    figure.legend(loc="outside right upper")
    return figure


def _steps(run: Record, target: float) -> int:
    """Steps from which the average or the last iterate stays at the target, whichever is first; else past the end."""
    found = [stays_from(run[key], target) for key in ("accuracy", "accuracy_of_last_iterate") if run.get(key)]
    return min((step for step in found if isinstance(step, int)), default=run["steps"] + 1)


def draw_curves(
    records: Sequence[Record], of: str = "nonprivate/loss", label: str = "training loss of the batch"
) -> Figure | None:
    """One curve of the records along the best run of each arm, a panel for each cell of batch size and epsilon."""
    cells: dict[tuple[float, float], list[tuple[str, Record]]] = {}
    for (batch, epsilon, arm), runs in sorted(by_cell(records).items()):
        if best := best_runs(runs):
            cells.setdefault((batch, epsilon), []).append((arm, best[0]))
    if not cells:
        return None
    arms = sorted({arm for of_cell in cells.values() for arm, _ in of_cell})
    figure = Figure(figsize=(5.0 * len(cells) + 1.6, 4.0), layout="constrained")
    panels = figure.subplots(1, len(cells), squeeze=False)[0]
    for axes, ((batch, epsilon), of_cell) in zip(panels, sorted(cells.items())):
        for arm, run in of_cell:
            steps, values = zip(*run[of])
            axes.plot(steps, values, color=COLORS[arms.index(arm) % len(COLORS)], lw=1.8, label=arm)
        axes.set(xlabel="step", title=f"batch {batch:g}, ε = {epsilon:g}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(label)
    handles = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper")
    return figure


def draw_spectra(raw: Record, whitened: Record) -> Figure:
    """The spectrum of the matrix that whitening changes most, at the first step that both records have.

    Args:
      raw: a record of `experiments.studies.spectra.record` of a run in raw coordinates.
      whitened: one of a run that is clipped and noised in whitened coordinates, with the same seed.
    """
    first, second = raw["spectra"][0], whitened["spectra"][0]
    above = [
        [_above(record["matrices"][index], values) for index, values in enumerate(spectra["noisy"])]
        for record, spectra in ((raw, first), (whitened, second))
    ]
    index = int(np.argmax(np.subtract(above[1], above[0])))
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, record, spectra, label in zip(panels, (raw, whitened), (first, second), ("raw", "whitened")):
        plot_spectrum(axes, record, spectra, index)
        axes.set_title(f"{label}: {axes.get_title(mpl.rcParams['axes.titlelocation'])}", fontsize=9.5)
    handles = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure


def _above(matrix: Mapping[str, Any], values: Sequence[float]) -> int:
    """The number of singular values above the edge of the noise."""
    edge = float(np.asarray(marchenko_pastur.bulk_edge(rows=matrix["rows"], cols=matrix["cols"], noise_std=1.0)))
    return int(np.sum(np.asarray(values) > edge))


def draw_advisor(folders: Mapping[str, Sequence[Record]]) -> Figure | None:
    """The share of steps that overshot against what half the learning rate gained, a panel for each task."""
    found = {name: [case for case in cases(records) if case.remedy == HALF_RATE] for name, records in folders.items()}
    found = {name: of_task for name, of_task in found.items() if of_task}
    if not found:
        return None
    figure = Figure(figsize=(4.8 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, of_task) in zip(panels, found.items()):
        for said, marker, color, label in (
            (True, "o", COLORS[1], "“try half the rate”"),
            (False, "s", COLORS[0], "no such advice"),
        ):
            points = [case for case in of_task if case.is_advised == said]
            axes.plot(
                [case.num_overshot / case.num_steps for case in points],
                [case.gain for case in points],
                marker,
                color=color,
                label=label,
            )
        axes.axvline(TOO_FAST, color=BLACK, ls="--", lw=1)
        axes.axhline(0.0, color=DARK_GREY, lw=0.8)
        axes.set(xlabel="share of steps with a slope below −2", title=name)
    panels[0].set_ylabel("what half the learning rate gains")
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(3, len(found)))
    return figure


def main(argv: Sequence[str]) -> None:
    """Draws every figure of which there are records."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; the flags are --results and --output")
    root, output = Path(flags.FLAGS.results), Path(flags.FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    tasks = {name: read_records(root / name) for name in ("sst2", "e2e", "e2e_lora", "dart")}
    spectra = {record["description"]["arm"]: record for record in read_records(root / "spectra")}
    pair = [spectra[arm] for arm in ("dp_adam_b5", "whitened") if arm in spectra]
    every: dict[str, Callable[[], Figure | None]] = {
        "whitening_steps.png": lambda: draw_steps(tasks["sst2"]),
        "whitening_accuracy.png": lambda: draw_curves(tasks["sst2"], "accuracy", "accuracy of the averaged iterates"),
        "whitening_curves.png": lambda: draw_curves(tasks["e2e"]),
        "whitening_advisor.png": lambda: draw_advisor({name: records for name, records in tasks.items() if records}),
        "whitening_spectra.png": lambda: draw_spectra(*pair) if len(pair) == 2 else None,
    }
    with mpl.rc_context(PICTURE_STYLE):
        for name, draw in every.items():
            figure = draw()
            print(f"{output / name}" if figure is not None else f"{name}: no records yet")
            if figure is not None:
                figure.savefig(output / name, dpi=130)


if __name__ == "__main__":
    flags.DEFINE_string("results", "experiments/studies/whitening/results", "Folder with a folder for each task.")
    flags.DEFINE_string("output", "docs/images", "Folder of the figures.")
    command_line.run(main)
