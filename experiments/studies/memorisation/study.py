"""The privacy-utility-efficiency study: every arm of a config, over seeds, on PUBLIC data (arXiv 2502.13313).

    python -m experiments.studies.memorisation.study --config=configs/customersim_stories260k.py --config.data.path=DIR
        --config.model.path=DIR --workdir=runs/customersim
    python -m experiments.studies.memorisation.table     the table and the picture, from the records

The study trains what is not done yet and writes a record for each run. A record has privacy (fall of the loss on
sensitive tokens of training data, its control on test data, membership, canary exposure), utility (loss on the other
tokens of test data) and cost. Interrupted runs resume from their checkpoints. `--costs` measures the cost of each arm's
step again, and puts it into the records that are there. `--rates` instead trains each arm at these learning rates, at
the first epsilon with the first seed, and adds the loss on dev to --rates_record, with the best rate.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dp_rmt.data import Document
from dp_rmt.finetuning import arms, assemble, command_line, statements
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.documents import read_documents_of
from dp_rmt.finetuning.tasks.task import Arrays
from dp_rmt.finetuning.workdir import as_json, claim_workdir
from dp_rmt.reporting import machine
from dp_rmt.reporting.records import write_record
from dp_rmt.training.losses import Losses, token_losses
from dp_rmt.training.metrics import read_metrics
from dp_rmt.types import Params
from experiments.studies.memorisation import measures

DEV_DOCUMENTS = 100
"""The number of documents of dev on which each run is evaluated."""


class Study:
    """Arms that share their data; tokenised data and the losses of the base model are kept between runs."""

    def __init__(
        self, settings: Settings, *, workdir: Path, num_secrets: int, names: Sequence[str] | None = None
    ) -> None:
        """Reads the documents, so that mistakes in them are found first.

        Args:
          settings: settings with arms, such as those of `configs.customersim_stories260k`.
          workdir: gets a folder for each run.
          num_secrets: number of random secrets that a canary is compared with.
          names: arms to train, in this order; None for all.
        """
        every = arm_settings(settings)
        if unknown := set(names or ()) - set(every):
            raise ValueError(f"--arms: {min(unknown)!r} is none of the config's arms, {', '.join(every)}")
        self.arms = {name: every[name] for name in names or every}
        self._workdir, self._num_secrets = workdir, num_secrets
        first = next(iter(self.arms.values()))
        if any(settings.data != first.data for settings in self.arms.values()):
            raise ValueError("config.arms: the arms of this study share their data; leave 'data' out of them")
        self._canaries: list[Document] = [
            row for row in read_documents_of(first.data, first.data.path).train if row.is_canary
        ]
        self._load_task = assemble.TaskLoader()
        self._base: dict[str, np.ndarray] = {}

    def arm(self, label: str, settings: Settings) -> arms.Arm:
        """An arm with these settings, ready to train."""
        task = self._load_task(settings)
        dev = {name: rows[:DEV_DOCUMENTS] for name, rows in task.evaluations["dev"].items()}
        run = assemble.build_run(settings, dataclasses.replace(task, evaluations={"dev": dev}), name=label)
        return arms.Arm(label, settings, self._workdir / label, task, run)

    def train(self, label: str, settings: Settings) -> arms.Arm:
        """Trains to the end, or goes on where an earlier call stopped."""
        claim_workdir(self._workdir / label, settings)
        arm = self.arm(label, settings)
        arms.train(arm)
        return arm

    def record(self, arm: arms.Arm, name: str, seed: int) -> dict[str, Any]:
        """The record of a trained arm, with all measurements."""
        task, settings = arm.task, arm.settings
        state, losses = arms.trained_state(arm), _compiled(task.module)
        params = arm.run.published_params(state)
        arrays = {"train": task.train, "test": task.evaluations["test"]}
        tuned = _losses(losses, params, arrays, settings)
        self._base = self._base or _losses(losses, task.params, arrays, settings)  # new low-rank updates are zero
        canaries = self._canaries
        return {
            "arm": name,
            "seed": seed,
            "config": _without_folders(settings),
            "privacy": statements.privacy_record(arm.workdir),
            "steps": int(state.step),
            "examples": {
                "train": task.num_examples - len(canaries),
                "canaries": len(canaries),
                "test": len(tuned["test"]),
            },
            "nonprivate": measures.privacy_of(self._base, tuned, arrays, num_canaries=len(canaries)),
            "canaries": measures.canary_exposure(
                losses, params, canaries, task.tokenizer, num_secrets=self._num_secrets, batch_size=500
            ),
            "utility": measures.utility_of(tuned["test"], arrays["test"]),
            "utility_base": measures.utility_of(self._base["test"], arrays["test"]),
            "cost": measures.cost_of_step(arm.run, state),  # uses the state up
            "machine": machine.description(),
        }


def run_settings(settings: Settings, epsilon: float, seed: int) -> Settings:
    """The settings of one run; the seed is also that of sampling and noise, because the data is public."""
    seeded = settings.changed(dict.fromkeys(("seed", "privacy.sampling_seed", "privacy.noise_seed"), seed))
    return seeded.changed({"privacy.epsilon": epsilon}) if math.isfinite(settings.privacy.epsilon) else seeded


def run_all(study: Study, results: Path, *, epsilons: Sequence[float], seeds: Sequence[int]) -> None:
    """Runs every arm, seed and epsilon that has no record yet; arms without noise run once for all epsilons."""
    for epsilon in epsilons:
        for seed in seeds:
            for name, settings in study.arms.items():
                path = results / f"{_label(name, settings, epsilon, seed)}.json"
                if path.exists():
                    continue
                arm = study.train(path.stem, run_settings(settings, epsilon, seed))
                write_record(path, study.record(arm, name, seed))
                print(f"{path.stem}: loss on dev {_dev_losses(arm)}", flush=True)


def measure_costs(study: Study, results: Path, *, epsilons: Sequence[float], seeds: Sequence[int]) -> None:
    """Measures the cost of a step once for every arm, and puts it into the arm's records."""
    for name, settings in study.arms.items():
        labels = [_label(name, settings, epsilon, seed) for epsilon in epsilons for seed in seeds]
        paths = [path for label in dict.fromkeys(labels) if (path := results / f"{label}.json").exists()]
        if paths:
            run = study.arm(name, run_settings(settings, epsilons[0], seeds[0])).run
            cost = measures.cost_of_step(run, run.state)
        for path in paths:
            write_record(path, json.loads(path.read_text("utf-8")) | {"cost": cost, "machine": machine.description()})


def try_rates(study: Study, rates: Sequence[float], record: Path, *, epsilon: float, seed: int) -> None:
    """Adds the loss on dev of every arm at every learning rate to the record, and says which is the lowest."""
    for name, settings in study.arms.items():
        for rate in rates:
            tried = run_settings(settings, epsilon, seed).changed({"train.learning_rate": rate})
            arm = study.train(f"{name}_eps{tried.privacy.epsilon:g}_seed{seed}_lr{rate:g}", tried)
            found = json.loads(record.read_text("utf-8")) if record.exists() else {}
            losses = found.get(name, {}).get("loss on dev", {}) | {f"{rate:g}": _dev_losses(arm)[-1]}
            best = min(losses, key=lambda rate: losses[rate])
            found[name] = {"best": float(best), "loss on dev": dict(sorted(losses.items(), key=lambda x: float(x[0])))}
            write_record(record, found)
            print(f"{name}, rate {rate:g}: loss on dev {losses[f'{rate:g}']}", flush=True)


def main(settings: Settings, argv: list[str]) -> None:
    """Runs what is missing; mistakes in the input end it with one clear line."""
    del argv
    values = flags.FLAGS
    workdir = Path(values.workdir)
    # A step is compiled once for all seeds, and once more to be measured.
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
    try:
        study = Study(settings, workdir=workdir, num_secrets=values.secrets, names=values.arms)
        if values.rates:
            try_rates(study, values.rates, Path(values.rates_record), epsilon=values.epsilons[0], seed=values.seeds[0])
        else:
            work = measure_costs if values.costs else run_all
            work(study, Path(values.results), epsilons=values.epsilons, seeds=values.seeds)
    except (ValueError, OSError, ImportError) as error:
        command_line.stop(error)


def _label(name: str, settings: Settings, epsilon: float, seed: int) -> str:
    return f"{name}{f'_eps{epsilon:g}' * math.isfinite(settings.privacy.epsilon)}_seed{seed}"


def _losses(losses: Losses, params: Params, arrays: dict[str, Arrays], settings: Settings) -> dict[str, np.ndarray]:
    size = settings.train.eval_batch_size
    return {split: measures.losses_by_token(losses, params, rows, batch_size=size) for split, rows in arrays.items()}


@functools.lru_cache(maxsize=1)
def _compiled(module: Any) -> Any:
    return jax.jit(token_losses(module))


def _without_folders(settings: Settings) -> dict[str, Any]:
    values = as_json(settings)
    values["data"] |= {"path": None, "cache_dir": None}
    values["model"] |= {"path": Path(settings.model.path).name}
    return values


def _dev_losses(arm: arms.Arm) -> list[float]:
    lines = read_metrics(arm.workdir / "metrics.jsonl")
    return [round(line["eval/dev/loss"], 4) for line in lines if "eval/dev/loss" in line]


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/customersim", "Folder of the runs.")
    flags.DEFINE_string("results", "experiments/studies/memorisation/results", "Folder of the records.")
    flags.DEFINE_list("arms", None, "Only these arms of the config, in this order.")
    flags.DEFINE_multi_float("epsilons", [8.0], "Epsilons of the private arms.")
    flags.DEFINE_multi_integer("seeds", [0, 1, 2], "Seeds of LoRA, sampling and noise (public data).")
    flags.DEFINE_multi_float("rates", [], "Learning rates to try, instead of the study.")
    flags.DEFINE_string(
        "rates_record",
        "experiments/studies/learning_rates/results/customersim.json",
        "The file to which --rates adds its results.",
    )
    flags.DEFINE_bool("costs", False, "Only measure the cost of a step again, for the records that are there.")
    flags.DEFINE_integer("secrets", 2000, "Random secrets that a canary is compared with.", lower_bound=100)
    command_line.run_with_settings(main)
