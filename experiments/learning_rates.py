"""The learning rate of every arm of a config, by the training loss of a short run, on PUBLIC data.

    python -m experiments.learning_rates --config=configs/e2e_stories260k.py --config.data.path=DIR
        --config.model.path=DIR --workdir=runs/e2e_rates --record=experiments/studies/learning_rates/results/e2e.json

For each arm, rates around its own train for the first --steps of the schedule, at the noise of the whole run; while the
best is the largest or the smallest tried, one further factor of 2 is tried. A rate is as good as its mean training loss
over the last three of these steps is low. That costs no evaluation, but the loss of a batch is a private value, and
what is chosen by it too: a config that switches nonprivate metrics off is refused. All rates meet the same samples and
noise, those of the config's seed. Interrupted runs go on.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dp_rmt.finetuning import arms, assemble, command_line
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.rate_search import best_rate
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.workdir import claim_workdir
from dp_rmt.reporting.records import five_digits, write_record
from dp_rmt.training.metrics import read_metrics

LAST_STEPS = 3
"""Whose losses are averaged."""


def main(argv: list[str]) -> None:
    """Chooses the rate of every arm that the record does not have yet."""
    del argv
    values = flags.FLAGS
    try:
        choose_rates(
            values.config,
            names=values.arms,
            workdir=Path(values.workdir),
            record=Path(values.record),
            factors=values.factors,
            steps=values.steps,
        )
    except (ValueError, OSError) as error:
        command_line.stop(error)


def choose_rates(
    settings: Settings, *, names: list[str] | None, workdir: Path, record: Path, factors: list[float], steps: int
) -> None:
    """Writes the losses of every rate, and the best, arm by arm.

    Args:
      settings: with arms.
      names: arms to try; None for all.
      workdir: gets a folder for each run.
      record: JSON file; arms that it has are left alone.
      factors: of each arm's own rate.
      steps: of each run.

    Raises:
      ValueError: an arm is unknown, or the config allows no value of the private batch to be looked at.
    """
    every = arm_settings(settings)
    if unknown := set(names or ()) - set(every):
        raise ValueError(f"--arms: {min(unknown)!r} is none of the config's arms, {', '.join(every)}")
    if not settings.privacy.nonprivate_metrics:
        raise ValueError(
            "config.privacy.nonprivate_metrics=False, but rates are chosen by the loss of the training batches, "
            "which is private; on public data leave the key at True"
        )
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
        found[name] = {"best": float(f"{best:g}"), "nonprivate/loss": losses, "steps": steps}
        write_record(record, found)


def _loss(settings: Settings, rate: float, task: assemble.Task, workdir: Path, steps: int) -> float:
    """Mean training loss over the last of the steps."""
    seeds = dict.fromkeys(("privacy.sampling_seed", "privacy.noise_seed"), settings.seed)  # the data is public
    settings = settings.changed({"train.learning_rate": rate, **seeds})
    claim_workdir(workdir, settings)
    task = dataclasses.replace(task, evaluations={})
    run = assemble.build_run(settings, task, name=workdir.name)
    arms.train(arms.Arm(workdir.name, settings, workdir, task, run), until=steps)
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "nonprivate/loss" in line]
    last = [line["nonprivate/loss"] for line in lines if line["step"] <= steps][-LAST_STEPS:]
    return sum(last) / len(last)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The arms.")
    flags.DEFINE_string("workdir", "runs/learning_rates", "Folder of the runs.")
    flags.DEFINE_string("record", None, "JSON file of what was found.")
    flags.DEFINE_list("arms", None, "Only these arms of the config.")
    flags.DEFINE_multi_float("factors", [0.5, 1.0, 2.0], "Of the arm's learning rate, to begin with.")
    flags.DEFINE_integer("steps", 6, "Of each run.")
    flags.mark_flags_as_required(["config", "record"])
    command_line.run(main)
