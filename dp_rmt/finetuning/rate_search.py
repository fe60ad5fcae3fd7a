"""The learning rate of every arm of a config, by the training loss of a short run, on PUBLIC data.

For each arm, rates around its own train for the first steps of the schedule, at the noise of the whole run; while the
best is the largest or the smallest tried, one further factor of 2 is tried. A rate is as good as its mean training loss
over the last three of these steps is low. That costs no evaluation, but the loss of a batch is a private value, and
what is chosen by it too: a config that switches nonprivate metrics off is refused. All rates meet the same samples and
noise, those of the config's seed. Interrupted runs go on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_rmt.finetuning import arms, assemble
from dp_rmt.finetuning.workdir import claim_workdir
from dp_rmt.reporting.records import five_digits, write_record
from dp_rmt.training.metrics import read_metrics

LAST_STEPS = 3
"""Whose losses are averaged."""


def best_rate(
    score: Callable[[float], float], centre: float, factors: Iterable[float]
) -> tuple[float, dict[float, float]]:
    """Tries the rates around a centre; while the best is the largest or smallest, one further factor of 2.

    Args:
      score: trains at a rate and tells how good that was; more is better, and what is not finite is the worst.
      centre: of the rates, such as what is customary.
      factors: of the centre, to begin with.

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
    configs: Mapping[str, Any],
    *,
    workdir: Path,
    record: Path,
    factors: Sequence[float] = (0.5, 1.0, 2.0),
    steps: int = 6,
    names: Collection[str] | None = None,
) -> None:
    """Writes the losses of every rate, and the best, arm by arm.

    Args:
      configs: arm -> its config.
      workdir: gets a folder for each run.
      record: JSON file; arms that it has are left alone.
      factors: of each arm's own rate, to begin with.
      steps: of each run.
      names: arms to try; None for all.

    Raises:
      ValueError: an arm is unknown, or a config allows no value of the private batch to be looked at.
    """
    if unknown := set(names or ()) - set(configs):
        raise ValueError(f"--arms: {min(unknown)!r} is none of the config's arms, {', '.join(configs)}")
    if not all(config.privacy.nonprivate_metrics for config in configs.values()):
        raise ValueError(
            "config.privacy.nonprivate_metrics=False, but rates are chosen by the loss of the training batches, "
            "which is private; on public data leave the key at True"
        )
    load_task = assemble.TaskLoader()
    for name in names or configs:
        found = json.loads(record.read_text("utf-8")) if record.exists() else {}
        if name in found:
            continue

        def score(rate: float, name: str = name) -> float:
            loss = _loss(configs[name], rate, load_task(configs[name]), workdir / f"{name}_lr{rate:g}", steps)
            print(f"{name}, rate {rate:g}: loss {loss:.4f}", flush=True)
            return -loss

        best, scores = best_rate(score, configs[name].optimizer.learning_rate, factors)
        losses = {f"{rate:g}": five_digits([-scores[rate]])[0] for rate in sorted(scores)}
        found[name] = {"best": float(f"{best:g}"), "nonprivate/loss": losses, "steps": steps}
        write_record(record, found)


def _loss(settings: Any, rate: float, task: assemble.Task, workdir: Path, steps: int) -> float:
    """Mean training loss over the last of the steps."""
    config = copy.deepcopy(settings)
    config.optimizer.learning_rate = rate
    config.privacy.sampling_seed = config.privacy.noise_seed = config.seed  # the data is public
    claim_workdir(workdir, config)
    task = dataclasses.replace(task, evaluations={})
    run = assemble.build_run(config, task, name=workdir.name)
    arms.train(arms.Arm(workdir.name, config, workdir, task, run), until=steps)
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "nonprivate/loss" in line]
    last = [line["nonprivate/loss"] for line in lines if line["step"] <= steps][-LAST_STEPS:]
    return sum(last) / len(last)
