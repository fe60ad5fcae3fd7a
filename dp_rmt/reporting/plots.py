"""The plots of a report, each an SVG with a description for those who cannot see it."""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dp_rmt.extras import extra
from dp_rmt.reporting.palette import COLORS
from dp_rmt.reporting.series import Series

with extra("report"):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.colors import CenteredNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, ScalarFormatter

_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _GRID = "#24292f", "#e4e7eb"
STYLE: Any = {
    "font.size": 12,  # which is 16 pixels, as the page's own text: all plots are shown in their natural size
    "axes.labelsize": 12,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#9aa3ad",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "text.parse_math": False,  # names of arms and data sets may hold a $
    "svg.hashsalt": "dp_rmt",  # equal runs give equal files
}
WIDE, SMALL = (10.0, 3.9), (4.9, 3.4)
_MOST_POINTS, _MOST_COLUMNS = 400, 240
_SHORT_LABEL, _LONGEST_LINE = 24, 44
_RATIOS = (0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
      svg: the file.
      alt: what it shows, in words.
      caption: how to read it.
      keeps_colors: whether its colours mean something, so that a dark page shows it as it is.
    """

    svg: bytes
    alt: str
    caption: str
    keeps_colors: bool = False


class Line(NamedTuple):
    """A line of a plot: its label, its points, and the number of its colour."""

    label: str
    series: Series
    color: int
    dashed: bool = False


def line_plot(
    lines: Sequence[Line],
    *,
    ylabel: str,
    caption: str,
    levels: Mapping[str, float] | None = None,
    percent: bool = False,
    size: tuple[float, float] = SMALL,
) -> Plot:
    """A plot of values over the updates.

    Args:
      lines: at least one line, each with at least one point; more than 400 points are averaged in blocks.
      ylabel: quantity and unit.
      caption: how to read the plot.
      levels: label -> value, drawn as a thin dotted line.
      percent: write the values in percent.
      size: inches.

    Returns:
      The plot; its description gives each line's first and last value.
    """

    needs_legend = len(lines) + len(levels or {}) > 1
    lines = _merge_equal(lines)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for line in lines:
            few = len(line.series.steps) <= 60
            axes.plot(
                *thin(line.series, _MOST_POINTS),
                color=COLORS[line.color % len(COLORS)],
                ls="--" if line.dashed else "-",
                marker=_MARKERS[line.color % len(_MARKERS)] if few else "",
                ms=4,
                lw=1.8,
                label=line.label,
            )
        for label, value in (levels or {}).items():
            axes.axhline(value, color=_INK, lw=1, ls=":", label=label)
        axes.set(xlabel="updates", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        else:  # whole numbers at every tick, and no "1e-5 + 0.6946" in a corner
            axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        if needs_legend:
            _legend(figure, axes)

    text = "; ".join(_line_in_words(line) for line in lines)
    text += "".join(f"; {label}: {value:.4g}" for label, value in (levels or {}).items())
    return _render(draw, size=size, alt=f"Line plot of {ylabel} over updates. {text}.", caption=caption)


class Heat(NamedTuple):
    """The matrices of one run: path -> y_1 / e and kept rank, each a `Series` of (layers, T)."""

    top_over_edge: Mapping[str, Series]
    kept_rank: Mapping[str, Series]


def heat_ranges(runs: Sequence[Heat]) -> tuple[CenteredNorm, Normalize]:
    """Colour scales that all runs share: one for log2(y_1 / e), centred at the edge, and one for the kept rank."""
    ratios = [np.abs(_log_ratio(series.values)) for run in runs for series in run.top_over_edge.values()]
    ranks = [series.values for run in runs for series in run.kept_rank.values()]
    furthest, highest = (
        float(np.nanmax(np.concatenate([[0.0], *map(np.ravel, values)]))) for values in (ratios, ranks)
    )
    return CenteredNorm(0.0, max(furthest, 0.1)), Normalize(0, max(highest, 1.0))


def heat_maps(heat: Heat, ranges: tuple[CenteredNorm, Normalize], *, label: str) -> Plot:
    """Heat maps of layers by updates for each kind of kernel: y_1 / e on the left, kept rank on the right.

    Args:
      heat: the matrices of one run, at least one.
      ranges: colour scales, from `heat_ranges`.
      label: name of the run.

    Returns:
      The plot; its description gives medians per kernel.
    """
    names = short_names(list(heat.top_over_edge))
    heights = [0.42 + 0.075 * max(len(series.values), 4) for series in heat.top_over_edge.values()]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(names), 2, squeeze=False, sharex=True, height_ratios=heights)
        for row, (path, name) in zip(grid, names.items()):
            ratio, rank = heat.top_over_edge[path], heat.kept_rank.get(path)
            ratio_mesh = _mesh(row[0], Series(ratio.steps, _log_ratio(ratio.values)), ranges[0], "RdBu_r")
            row[0].set_title(name, pad=3)
            if rank is not None:
                rank_mesh = _mesh(row[1], rank, ranges[1], "YlGnBu")
                rank_mesh.set_array(np.ma.masked_equal(rank_mesh.get_array(), 0))  # nothing kept stays white
        for axes in grid[-1]:
            axes.set_xlabel("updates")
        figure.supylabel("layer", fontsize=12)
        bar: dict[str, Any] = {"location": "top", "aspect": 40, "shrink": 0.9, "pad": 0.01}
        ratio_bar = figure.colorbar(ratio_mesh, ax=grid[:, 0], **bar)
        _ratio_ticks(ratio_bar, heat)
        ratio_bar.set_label("largest singular value / bulk edge, y₁/e")
        rank_bar = figure.colorbar(rank_mesh, ax=grid[:, 1], **bar)
        rank_bar.ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        rank_bar.set_label("singular values kept")

    parts = [
        f"{name}: median y₁/e {_median(heat.top_over_edge[path].values):.3g}, median kept rank "
        f"{_median(heat.kept_rank[path].values):.3g}"
        for path, name in names.items()
        if path in heat.kept_rank
    ]
    return _render(
        draw,
        size=(10.0, 1.3 + sum(heights)),
        keeps_colors=True,
        alt=f"Heat maps of {label}, layers by updates, for each kind of kernel. {'; '.join(parts)}.",
        caption=f"{label}. Left: white is the edge of the noise, red stands above it. Right: white means "
        "that nothing was kept, so the matrix passed through as it was.",
    )


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Paths without the first parts that all share and without the final `kernel`.

    >>> short_names(["encoder/layers/query/kernel", "encoder/layers/key/kernel"])
    {'encoder/layers/query/kernel': 'query', 'encoder/layers/key/kernel': 'key'}
    """
    parts = {path: path.removesuffix("/kernel").split("/") for path in paths}
    shared = 0
    while len(paths) > 1 and all(len(p) > shared + 1 for p in parts.values()):
        if len({p[shared] for p in parts.values()}) > 1:
            break
        shared += 1
    return {path: "/".join(p[shared:]) for path, p in parts.items()}


def thin(series: Series, most: int) -> Series:
    """A series of at most `most` points: means over blocks of neighbouring updates, each at its last update."""
    count = len(series.steps)
    if count <= most:
        return series
    starts = np.arange(0, count, -(-count // most))
    ends = np.append(starts[1:], count)
    means = np.add.reduceat(series.values, starts, axis=-1) / (ends - starts)
    return Series(series.steps[ends - 1], means)


def _mesh(axes: Axes, series: Series, norm: Normalize, colormap: str):
    steps, values = thin(series, _MOST_COLUMNS)
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    layers = len(values)
    edges = np.concatenate([[first], steps]), np.arange(layers + 1) + 0.5
    mesh = axes.pcolormesh(*edges, values, norm=norm, cmap=colormap, rasterized=True)
    axes.grid(False)
    axes.yaxis.set_major_locator(FixedLocator([1, layers] if layers > 1 else [1]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return mesh


def _ratio_ticks(bar, heat: Heat) -> None:
    """Ticks at round ratios; only the part of the colour scale that occurs is shown."""
    values = np.concatenate([_log_ratio(series.values).ravel() for series in heat.top_over_edge.values()])
    lowest, highest = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (0.0, 0.0)
    bar.ax.set_xlim(min(lowest, -0.1), max(highest, 0.1))
    shown = [0.0]
    for place in np.log2(_RATIOS):
        if lowest <= place <= highest and min(abs(place - other) for other in shown) > (highest - lowest) / 9:
            shown.append(float(place))
    bar.ax.xaxis.set_major_locator(FixedLocator(shown))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2**value:.3g}"))
    bar.ax.xaxis.set_minor_locator(FixedLocator([]))


def _median(values: np.ndarray) -> float:
    """The median of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("nan")


def _log_ratio(values: np.ndarray) -> np.ndarray:
    return np.log2(np.where(values > 0, values, np.nan))


def _legend(figure: Figure, axes: Axes) -> None:
    """Inside the axes where it is short, else above them, in lines that a phone has room for."""
    handles, names = axes.get_legend_handles_labels()
    close: Any = {"handlelength": 1.2, "labelspacing": 0.25}
    if max(map(len, names), default=0) <= _SHORT_LABEL:
        axes.legend(handles, names, **close)
    else:
        wrapped = [textwrap.fill(name, _LONGEST_LINE) for name in names]
        figure.legend(handles, wrapped, loc="outside upper left", **close)


def _merge_equal(lines: Sequence[Line]) -> list[Line]:
    """Lines that lie on each other become one with both labels, for only one of them could be seen."""
    merged: list[Line] = []
    for line in lines:
        for index, other in enumerate(merged):
            if all(np.array_equal(a, b) for a, b in zip(line.series, other.series)):
                merged[index] = other._replace(label=f"{other.label}, {line.label}")
                break
        else:
            merged.append(line)
    return merged


def _line_in_words(line: Line) -> str:
    (first, last), values = line.series.steps[[0, -1]], line.series.values
    return f"{line.label}: {values[0]:.4g} at update {first}, {values[-1]:.4g} at update {last}"


def _render(
    draw: Callable[[Figure], None],
    *,
    size: tuple[float, float],
    alt: str,
    caption: str,
    keeps_colors: bool = False,
) -> Plot:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.02))
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=150, transparent=True)
    return Plot(buffer.getvalue(), alt, caption, keeps_colors)
