"""From a config to a run that is ready to train; everything that can be wrong is found here, before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dp_rmt.data import DOCUMENT_TASKS, TABLE_TO_TEXT_TASKS
from dp_rmt.denoising import matrix_view
from dp_rmt.finetuning.tasks.classification import load_glue_task
from dp_rmt.finetuning.tasks.documents import load_document_task
from dp_rmt.finetuning.tasks.task import Task, delta_for, resolve_model_path
from dp_rmt.finetuning.tasks.text import load_text_task
from dp_rmt.finetuning.transforms import build_transforms, learning_rate_schedule
from dp_rmt.mechanism import DPSGD, Execution
from dp_rmt.training.guarantee import About
from dp_rmt.training.microbatches import fitting_microbatch_size
from dp_rmt.training.partitioning import make_mesh
from dp_rmt.training.run import Run, Seeds, prepare_run
from dp_rmt.training.sharding_rules import SHARDING_RULES
from dp_rmt.training.task import Task as TrainedTask
from dp_rmt.training.train_state import Transforms
from dp_rmt.trees import split_params


def load_task(config: ConfigDict) -> Task:
    """Reads data and model, and checks that they fit each other.

    Args:
      config: data, model and seed of `configs.base`.

    Returns:
      A `Task`.

    Raises:
      ValueError, FileNotFoundError: something is missing, broken or does not fit; the message says what to do.
    """
    if config.data.task in DOCUMENT_TASKS:
        task = load_document_task(config)
    else:
        task = load_text_task(config) if config.data.task in TABLE_TO_TEXT_TASKS else load_glue_task(config)
    return dataclasses.replace(task, base_model=resolve_model_path(config.model.path))


class TaskLoader:
    """`load_task` that keeps its last task, for runs in a row that differ in neither data, model nor seed."""

    def __init__(self) -> None:
        self._last: tuple[str, Task] | None = None

    def __call__(self, config: ConfigDict) -> Task:
        """The task of a config; errors as of `load_task`."""
        key = str((config.data, config.model, config.seed))
        if self._last is None or self._last[0] != key:
            self._last = key, load_task(config)
        return self._last[1]


def build_mechanism(config: ConfigDict, num_examples: int) -> tuple[DPSGD, float]:
    """The DP-SGD of a config on so many training examples, and its delta.

    Args:
      config: privacy and train of `configs.base`.
      num_examples: rows of the training data.

    Returns:
      ``(mechanism, delta)``.

    Raises:
      ValueError: the batch does not fit the data, or epsilon cannot be reached.
    """
    privacy, train = config.privacy, config.train
    delta = delta_for(privacy, num_examples)
    settings = {
        "num_examples": num_examples,
        "expected_batch_size": privacy.expected_batch_size,
        "num_steps": train.num_steps or max(1, round(train.epochs * num_examples / privacy.expected_batch_size)),
        "clip": privacy.clip,
        "max_batch_size": privacy.max_batch_size,
        "batch_multiple_of": max(train.microbatch_size, 1),
        "accountant": privacy.accountant,
    }
    try:
        if math.isinf(privacy.epsilon):
            return DPSGD(**settings, l2_clip_norm=math.inf, noise_multiplier=0.0), delta
        settings["l2_clip_norm"] = privacy.l2_clip_norm
        return DPSGD.calibrated(epsilon=privacy.epsilon, delta=delta, **settings), delta
    except ValueError as error:
        raise ValueError(f"config.privacy and config.train on {num_examples} training examples: {error}") from error


def build_run(
    config: ConfigDict, task: Task, *, name: str, observe: Callable[[Transforms], Transforms] | None = None
) -> Run:
    """Puts the pieces of one arm together.

    Args:
      config: of the arm.
      task: data and model.
      name: for the progress bar.
      observe: puts what reads along, such as `optax.snapshot`, between the stages of a step.

    Returns:
      A `Run`.
    """
    mesh, trained = make_mesh(**config.mesh), _trained_task(config, task)
    config = _with_microbatch_size(config, trained, mesh)
    mechanism, delta = build_mechanism(config, task.num_examples)
    _warn_of_nothing_to_denoise(name, config, split_params(task.params, task.trainable)[0])

    def transforms(mechanism: DPSGD, noise_seed: int, mesh: Mesh) -> Transforms:
        stages = build_transforms(config, mechanism, noise_seed, mesh)
        return stages if observe is None else observe(stages)

    return prepare_run(
        trained,
        mechanism,
        transforms,
        delta=delta,
        name=name,
        mesh=mesh,
        rules=SHARDING_RULES,
        execution=Execution(config.train.clipping_method, mechanism.batch_multiple_of),
        seeds=Seeds(config.privacy.sampling_seed, config.privacy.noise_seed),
        learning_rate=learning_rate_schedule(config.optimizer, mechanism.num_steps),
        eval_every=config.train.eval_every,
        checkpoint_every=config.train.checkpoint_every,
        checkpoints=config.checkpoints,
        nonprivate_metrics=config.privacy.nonprivate_metrics,
        identity={
            f"{group}.{key}": value
            for group in ("model", "optimizer", "denoise")
            for key, value in config[group].items()
        },
        about=About(
            base_model=task.base_model,
            task=config.data.task,
            tuning=config.model.tuning,
            target_epsilon=config.privacy.epsilon,
            texts_of=task.prompts.split if task.prompts else None,
        ),
    )


def _trained_task(config: ConfigDict, task: Task) -> TrainedTask:
    """What of the task the training knows."""
    evaluators = {
        name: task.evaluator(arrays, config.train.eval_batch_size) for name, arrays in task.evaluations.items()
    }
    return TrainedTask(task.train, task.losses, task.params, task.trainable, task.lengths, evaluators)


def _with_microbatch_size(config: ConfigDict, task: TrainedTask, mesh: Mesh) -> ConfigDict:
    """Fills in ``train.microbatch_size`` where it is 0: the largest power of two whose step fits into the memory.

    The shape of a batch is rounded up to whole microbatches, so that the size is a part of the run's identity: to
    resume on a machine with other memory, give the size that the first one found.
    """
    if config.train.microbatch_size:
        return config
    mechanism = DPSGD(
        num_examples=task.num_examples,
        expected_batch_size=config.privacy.expected_batch_size,
        num_steps=1,
        l2_clip_norm=config.privacy.l2_clip_norm,
        noise_multiplier=0.0,
        clip=config.privacy.clip,
    )
    filled = config.copy_and_resolve_references()  # ConfigDict(config) shares what is nested
    filled.train.microbatch_size = fitting_microbatch_size(task, mechanism, config.train.clipping_method, mesh)
    return filled


def _warn_of_nothing_to_denoise(name: str, config: ConfigDict, params: Any) -> None:
    is_of_matrices = config.denoise.enabled and config.denoise.method in ("rmt", "truncate_rank")
    if is_of_matrices and not matrix_view.matrix_leaves(params):
        logging.warning(
            "%s: config.denoise.method=%r denoises matrices, and none is trained with config.model.tuning=%r and "
            "config.model.trainable=%r: this run is the one without denoising. Set config.denoise.enabled=False to say "
            "so, or train matrices, too",
            name,
            config.denoise.method,
            config.model.tuning,
            config.model.trainable,
        )
