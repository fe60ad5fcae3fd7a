"""The privacy-utility-efficiency study: every arm of a config, over seeds, on PUBLIC data (arXiv 2502.13313).

    python -m experiments.memorisation_study --config=configs/customersim_stories260k.py --config.data.path=DIR
        --config.model.path=DIR --workdir=runs/customersim
    python -m experiments.memorisation_table     the table and the picture, from the records

Trains what is not done yet and writes a record for each run: privacy (fall of the loss on sensitive tokens of training
data, its control on test data, membership, canary exposure), utility (loss on the other tokens of test data) and cost.
Interrupted runs resume from their checkpoints. `--rates` trains each arm of --arms at these learning rates instead, for
the first seed, and prints the loss on dev.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from dp_rmt.data import Document, load_documents
from dp_rmt.training.losses import Losses, token_losses
from dp_rmt.training.metrics import read_metrics
from dp_rmt.training.privacy_statement import read_privacy
from dp_rmt.types import Params
from experiments import arms, assemble, command_line, machine
from experiments import memorisation_measures as measures
from experiments.gradient_stream import write_record
from experiments.settings import arm_configs
from experiments.task import Arrays, Task
from experiments.workdir import as_json, claim_workdir

DEV_DOCUMENTS = 100
"""Of dev, looked at before and after each run."""

_CONFIG = config_flags.DEFINE_config_file("config", None, "The arms; use configs/customersim_stories260k.py.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/customersim", "Folder of the runs.")
_RESULTS = flags.DEFINE_string("results", "experiments/results/customersim", "Folder of the records.")
_ARMS = flags.DEFINE_list("arms", None, "Only these arms of the config.")
_EPSILONS = flags.DEFINE_multi_float("epsilons", [8.0, 3.0], "Of the private arms.")
_SEEDS = flags.DEFINE_multi_integer("seeds", [0, 1, 2], "Of LoRA, sampling and noise (public data).")
_RATES = flags.DEFINE_multi_float("rates", [], "Learning rates to try; no records are written.")
_SECRETS = flags.DEFINE_integer("secrets", 5000, "Random secrets that a canary is compared with.", lower_bound=100)


def main(argv: list[str]) -> None:
    """Runs what is missing."""
    del argv
    try:
        chosen = {name: settings for name, settings in arm_configs(_CONFIG.value).items() if _is_wanted(name)}
        jax.config.update("jax_compilation_cache_dir", str(Path(_WORKDIR.value).absolute() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        for epsilon in _EPSILONS.value:
            for seed in _SEEDS.value:
                for name, settings in chosen.items():
                    _run(name, settings, epsilon, seed)
    except (ValueError, OSError, ImportError) as error:
        command_line.stop(error)


def _is_wanted(name: str) -> bool:
    return _ARMS.value is None or name in _ARMS.value


def _run(name: str, settings: ConfigDict, epsilon: float, seed: int) -> None:
    """One run and its record, unless it is there; an arm without noise has no second epsilon."""
    is_private = math.isfinite(settings.privacy.epsilon)
    if not is_private and epsilon != _EPSILONS.value[0]:
        return
    label = f"{name}{f'_eps{epsilon:g}' * is_private}_seed{seed}"
    config = ConfigDict(settings)
    config.seed = config.privacy.sampling_seed = config.privacy.noise_seed = seed
    if is_private:
        config.privacy.epsilon = epsilon
    if _RATES.value:
        if (epsilon, seed) == (_EPSILONS.value[0], _SEEDS.value[0]):
            for rate in _RATES.value:
                config.optimizer.learning_rate = rate
                arm = _trained(f"{label}_lr{rate:g}", config)
                print(f"{label}, rate {rate:g}: loss on dev {_dev_losses(arm)}", flush=True)
        return
    path = Path(_RESULTS.value) / f"{label}.json"
    if not path.exists():
        arm = _trained(label, config)
        write_record(path, _record(arm, name, seed))
        print(f"{label}: loss on dev {_dev_losses(arm)}", flush=True)


def _trained(label: str, config: ConfigDict) -> arms.Arm:
    workdir = Path(_WORKDIR.value) / label
    claim_workdir(workdir, config)
    task = _task(str((config.data, config.model, config.seed)), config)
    dev = {name: rows[:DEV_DOCUMENTS] for name, rows in task.evaluations["dev"].items()}
    run = assemble.build_run(config, dataclasses.replace(task, evaluations={"dev": dev}), name=label)
    arm = arms.Arm(label, config, workdir, task, run)
    arms.train(arm)
    return arm


def _record(arm: arms.Arm, name: str, seed: int) -> dict[str, Any]:
    """All that is measured of a trained arm."""
    task, config = arm.task, arm.config
    params, losses = arms.trained_params(arm), _token_losses(task.module)
    arrays = {"train": task.train, "test": task.evaluations["test"]}
    tuned = _losses(losses, params, arrays, config)
    shared = str((config.data, config.model.path))
    if shared not in _BASE:  # new low-rank updates are zero, so it is the same for all arms
        _BASE[shared] = _losses(losses, task.params, arrays, config)
    base, canaries = _BASE[shared], _canaries(config)
    return {
        "arm": name,
        "seed": seed,
        "config": _without_folders(config),
        "privacy": read_privacy(arm.workdir),
        "steps": arm.run.loop.mechanism.num_steps,
        "examples": {"train": len(base["train"]) - len(canaries), "canaries": len(canaries), "test": len(base["test"])},
        "nonprivate": measures.privacy_of(base, tuned, arrays, num_canaries=len(canaries)),
        "canaries": measures.canary_exposure(
            losses, params, canaries, task.tokenizer, num_secrets=_SECRETS.value, batch_size=500
        ),
        "utility": measures.utility_of(tuned["test"], arrays["test"]),
        "utility_base": measures.utility_of(base["test"], arrays["test"]),
        "cost": measures.cost_of_step(arm.run) | {"seconds_per_step": _seconds(arm)},
        "machine": machine.description(),
    }


def _losses(losses: Losses, params: Params, arrays: dict[str, Arrays], config: ConfigDict) -> dict[str, np.ndarray]:
    size = config.train.eval_batch_size
    return {split: measures.losses_by_token(losses, params, rows, batch_size=size) for split, rows in arrays.items()}


@functools.lru_cache(maxsize=1)
def _token_losses(module: Any) -> Any:
    return jax.jit(token_losses(module))


def _task(key: str, config: ConfigDict) -> Task:
    if key not in _TASKS:
        _TASKS.clear()
        _TASKS[key] = assemble.load_task(config)
    return _TASKS[key]


_TASKS: dict[str, Task] = {}
_BASE: dict[str, dict[str, np.ndarray]] = {}


def _canaries(config: ConfigDict) -> list[Document]:
    data = config.data
    documents = load_documents(data.task, path=data.path, sensitive=data.sensitive, max_train_examples=1)
    return [document for document in documents.train if document.is_canary]


def _without_folders(config: ConfigDict) -> dict[str, Any]:
    values = as_json(config)
    values["data"] |= {"path": None, "cache_dir": None}
    values["model"] |= {"path": Path(config.model.path).name}
    return values


def _dev_losses(arm: arms.Arm) -> list[float]:
    lines = read_metrics(arm.workdir / "metrics.jsonl")
    return [round(line["eval/dev/loss"], 4) for line in lines if "eval/dev/loss" in line]


def _seconds(arm: arms.Arm) -> float:
    """Of the quicker half of the steps, since other jobs share the machine."""
    seconds = sorted(line["seconds"] for line in read_metrics(arm.workdir / "metrics.jsonl") if "seconds" in line)
    return round(statistics.median(seconds[: max(1, len(seconds) // 2)]), 3)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
