"""The learning rate of every arm of a config, by the training loss of a short run, on PUBLIC data.

For each arm, runs with rates around its own train for the first steps of the schedule, at the noise of the whole run.
While the best rate is the largest or the smallest tried, one further factor of 2 is tried. The best rate has the lowest
mean training loss over the last three of these steps. That needs no evaluation, but the loss of a batch is a private
value, and so is a choice by it. A config that switches nonprivate metrics off is therefore refused. All rates meet the
same samples and noise, which come from the config's seed. Interrupted runs go on.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from dp_rmt.finetuning import arms, assemble
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.workdir import claim_workdir
from dp_rmt.reporting.records import five_digits, write_record
from dp_rmt.training.metrics import read_metrics

FOR_PUBLIC_DATA = (
    "for public data: compares raw training losses, which no noise hides; on private data let a sweep repeat and select"
)
"""What the output, the record and the statement of every run say."""

LAST_STEPS = 3
"""The number of last steps whose losses are averaged."""


def best_rate(
    score: Callable[[float], float], centre: float, factors: Iterable[float]
) -> tuple[float, dict[float, float]]:
    """Tries the rates around a centre, and one further factor of 2 while the best is the largest or smallest.

    Args:
      score: trains at a rate and returns a score; higher is better, and a score that is not finite is the worst.
      centre: the rate in the middle, such as the customary one.
      factors: the first rates, as multiples of the centre.

    Returns:
      ``(best, every rate tried with its score)``.

    Raises:
      ValueError: no score is finite.

    >>> best_rate(lambda rate: -abs(rate - 4.0), 1.0, (1.0, 2.0))
    (4.0, {1.0: -3.0, 2.0: -2.0, 4.0: -0.0, 8.0: -4.0})
    """
    scores: dict[float, float] = {}
    wanted = [centre * factor for factor in sorted(factors)]
    while wanted:
        for rate in wanted:
            found = score(rate)
            scores[rate] = found if math.isfinite(found) else -math.inf
        if max(scores.values()) == -math.inf:
            raise ValueError(f"no learning rate of {', '.join(f'{rate:g}' for rate in scores)} gave a finite score")
        best = max(scores, key=lambda rate: scores[rate])
        wanted = [best * 2] * (best == max(scores)) + [best / 2] * (best == min(scores))
    return best, scores


def choose_rates(
    settings: Settings,
    *,
    workdir: Path,
    record: Path,
    factors: Sequence[float] = (0.5, 1.0, 2.0),
    steps: int = 6,
    names: Collection[str] | None = None,
) -> None:
    """Tries the rates of each arm, and writes their losses and the best.

    Args:
      settings: an experiment with arms.
      workdir: gets a folder for each run.
      record: a JSON file; arms that it already has are left alone.
      factors: the first rates, as multiples of each arm's own rate.
      steps: the number of steps of each run.
      names: arms to try; None for all.

    Raises:
      ValueError: an arm is unknown, or the settings do not allow nonprivate metrics.
    """
    every = arm_settings(settings)
    if unknown := set(names or ()) - set(every):
        raise ValueError(f"--arms: {min(unknown)!r} is none of the config's arms, {', '.join(every)}")
    if not all(arm.privacy.nonprivate_metrics for arm in every.values()):
        raise ValueError(
            "config.privacy.nonprivate_metrics=False, but rates are chosen by the loss of the training batches, "
            "which is private; on public data leave the key at True"
        )
    print(f"This is {FOR_PUBLIC_DATA}", flush=True)
    load_task = assemble.TaskLoader()
    for name in names or every:
        found = json.loads(record.read_text("utf-8")) if record.exists() else {}
        if name in found:
            continue

        def score(rate: float, name: str = name) -> float:
            loss = _loss(every[name], rate, load_task(every[name]), workdir / f"{name}_lr{rate:g}", steps)
            print(f"{name}, rate {rate:g}: loss {loss:.4f}", flush=True)
            return -loss

        best, scores = best_rate(score, every[name].train.learning_rate, factors)
        losses = {f"{rate:g}": five_digits([-scores[rate]])[0] for rate in sorted(scores)}
        found[name] = {"best": float(f"{best:g}"), "nonprivate/loss": losses, "steps": steps, "is": FOR_PUBLIC_DATA}
        write_record(record, found)


def _loss(settings: Settings, rate: float, task: assemble.Task, workdir: Path, steps: int) -> float:
    """Mean training loss over the last of the steps."""
    seeds = dict.fromkeys(("privacy.sampling_seed", "privacy.noise_seed"), settings.seed)  # the data is public
    settings = settings.changed({"train.learning_rate": rate, **seeds})
    claim_workdir(workdir, settings)
    task = dataclasses.replace(task, evaluations={})
    run = assemble.build_run(settings, task, name=workdir.name)
    about = dataclasses.replace(run.guarantee.about, compares_raw_losses=True)
    run = dataclasses.replace(run, guarantee=dataclasses.replace(run.guarantee, about=about))
    arms.train(arms.Arm(workdir.name, settings, workdir, task, run), until=steps)
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "nonprivate/loss" in line]
    last = [line["nonprivate/loss"] for line in lines if line["step"] <= steps][-LAST_STEPS:]
    return sum(last) / len(last)
