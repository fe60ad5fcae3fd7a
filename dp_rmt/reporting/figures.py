"""Which plots a report has: those for which the runs have recorded the metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from dp_rmt.reporting.advice import OVERSHOT
from dp_rmt.reporting.numbers import number
from dp_rmt.reporting.plots import Heat, Line, Plot, heat_maps, heat_ranges, line_plot
from dp_rmt.reporting.series import Run, Series, is_loss, labels, main_scores, metric_names, score_label


@dataclasses.dataclass(frozen=True)
class Figures:
    """The plots of a report by section; a section without data has none."""

    scores: Sequence[Plot]
    advice: Sequence[Plot]
    epsilon: Sequence[Plot]
    denoising: Sequence[Plot]
    heat_maps: Sequence[Plot]
    nonprivate: Sequence[Plot]
    optimisation: Sequence[Plot]


def figures_of(runs: Mapping[str, Run]) -> Figures:
    """All plots of the runs.

    Args:
      runs: name -> run.

    Returns:
      The plots that the recorded metrics allow.
    """
    arms = dict(zip(labels(runs), runs.values()))
    return Figures(
        scores=_scores(arms),
        advice=_advice(arms),
        epsilon=_present(_epsilon(arms)),
        denoising=_denoising(arms),
        heat_maps=_heat_maps(arms),
        nonprivate=_nonprivate(arms),
        optimisation=_present(
            _over_updates(arms, "learning_rate", "learning rate", "Learning rate of the optimizer."),
            _over_updates(
                arms,
                "seconds",
                "time (s)",
                "Time from one line of metrics to the next, without evaluation.",
                skip_first=True,
            ),
        ),
    )


def _scores(arms: Mapping[str, Run]) -> list[Plot]:
    runs = list(arms.values())
    main = main_scores(runs)
    others = [name for name in metric_names(runs, "eval/") if name not in main]
    plots = []
    for name in main + others:
        lines = _lines(arms, partial(Run.series, name=name))
        starts = {line.series.values[0] for line in lines if line.series.steps[0] == 0}
        levels = {"before training": float(next(iter(starts)))} if len(starts) == 1 else None
        plots.append(
            line_plot(
                lines,
                ylabel=score_label(name),
                levels=levels,
                caption=f"{score_label(name).capitalize()} during training"
                + ("; lower is better." if is_loss(name) else "; higher is better."),
                percent=name.endswith("/accuracy"),
            )
        )
    return plots


def _advice(arms: Mapping[str, Run]) -> list[Plot]:
    slopes = _lines(arms, lambda run: run.series("advice/slope"))
    if not slopes:
        return []
    caption = (
        "z, the slope of the loss along the last step in units of its noise, which is ±1. Above 0 the loss still falls "
        "there; below the dotted line the step went too far, or was one of the 2.3% that look so by chance."
    )
    levels = {"overshot below": OVERSHOT}
    return [line_plot(slopes, ylabel="z of the last step", levels=levels, caption=caption)]


def _epsilon(arms: Mapping[str, Run]) -> Plot | None:
    private = {label: run for label, run in arms.items() if run.privacy.get("epsilon") is not None}
    deltas = {run.privacy["delta"] for run in private.values()}
    at = f" at δ = {number(deltas.pop())}" if len(deltas) == 1 else ""
    caption = "Privacy spent so far: ε after each update. It grows with every update and never shrinks."
    lines = [
        line._replace(series=Series(*(np.concatenate([[0], points]) for points in line.series)))
        for line in _lines(arms, lambda run: run.series("epsilon"))
        if line.label in private
    ]
    return line_plot(lines, ylabel=f"ε{at}", caption=caption) if lines else None


def _denoising(arms: Mapping[str, Run]) -> list[Plot]:
    def share_kept(run: Run) -> Series:
        return _over_matrices(run, "denoise/kept_rank", lambda ranks: np.mean(ranks > 0, axis=0))

    def median_ratio(run: Run) -> Series:
        return _over_matrices(run, "denoise/top_over_edge", lambda ratios: np.nanmedian(ratios, axis=0))

    share, ratio = _lines(arms, share_kept), _lines(arms, median_ratio)
    plots = []
    if share:
        caption = "Share of the gradient matrices in which signal was found; the others pass unchanged."
        plots.append(line_plot(share, ylabel="matrices denoised", percent=True, caption=caption))
    if ratio:
        caption = "Median over the matrices. At 1 the largest singular value is what noise alone would give."
        levels = {"edge of the noise": 1.0}
        plots.append(line_plot(ratio, ylabel="median of y₁/e", levels=levels, caption=caption))
    return plots


def _heat_maps(arms: Mapping[str, Run]) -> list[Plot]:
    heats = {
        label: Heat(run.layer_series("denoise/top_over_edge"), run.layer_series("denoise/kept_rank"))
        for label, run in arms.items()
    }
    heats = {label: heat for label, heat in heats.items() if heat.top_over_edge and heat.kept_rank}
    ranges = heat_ranges(list(heats.values()))
    return [heat_maps(heat, ranges, label=label) for label, heat in heats.items()]


def _nonprivate(arms: Mapping[str, Run]) -> list[Plot]:
    clip_norms = {run.privacy.get("l2_clip_norm") for run in arms.values()}
    clip_norm = clip_norms.pop() if len(clip_norms) == 1 else None
    return _present(
        _cosines(arms),
        _over_updates(arms, "nonprivate/loss", "training loss", "Mean loss of the sampled examples."),
        _over_updates(
            arms,
            "nonprivate/grad_norm",
            "gradient norm per example",
            "Mean l2 norm of the examples' gradients before clipping.",
            levels={"clip norm": clip_norm} if clip_norm is not None and np.isfinite(clip_norm) else None,
        ),
        _over_updates(
            arms,
            "nonprivate/clipped_fraction",
            "clipped examples",
            "Share of the sampled examples whose gradient was clipped.",
            percent=True,
        ),
        _over_updates(arms, "nonprivate/batch_size", "sampled examples", "Size of the Poisson sample."),
    )


def _cosines(arms: Mapping[str, Run]) -> Plot | None:
    lines = []
    for color, (label, run) in enumerate(arms.items()):
        noisy, denoised = (run.series(f"nonprivate/cosine_{kind}") for kind in ("noisy", "denoised"))
        if len(noisy.steps):
            lines.append(Line(f"{label}: noisy gradient", noisy, color, dashed=True))
        if len(denoised.steps) and not np.array_equal(noisy.values, denoised.values):
            lines.append(Line(f"{label}: denoised gradient", denoised, color))
    caption = "Cosine to the clean gradient, mean over the matrices: how much of its direction is left."
    return line_plot(lines, ylabel="cosine to the clean gradient", caption=caption) if lines else None


def _over_updates(
    arms: Mapping[str, Run],
    name: str,
    ylabel: str,
    caption: str,
    *,
    levels: Mapping[str, float] | None = None,
    percent: bool = False,
    skip_first: bool = False,
) -> Plot | None:
    lines = _lines(arms, lambda run: Series(*(a[1:] if skip_first else a for a in run.series(name))))
    if not lines:
        return None
    return line_plot(lines, ylabel=ylabel, caption=caption, levels=levels, percent=percent)


def _lines(arms: Mapping[str, Run], series: Callable[[Run], Series]) -> list[Line]:
    """A line for every arm that has data; an arm keeps its colour in all plots."""
    lines = [Line(label, series(run), color) for color, (label, run) in enumerate(arms.items())]
    return [line for line in lines if len(line.series.steps)]


def _over_matrices(run: Run, name: str, reduce: Callable[[np.ndarray], np.ndarray]) -> Series:
    """One number per update from all matrices of the run, over the updates that all of them have."""
    by_path = list(run.layer_series(name).values())
    if not by_path:
        return Series(np.zeros(0, int), np.zeros(0))
    steps = sorted(set.intersection(*(set(series.steps.tolist()) for series in by_path)))
    stacked = np.concatenate([series.values[:, np.isin(series.steps, steps)] for series in by_path])
    return Series(np.array(steps, int), reduce(stacked))


def _present(*plots: Plot | None) -> list[Plot]:
    return [plot for plot in plots if plot is not None]
