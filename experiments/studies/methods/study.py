"""The study of methods: every arm of a config at its own best learning rate, over seeds, epsilons and batch sizes.

    python -m experiments.studies.methods.study --config=configs/sst2_methods.py --config.data.path=DIR \\
        --workdir=runs/methods

For each batch size and arm, runs with learning rates around the arm's own train for the first --selection_steps of the
schedule, at the first epsilon and seed. While the best rate is the largest or the smallest tried, one further factor of
2 is tried. The best rate is trained to the end, with every seed and at every epsilon. All arms meet the same samples
and noise. Every run resumes from its checkpoint, and its record is written to --results as soon as it exists. The study
can therefore be stopped and started at will, and processes can share it by --arms.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from dp_rmt.finetuning import arms, assemble, command_line
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.rate_search import best_rate
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.workdir import as_json, claim_workdir
from dp_rmt.reporting.records import write_record
from dp_rmt.training.metrics import read_metrics
from dp_rmt.training.train import TrainLoop
from dp_rmt.training.train_state import TrainState
from dp_rmt.trees import merge_params
from dp_rmt.types import Params
from experiments.studies.methods.score import score_at, scored_split

_WORKDIR = flags.DEFINE_string("workdir", "runs/methods_study", "Folder of the runs.")
_RESULTS = flags.DEFINE_string("results", "experiments/studies/methods/results/sst2", "Folder of the records.")
_ARMS = flags.DEFINE_list("arms", None, "Only these arms of the config, so that processes can share the work.")
_FACTORS = flags.DEFINE_multi_float("factors", [0.5, 1.0, 2.0], "The first rates, as multiples of the arm's own.")
_SELECTION_STEPS = flags.DEFINE_integer("selection_steps", 12, "Steps after which the learning rate is chosen.")
_EPSILONS = flags.DEFINE_multi_float("epsilons", [8.0, 3.0], "The first chooses the learning rate.")
_BATCH_SIZES = flags.DEFINE_multi_integer("batch_sizes", [4096, 1024], "Expected batch sizes.")
_SEEDS = flags.DEFINE_multi_integer("seeds", [0, 1, 2], "For head, sampling, noise (public data); the first chooses.")
_EVAL_ROWS = flags.DEFINE_integer("eval_rows", None, "Evaluates on the first so many rows of each split; None: all.")


def main(settings: Settings, argv: list[str]) -> None:
    """Runs what is missing of the study."""
    del argv
    every = arm_settings(settings)
    for batch_size in _BATCH_SIZES.value:
        for name in _ARMS.value or every:
            train = functools.partial(_train, name, every[name], batch_size)
            rate = _best_rate(train, f"{name}, batch {batch_size}", every[name].train.learning_rate)
            for epsilon in _EPSILONS.value:
                for seed in _SEEDS.value:
                    train(epsilon, rate, seed)


def _best_rate(train: Callable[..., float], label: str, centre: float) -> float:
    """The learning rate with the best accuracy at --selection_steps; a smaller and a larger one were tried, too."""
    epsilon, seed, until = _EPSILONS.value[0], _SEEDS.value[0], _SELECTION_STEPS.value
    best, scores = best_rate(lambda rate: train(epsilon, rate, seed, until=until), centre, _FACTORS.value)
    print(f"{label}: accuracy at step {until} {scores}; chosen {best:g}", flush=True)
    return best


def _train(
    name: str,
    settings: Settings,
    batch_size: int,
    epsilon: float,
    rate: float,
    seed: int,
    *,
    until: int | None = None,
) -> float:
    """Trains as far as asked and writes the record, unless that was done before; returns the accuracy reached."""
    label = f"b{batch_size}_eps{epsilon:g}_{name}_lr{rate:g}_seed{seed}"
    path = Path(_RESULTS.value) / f"{label}.json"
    record: dict[str, Any] = {"steps": -1, "steps_of_the_schedule": 0}
    if path.exists():
        record = json.loads(path.read_text())
    if record["steps"] < (until or max(1, record["steps_of_the_schedule"])):
        arm = _arm(label, settings, batch_size, epsilon, rate, seed)
        arm.run.train(arm.workdir, until=until)
        record = _record(arm, name, seed)
        write_record(path, record)
    return score_at(record, until or record["steps_of_the_schedule"])


def _arm(label: str, settings: Settings, batch_size: int, epsilon: float, rate: float, seed: int) -> arms.Arm:
    settings = settings.changed(
        {
            **dict.fromkeys(("seed", "privacy.sampling_seed", "privacy.noise_seed"), seed),
            "privacy.epsilon": epsilon,
            "privacy.expected_batch_size": batch_size,
            "train.learning_rate": rate,
        }
    )
    workdir = Path(_WORKDIR.value) / label
    claim_workdir(workdir, settings)
    task = _load_task(settings)
    if (rows := _EVAL_ROWS.value) is not None:
        some = {split: {k: x[:rows] for k, x in arrays.items()} for split, arrays in task.evaluations.items()}
        task = dataclasses.replace(task, evaluations=some)
    run = assemble.build_run(settings, task, name=label)
    if settings.train.average_iterates is not None:
        run = dataclasses.replace(run, loop=_evaluated_twice(run.loop))
    return arms.Arm(label, settings, workdir, task, run)


def _evaluated_twice(loop: TrainLoop) -> TrainLoop:
    """The loop of a run that publishes its averaged iterate, which is evaluated at its last one, too."""

    def both(state: TrainState) -> tuple[Params, Params]:
        return loop.published_params(state), merge_params(state.params, state.frozen)

    evaluators = {}
    for name, evaluate in loop.evaluators.items():
        evaluators[name] = lambda pair, evaluate=evaluate: evaluate(pair[0])
        evaluators[f"{name}_last_iterate"] = lambda pair, evaluate=evaluate: evaluate(pair[1])
    return dataclasses.replace(loop, published_params=both, evaluators=evaluators)


_load_task = assemble.TaskLoader()


def _record(arm: arms.Arm, name: str, seed: int) -> dict[str, Any]:
    """The record of a run: settings, privacy, curves of accuracy and loss, cosines, seconds per step."""
    split = scored_split(arm.task.evaluations)
    lines = read_metrics(arm.workdir / "metrics.jsonl")
    mechanism = arm.run.loop.mechanism

    def curve(key: str) -> list[tuple[int, float]]:
        return [(line["step"], round(line[key], 5)) for line in lines if line.get(key) is not None]

    config = as_json(arm.settings)
    # Folders of this machine are left out.
    config["data"] |= {"path": Path(arm.settings.data.path or "").name, "cache_dir": None}
    if not arm.settings.model.path.startswith("package:"):
        config["model"] |= {"path": Path(arm.settings.model.path).name}
    return {
        "arm": name,
        "config": config,
        "epsilon": arm.settings.privacy.epsilon,
        "delta": arm.run.delta,
        "noise_multiplier": mechanism.noise_multiplier,
        "seed": seed,
        "steps": max((line["step"] for line in lines), default=0),
        "steps_of_the_schedule": mechanism.num_steps,
        "accuracy": curve(f"eval/{split}/accuracy"),
        "loss": curve(f"eval/{split}/loss"),
        "accuracy_of_last_iterate": curve(f"eval/{split}_last_iterate/accuracy"),
        "advice/slope": curve("advice/slope"),
        "advice/top_over_edge": curve("advice/top_over_edge"),
        "loss_of_last_iterate": curve(f"eval/{split}_last_iterate/loss"),
        **{f"nonprivate/{x}": curve(f"nonprivate/{x}") for x in ("loss", "grad_norm", "clipped_fraction")},
        "epsilon_spent": curve("epsilon"),
        **{f"nonprivate/cosine_{x}": curve(f"nonprivate/cosine_{x}") for x in ("noisy", "denoised", "update")},
        "seconds_per_step": curve("seconds"),
    }


if __name__ == "__main__":
    command_line.run_with_settings(main)
