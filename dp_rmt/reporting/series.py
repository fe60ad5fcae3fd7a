"""What a report shows, as numbers: series over the updates of a run, and the comparison of runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dp_rmt.reporting.numbers import Rounding, number


class Series(NamedTuple):
    """A value over the updates of a run.

    Attributes:
      steps: (T,), updates done, ascending, each once.
      values: (T,) for one number, (layers, T) for one number per stacked layer.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or unfinished run: one arm of a report.

    Attributes:
      metrics: lines of `metrics.jsonl`, each with its `step`; any metric may be missing.
      config: content of `config.json`.
      privacy: content of `privacy.json`.
      title: how the report calls it; None for the name it is given under.
      texts: some of what the model wrote, each with ``source`` and ``text``; the same sources for all runs.
    """

    metrics: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    privacy: Mapping[str, Any]
    title: str | None = None
    texts: Sequence[Mapping[str, Any]] = ()

    def series(self, name: str) -> Series:
        """The finite values of a metric that is a number; where a step was written twice, the last value counts."""
        found = {line["step"]: line[name] for line in self.metrics if line.get(name) is not None}
        steps = np.array(sorted(found), dtype=int)
        values = np.array([found[step] for step in steps.tolist()], dtype=float)
        return Series(steps[np.isfinite(values)], values[np.isfinite(values)])

    def layer_series(self, name: str) -> dict[str, Series]:
        """A metric that maps parameter paths to one number per stacked layer; null becomes NaN.

        Returns:
          path -> `Series` with values (layers, T), in the order of the metrics file.
        """
        found: dict[str, dict[int, np.ndarray]] = {}
        for line in self.metrics:
            for path, values in (line.get(name) or {}).items():
                found.setdefault(path, {})[line["step"]] = np.atleast_1d(np.array(values, dtype=float))
        return {
            path: Series(np.array(sorted(steps)), np.stack([steps[step] for step in sorted(steps)], axis=1))
            for path, steps in found.items()
        }

    @property
    def last_step(self) -> int:
        """The number of updates that the metrics file knows of."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def nonprivate_names(self) -> list[str]:
        """Metrics computed from raw private values."""
        return metric_names([self], "nonprivate/")


def metric_names(runs: Sequence[Run], prefix: str) -> list[str]:
    """Names of metrics that begin with a prefix, in the order of their first appearance."""
    lines = (line for run in runs for line in run.metrics)
    return list(dict.fromkeys(name for line in lines for name in line if name.startswith(prefix)))


def is_loss(name: str) -> bool:
    """Whether lower is better."""
    return name.rsplit("/", 1)[-1] in ("loss", "perplexity")


def main_scores(runs: Sequence[Run]) -> list[str]:
    """One metric for each evaluation set: accuracy if there is one, else the first that is not a loss."""
    names = metric_names(runs, "eval/")
    by_set: dict[str, list[str]] = {}
    for name in names:
        by_set.setdefault(name.rsplit("/", 1)[0], []).append(name)

    def rank(name: str) -> tuple[bool, bool]:
        return is_loss(name), not name.endswith("/accuracy")

    return [min(group, key=rank) for group in by_set.values()]


def score_label(name: str) -> str:
    """`eval/dev_matched/accuracy` in words.

    >>> score_label("eval/dev_matched/accuracy")
    'accuracy on dev_matched'
    """
    _, *data, metric = name.split("/")
    return f"{metric} on {'/'.join(data)}" if data else metric


def score_text(name: str, value: float) -> str:
    """A score for people: accuracy in percent with two decimals, other scores with four."""
    return f"{100 * value:.2f}%" if name.endswith("/accuracy") else f"{value:.4f}"


def labels(runs: Mapping[str, Run]) -> list[str]:
    """How the arms are called."""
    return [run.title or name for name, run in runs.items()]


def headline(runs: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """The table on top of the report: one row per run.

    Returns:
      `(header, rows)`, as text.
    """
    scores = main_scores(list(runs.values()))
    header = ["arm"]
    for name in scores:
        header += [f"final {score_label(name)}", "best (at update)"]
    header += ["ε", "δ", "updates", "noise multiplier", "batch", "training time"]
    rows = []
    for label, run in zip(labels(runs), runs.values()):
        row = [label]
        for name in scores:
            row += _final_and_best(name, run.series(name))
        row += [_epsilon(run), _delta(run), f"{run.last_step:,}"]
        row += [_privacy_number(run, "noise_multiplier"), _privacy_number(run, "expected_batch_size")]
        rows.append([*row, duration(float(np.sum(run.series("seconds").values)))])
    return header, rows


def findings(runs: Mapping[str, Run]) -> list[str]:
    """Sentences that compare the runs: where each ends, and how soon it reaches the weakest run's final score."""
    sentences = []
    for name in main_scores(list(runs.values())):
        curves = {label: run.series(name) for label, run in zip(labels(runs), runs.values())}
        curves = {label: curve for label, curve in curves.items() if len(curve.steps) > 1}
        if is_loss(name) or len(curves) < 2:
            continue
        weakest = min(curves, key=lambda label: curves[label].values[-1])
        target = curves[weakest].values[-1]
        for label, curve in curves.items():
            if label == weakest:
                continue
            first = curve.steps[np.argmax(curve.values >= target)]
            sentences.append(
                f"**{label}** ends at {score_text(name, curve.values[-1])} {score_label(name)}, "
                f"**{weakest}** at {score_text(name, target)}; {label} is there after {first:,} of "
                f"{curve.steps[-1]:,} updates."
            )
    return sentences


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(12.34), duration(200), duration(3720), duration(0)
    ('12.3 s', '3 min 20 s', '1 h 02 min', '–')
    """
    if seconds <= 0:
        return "–"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _final_and_best(name: str, curve: Series) -> list[str]:
    if not len(curve.steps):
        return ["–", "–"]
    best = np.argmin(curve.values) if is_loss(name) else np.argmax(curve.values)
    return [
        score_text(name, curve.values[-1]),
        f"{score_text(name, curve.values[best])} ({curve.steps[best]:,})",
    ]


def _epsilon(run: Run) -> str:
    epsilon = run.privacy.get("epsilon")
    return "not private" if epsilon is None else number(epsilon, "up")


def _delta(run: Run) -> str:
    return "–" if run.privacy.get("epsilon") is None else _privacy_number(run, "delta", "up")


def _privacy_number(run: Run, name: str, rounding: Rounding = "nearest") -> str:
    value = run.privacy.get(name)
    return "–" if value is None else number(value, rounding)
