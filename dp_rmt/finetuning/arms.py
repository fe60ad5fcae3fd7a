"""An experiment: one or several arms of the same settings, each in a folder of its own, and their common report."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import jax
from absl import logging

from dp_rmt.files import explained, write_atomically
from dp_rmt.finetuning import assemble
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.plan import build_mechanism, print_plans
from dp_rmt.finetuning.release.base_model import BaseModel, base_model_of
from dp_rmt.finetuning.release.card import KINDS, card_of
from dp_rmt.finetuning.release.files import generation_config, released_tokenizer
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks import synthetic as synthetic_task
from dp_rmt.finetuning.tasks.task import Task
from dp_rmt.finetuning.texts import samples, write_texts
from dp_rmt.finetuning.workdir import CONFIG_FILE, as_json, check_workdir, claim_workdir, flatten, is_secret
from dp_rmt.models import save_pretrained
from dp_rmt.models.peft.adapter import save_adapter
from dp_rmt.models.tuning import without_lora
from dp_rmt.reporting.advice import advice_lines
from dp_rmt.reporting.model_card import FILE as CARD
from dp_rmt.reporting.page import Run as ReportedRun
from dp_rmt.reporting.page import results_table, write_report
from dp_rmt.reporting.privacy_statement import read_privacy, statement_table
from dp_rmt.training import processes
from dp_rmt.training.checkpoint import can_go_on
from dp_rmt.training.guarantee import check_unspent
from dp_rmt.training.metrics import MetricsWriter, read_metrics
from dp_rmt.training.partitioning import data_mesh
from dp_rmt.training.prepare import Seeds
from dp_rmt.training.run import CHECKPOINTS, Run
from dp_rmt.training.train_state import TrainState
from dp_rmt.training.writers import Writers, check_writers, open_writers
from dp_rmt.types import Params

SAMPLES = 8
"""The number of texts that the report shows of each run."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A checked arm of an experiment.

    Attributes:
      name: name of the arm.
      settings: the arm's own settings.
      workdir: the arm's own folder.
      task: data and model.
      run: the run, ready to train.
      experiment: the folder of all arms, which has their common report; None for an arm that stands alone.
    """

    name: str
    settings: Settings
    workdir: Path
    task: Task
    run: Run
    experiment: Path | None = None


def prepare(settings: Settings, workdir: Path, rows: Any = None, *, shows_plan: bool = True) -> list[Arm]:
    """Checks everything and builds every arm; writes nothing but a new workdir's own files.

    Args:
      settings: settings of the experiment.
      workdir: a new or empty folder, or that of the same experiment, which is then resumed.
      rows: one's own rows that a Python program holds, in the place of `data.path`.
      shows_plan: whether the plan of every arm is printed, before the model is loaded.

    Returns:
      The arms, in order.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: the message says what is wrong, where, and what to do.
    """
    each = arm_settings(settings)
    for own in each.values():
        check_writers(own.writers.to)
    folders = _folders(each, workdir)
    with processes.first_alone("workdir"):
        located = _locate(settings, each, folders, workdir)
    tasks: dict[Hashable, Task] = {}
    arms = []
    for name, with_paths in located.items():
        key = assemble.task_key(with_paths)
        if key not in tasks:
            alike = {other: each[other] for other, theirs in located.items() if assemble.task_key(theirs) == key}
            planned = functools.partial(print_plans, alike) if shows_plan else None
            tasks[key] = assemble.load_task(with_paths, rows, planned)
        run = assemble.build_run(with_paths, tasks[key], name=name)
        run.check(folders[name])
        arms.append(Arm(name, each[name], folders[name], tasks[key], run, workdir))
    processes.wait_for_all("arms are ready")
    if processes.is_first():
        claim_workdir(workdir, settings)
    return arms


def train(arm: Arm, *, until: int | None = None) -> None:
    """Trains an arm to its end, from its last checkpoint if it has one, and writes everything but the report.

    If there are several processes, all train, each on its devices, and the first one writes.

    Args:
      arm: from `prepare`.
      until: stop after so many updates; a later call goes on.

    Raises:
      ValueError: the checkpoint in the workdir belongs to another experiment.
      FileExistsError: the workdir has the results of a run, but nothing to go on from.
      BlockingIOError: another process trains there.
    """
    if processes.is_first():
        claim_workdir(arm.workdir, arm.settings)
    arm.run.train(
        arm.workdir,
        until=until,
        write_results=lambda step, params, metrics: _write_results(arm, step, params, metrics),
        after_evaluation=None if arm.experiment is None else ReportWhileRunning(arm.experiment),
        writers=_writers(arm) if processes.is_first() else None,
    )


def _writers(arm: Arm) -> Writers:
    chosen = arm.settings.writers
    record = {key: value for key, value in flatten(as_json(arm.settings)).items() if not is_secret(key)}
    return open_writers(
        chosen.to,
        arm.workdir,
        name=f"{arm.settings.name}/{arm.name}",
        config=record,
        nonprivate=chosen.nonprivate,
        project=chosen.wandb_project,
        online=chosen.wandb_online,
    )


class ReportWhileRunning:
    """Writes the report after an evaluation, unless that would take more than a tenth of the time.

    Args:
      workdir: the folder of the experiment.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir, self._next = workdir, -math.inf

    def __call__(self, step: int) -> None:
        """Writes the report; the run goes on if that fails, as it can be written again from the folder."""
        begun = time.monotonic()
        if begun < self._next:
            return
        try:
            report(self._workdir)
        except OSError as error:
            logging.warning("the report could not be written after update %d: %s", step, explained(error))
        ended = time.monotonic()
        self._next = ended + 9 * (ended - begun)


def trained_state(arm: Arm) -> TrainState:
    """The state after the last update that was saved.

    Raises:
      FileNotFoundError: the arm has not been trained.
    """
    return arm.run.trained_state(arm.workdir)


def report(workdir: Path) -> str:
    """Writes ``report.html`` about all arms that have begun, from the files in their folders.

    Args:
      workdir: the folder of the experiment.

    Returns:
      The report's results and statements, as tables for the terminal.

    Raises:
      FileNotFoundError: the folder is not that of an experiment, or no arm has begun.
    """
    config = workdir / CONFIG_FILE
    if not config.exists():
        raise FileNotFoundError(f"{workdir} holds no {CONFIG_FILE}: give the folder of a run")
    each = arm_settings(Settings.from_config(json.loads(config.read_text(encoding="utf-8"))))
    folders = _folders(each, workdir)
    runs = {
        name: ReportedRun(
            metrics=read_metrics(folders[name] / "metrics.jsonl"),
            config=as_json(settings),
            privacy=read_privacy(folders[name]),
            texts=samples(folders[name], SAMPLES),
        )
        for name, settings in each.items()
        if (folders[name] / "metrics.jsonl").exists()
    }
    if not runs:
        raise FileNotFoundError(f"{workdir}: no run has begun")
    write_report(workdir / "report.html", runs)
    statements = statement_table({name: run.privacy for name, run in runs.items()})
    return f"{results_table(runs)}\n{statements}\n{advice_lines(runs)}Report: {workdir / 'report.html'}"


def _folders(each: Iterable[str], workdir: Path) -> dict[str, Path]:
    """The folder of every arm; a single arm has the experiment's own folder."""
    names = list(each)
    return {name: workdir if len(names) == 1 else workdir / name for name in names}


def _locate(
    settings: Settings, each: dict[str, Settings], folders: dict[str, Path], workdir: Path
) -> dict[str, Settings]:
    """Checks the folders, and makes the data of a synthetic task; returns the arms' settings with its paths."""
    check_workdir(workdir, settings)
    if len(each) > 1:
        for name, folder in folders.items():
            check_workdir(folder, each[name])
    for name, folder in folders.items():
        if not can_go_on(folder / CHECKPOINTS):
            seeds = Seeds(each[name].privacy.sampling_seed, each[name].privacy.noise_seed)
            check_unspent(folder, seeds_given=seeds.are_given)
    if settings.synthetic is None:
        return each
    for arm in each.values():  # before minutes of pre-training: can epsilon be reached?
        build_mechanism(arm, settings.synthetic.num_private_train)
    claim_workdir(workdir, settings)
    return synthetic_task.prepare(each, workdir / "public")


def _write_results(arm: Arm, step: int, params: Params, metrics: MetricsWriter) -> None:
    """Writes the model, and at the end of a decoder's run also its texts and their scores."""
    base = base_model_of(arm.settings, arm.task)
    _save_model(arm, params, base)
    if arm.task.prompts is not None and step == arm.run.loop.mechanism.num_steps:
        mesh = data_mesh(jax.local_devices())  # the other processes take no part
        scores = write_texts(arm.workdir, arm.task, params, arm.settings.generation, mesh)
        numbers = {name: score for name, score in scores.items() if isinstance(score, float)}
        metrics.append(step, {f"eval/{arm.task.prompts.split}/{name}": x for name, x in numbers.items()})
        for kind in KINDS:  # once more, with these scores
            if (arm.workdir / kind).exists():
                text = card_of(arm.workdir, arm.settings, arm.task, base, kind)
                write_atomically(arm.workdir / kind / CARD, text)


def _save_model(arm: Arm, params: Params, base: BaseModel) -> None:
    """Saves the model with low-rank updates merged into its weights, and the updates also as a PEFT adapter."""
    task, settings = arm.task, arm.settings
    module, merged = without_lora(task.module, params)
    tokenizer = released_tokenizer(settings, task, base.name)
    cards = {kind: {CARD: card_of(arm.workdir, settings, task, base, kind)} for kind in KINDS}
    writes = generation_config(settings, task)
    problem = None
    if settings.model.head == "classification":
        problem = "single_label_classification" if task.num_labels else "regression"
    save_pretrained(
        arm.workdir / "model",
        module,
        merged,
        tokenizer=tokenizer,
        label_names=task.label_names,
        problem_type=problem,
        files=cards["model"] | writes,
    )
    if task.module.config.lora is not None:
        save_adapter(
            arm.workdir / "adapter",
            task.module,
            params,
            base_model_name_or_path=base.name,
            trained=task.trainable,
            tokenizer=tokenizer,
            files=cards["adapter"] | writes,
        )
