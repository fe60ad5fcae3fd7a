"""The SST-2 study: MiniLM with and without denoising at epsilon 8 and 3, the learning rate tuned for each arm.

    python -m experiments.sst2_study --config=configs/sst2_minilm.py --config.data.path=DIR --workdir=runs/sst2_study

For each arm every learning rate trains for the first --selection_steps of the run at epsilon 8 (same schedule, same
seeds); the one with the best accuracy there is trained to the end, and then used at epsilon 3. Every run resumes from
its checkpoint, and its record is written to --results as soon as it exists, so the study can be stopped and started at
will.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dp_rmt.training.metrics import read_metrics, write_atomically
from experiments import arms, assemble, command_line
from experiments.settings import arm_configs
from experiments.workdir import as_json, claim_workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment; use configs/sst2_minilm.py.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/sst2_study", "Folder of the runs.")
_RESULTS = flags.DEFINE_string("results", "experiments/results/sst2_minilm", "Folder of the records.")
_RATES = flags.DEFINE_multi_float("learning_rates", [2e-4, 5e-4, 1e-3], "Learning rates to choose from.")
_SELECTION_STEPS = flags.DEFINE_integer("selection_steps", 12, "Steps after which the learning rate is chosen.")
_ARMS = flags.DEFINE_list("arms", None, "Only these arms of the config, so that processes can share the work.")
_SEED = flags.DEFINE_integer("study_seed", 0, "Of sampling and noise, shared by all runs: the data is public.")


def main(argv: list[str]) -> None:
    """Runs what is missing of the study."""
    del argv
    config = _CONFIG.value
    task = assemble.load_task(next(iter(arm_configs(config).values())))
    best = {}
    for name in _ARMS.value or arm_configs(config):
        trials = {rate: _arm(config, task, name, rate, epsilon=8.0) for rate in _RATES.value}
        scores = {rate: _train(arm, until=_SELECTION_STEPS.value) for rate, arm in trials.items()}
        best[name] = max(scores, key=lambda rate: scores[rate])
        print(f"{name}: accuracy at step {_SELECTION_STEPS.value} {scores}; chosen {best[name]}", flush=True)
        _train(trials[best[name]])
    for name, rate in best.items():
        _train(_arm(config, task, name, rate, epsilon=3.0))


def _arm(config: ConfigDict, task: assemble.Task, name: str, rate: float, *, epsilon: float) -> arms.Arm:
    settings = ConfigDict(arm_configs(config)[name])
    settings.privacy.epsilon = epsilon
    settings.privacy.sampling_seed = settings.privacy.noise_seed = _SEED.value
    settings.optimizer.learning_rate = rate
    label = f"eps{epsilon:g}_{name}_lr{rate:g}_seed{_SEED.value}"
    workdir = Path(_WORKDIR.value) / label
    claim_workdir(workdir, settings)
    return arms.Arm(label, settings, workdir, task, assemble.build_run(settings, task, name=label))


def _train(arm: arms.Arm, *, until: int | None = None) -> float:
    """Trains as far as asked, writes the record, and returns the accuracy there."""
    until = until or arm.run.loop.mechanism.num_steps
    record = _record(arm)
    if record["steps"] < until:
        arms.train(arm, until=until)
        record = _record(arm)
        path = Path(_RESULTS.value) / f"{arm.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
    return dict(record["accuracy"])[until]


def _record(arm: arms.Arm) -> dict[str, Any]:
    """What a reader needs of a run: settings, accuracy curve, cosines, seconds per step."""
    path = arm.workdir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    mechanism = arm.run.loop.mechanism

    def curve(key: str) -> list[tuple[int, float]]:
        return [(line["step"], round(line[key], 5)) for line in lines if line.get(key) is not None]

    config = as_json(arm.config)
    config["data"] |= {"path": Path(arm.config.data.path or "").name, "cache_dir": None}  # folders of this machine
    return {
        "config": config,
        "epsilon": arm.config.privacy.epsilon,
        "delta": arm.run.delta,
        "noise_multiplier": mechanism.noise_multiplier,
        "seed": _SEED.value,
        "steps": max((line["step"] for line in lines), default=0),
        "steps_of_the_schedule": mechanism.num_steps,
        "accuracy": curve("eval/dev/accuracy"),
        "loss": curve("eval/dev/loss"),
        "epsilon_spent": curve("epsilon"),
        "nonprivate/cosine_noisy": curve("nonprivate/cosine_noisy"),
        "nonprivate/cosine_denoised": curve("nonprivate/cosine_denoised"),
        "seconds_per_step": curve("seconds"),
    }


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
