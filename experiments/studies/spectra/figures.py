"""Draws four figures from the records of `experiments.studies.spectra.record`, at one or several batch sizes.

    python -m experiments.studies.spectra.figures --results=experiments/studies/spectra/results --output=docs/images

spectra_below_edge.png      a noisy gradient without a value above the bulk edge: the gate refuses it
spectra_outliers.png        a noisy gradient with many values above the edge
spectra_gain_by_edge.png    what denoising adds to the cosine to the clean gradient, against y_1 / e
spectra_gain_by_step.png    the cosines over the steps

The theory's curve is that of a signal of rank one, see `rank_one_cosines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from dp_rmt.finetuning import command_line
from dp_rmt.random_matrix import marchenko_pastur, shrinkage
from dp_rmt.reporting.palette import BLACK, BLUE, DARK_GREY, GREY, ORANGE, PICTURE_STYLE
from dp_rmt.reporting.records import read_records


def rank_one_cosines(top_over_edge: ArrayLike, *, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines to ``G = l u v^T`` of ``Y = G + s N`` and of the denoised matrix, when y_1 = top_over_edge * e is seen.

    The inverse map gives ``l = (sqrt(y^2 - c^2) + sqrt(y^2 - e^2)) / 2`` with the edges e and c of the noise. Then
    ``<Y, G> = l^2 + s l u^T N v`` and ``||Y||^2 = l^2 + m n s^2`` to leading order, so that Y has the cosine
    ``l / sqrt(l^2 + m n s^2)``. The denoised matrix is a multiple of ``u_1 v_1^T``, whose cosine to ``u v^T`` is
    ``cos_u cos_v = eta(y) / l`` with the Frobenius shrinker ``eta = sqrt(y^2 - e^2) sqrt(y^2 - c^2) / y``
    (Benaych-Georges & Nadakuditi 2012; docs/math.md, equations 2 and 3). s cancels.

    Args:
      top_over_edge: y_1 / e, above 1.
      rows: m.
      cols: n.

    Returns:
      ``(noisy, denoised)``, each of the shape of top_over_edge.

    >>> noisy, denoised = rank_one_cosines([1.5], rows=384, cols=384)
    >>> print(noisy.round(3), denoised.round(3))
    [0.132] [0.854]
    """
    shape: Any = {"rows": rows, "cols": cols, "noise_std": 1.0}
    observed = np.asarray(top_over_edge, np.float64) * float(np.asarray(marchenko_pastur.bulk_edge(**shape)))
    signal = np.asarray(marchenko_pastur.signal_singular_value(observed, **shape))
    denoised = np.asarray(shrinkage.frobenius(observed, **shape)) / signal
    return signal / np.sqrt(signal**2 + rows * cols), denoised


def draw_spectrum(record: dict[str, Any], *, outliers: bool) -> Figure:
    """The noisy spectrum of one matrix with the density that theory gives for noise alone.

    Args:
      record: a record of `experiments.studies.spectra.record`.
      outliers: whether to draw the matrix and step with the most values above the edge, among those whose bulk is still
        wide in the picture (y_1 up to 3 e). Otherwise those with the lowest y_1 / e are drawn.
    """
    spectra, index = most_telling(record, outliers=outliers)
    figure = Figure(figsize=(6.6, 4.4), layout="constrained")
    axes = figure.subplots()
    plot_spectrum(axes, record, spectra, index)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def plot_spectrum(axes: Axes, record: dict[str, Any], spectra: dict[str, Any], index: int) -> None:
    """Plots one noisy spectrum, the density that theory gives for noise alone, and the largest clean values.

    Args:
      axes: to be drawn on; the legend is left to the caller.
      record: a record of `experiments.studies.spectra.record`.
      spectra: one of its steps with spectra.
      index: of the matrix.
    """
    matrix, noisy = record["matrices"][index], np.array(spectra["noisy"][index])
    shape: Any = {"rows": matrix["rows"], "cols": matrix["cols"], "noise_std": 1.0}
    edge, lower = (float(np.asarray(f(**shape))) for f in (marchenko_pastur.bulk_edge, marchenko_pastur.lower_edge))
    width = (edge - lower) / 30
    largest = max(noisy[0], edge)
    bins = np.arange(lower - width, largest + 2 * width, width)
    axes.hist(noisy, bins=list(bins), color=GREY, label="noisy gradient")
    grid = np.linspace(max(lower - 0.1, 0.0), edge, 500)
    density = len(noisy) * width * np.asarray(marchenko_pastur.singular_value_density(grid, **shape))
    axes.plot(grid, density, color=BLUE, lw=2, label="theory: noise alone")
    axes.axvline(edge, color=BLACK, ls="--", lw=1.2, label="bulk edge")
    height = 0.04 * axes.get_ylim()[1]
    above = noisy[noisy > edge]
    if len(above):
        label = f"{len(above)} above the edge" if len(above) > 1 else "one above the edge"
        axes.plot(above, np.full(len(above), height), "v", color=ORANGE, ms=7, label=label)
    clean = np.array(spectra["nonprivate/clean"][index])[: max(5, len(above))]
    axes.plot(clean, np.full(len(clean), -height), "|", color=ORANGE, ms=9, mew=1.5, label="clean, the largest")
    axes.axhline(0.0, color=BLACK, lw=0.8)
    axes.set_xlim(left=-0.02 * largest)
    axes.set_ylim(bottom=-2 * height)
    axes.spines["bottom"].set_visible(False)
    axes.set(xlabel="singular value / $s$, the noise of one entry", ylabel="count")
    layer = f"layer {matrix['layer']}, " if "layers" in matrix["path"] else ""
    axes.set_title(
        f"{matrix['path'].split('/')[-2]}, {layer}{matrix['rows']} × {matrix['cols']}, {_batch(record)}, "
        f"step {spectra['step']}: $y_1 / e$ = {noisy[0] / edge:.2f}"
    )


def draw_gain_by_edge(records: Sequence[dict[str, Any]]) -> Figure:
    """Draws what denoising adds to the cosine against y_1 / e, a panel for each shape, and the curve for rank one."""
    points = [_points(record) for record in records]
    shapes = sorted({shape for found in points for shape in found})
    figure = Figure(figsize=(3.7 * len(shapes), 4.2), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    largest = max(x for found in points for xs, _ in found.values() for x in xs)
    ratios = np.geomspace(1.0005, max(largest, 1.5), 300)
    for axes, (rows, cols) in zip(panels, shapes):
        for record, found, (color, marker) in zip(records, points, ((ORANGE, "^"), (BLUE, "o"), (DARK_GREY, "s"))):
            x, y = found.get((rows, cols), ([], []))
            axes.plot(x, y, marker, color=color, ms=4, alpha=0.55, mew=0, label=_batch(record))
        noisy, denoised = rank_one_cosines(ratios, rows=rows, cols=cols)
        axes.plot(ratios, denoised - noisy, color=BLACK, lw=1.8, label="theory, rank one")
        axes.axvline(1.0, color=BLACK, ls="--", lw=1)
        axes.axhline(0.0, color=DARK_GREY, lw=0.8)
        axes.set_xscale("log")
        axes.set_xlim(left=0.92)
        ticks = [tick for tick in (1, 1.5, 2, 3, 5, 8, 12) if tick <= 1.1 * ratios[-1]]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="$y_1 / e$", title=f"{rows} × {cols}")
    panels[0].set_ylabel("cosine, denoised − noisy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(records) + 1)
    return figure


def draw_gain_by_step(records: Sequence[dict[str, Any]]) -> Figure:
    """Draws the mean cosine to the clean gradient over the steps, and the middle 80% of matrices, a panel a record."""
    figure = Figure(figsize=(4.8 * len(records), 3.8), layout="constrained")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, record in zip(panels, records):
        steps = [row["step"] for row in record["steps"]]
        for stage, color, marker in (("denoised", BLUE, "o"), ("noisy", DARK_GREY, "s")):
            cosines = np.array([row[f"nonprivate/cosine_{stage}"] for row in record["steps"]])
            axes.fill_between(steps, *np.quantile(cosines, [0.1, 0.9], axis=1), color=color, alpha=0.18, lw=0)
            axes.plot(steps, cosines.mean(axis=1), color=color, marker=marker, ms=4, lw=1.8, label=stage)
        axes.set(xlabel="step", title=_batch(record))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("cosine to the clean gradient")
    panels[0].set_ylim(bottom=0.0)
    panels[0].legend(loc="upper right", title="mean; 80% of matrices", title_fontsize=10, alignment="left")
    return figure


def main(argv: Sequence[str]) -> None:
    """Draws all figures."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; the flags are --results and --output")
    records = read_records(Path(flags.FLAGS.results))
    if not records:
        raise app.UsageError(
            f"--results={flags.FLAGS.results} holds no record; run experiments.studies.spectra.record first"
        )
    records.sort(key=lambda record: record["description"]["batch_size"])
    output = Path(flags.FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(PICTURE_STYLE | {"axes.titlesize": 11}):
        draw_spectrum(records[0], outliers=False).savefig(output / "spectra_below_edge.png", dpi=130)
        draw_spectrum(records[-1], outliers=True).savefig(output / "spectra_outliers.png", dpi=130)
        draw_gain_by_edge(records).savefig(output / "spectra_gain_by_edge.png", dpi=130)
        draw_gain_by_step(records).savefig(output / "spectra_gain_by_step.png", dpi=130)


def most_telling(record: dict[str, Any], *, outliers: bool) -> tuple[dict[str, Any], int]:
    """The recorded step and the index of the matrix that `draw_spectrum` draws, as it describes them."""

    def score(place: tuple[dict[str, Any], int]) -> tuple[float, float]:
        spectra, index = place
        matrix = record["matrices"][index]
        edge = marchenko_pastur.bulk_edge(rows=matrix["rows"], cols=matrix["cols"], noise_std=1.0)
        ratios = np.array(spectra["noisy"][index]) / np.asarray(edge)
        if not outliers:
            return 0.0, -float(ratios[0])
        return float(np.sum(ratios > 1)) if ratios[0] <= 3 else 0.0, float(ratios[0])

    places = [(spectra, index) for spectra in record["spectra"] for index in range(len(record["matrices"]))]
    return max(places, key=score)


def _points(record: dict[str, Any]) -> dict[tuple[int, int], tuple[list[float], list[float]]]:
    """``{(rows, cols): (y_1 / e, gain)}`` over all matrices and steps."""
    found: dict[tuple[int, int], tuple[list[float], list[float]]] = {}
    for row in record["steps"]:
        columns = (row["top_over_edge"], row["nonprivate/cosine_denoised"], row["nonprivate/cosine_noisy"])
        for matrix, ratio, denoised, noisy in zip(record["matrices"], *columns):
            x, y = found.setdefault((matrix["rows"], matrix["cols"]), ([], []))
            x.append(ratio)
            y.append(denoised - noisy)
    return found


def _batch(record: dict[str, Any]) -> str:
    return f"batch {record['description']['batch_size']:g}"


if __name__ == "__main__":  # flags are defined here, so that other programs and tests can import the rest
    flags.DEFINE_string("results", "experiments/studies/spectra/results", "Folder of the records.")
    flags.DEFINE_string("output", "docs/images", "Folder of the figures.")
    command_line.run(main)
