"""From settings to a run that is ready to train; everything that can be wrong is found here, before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from dp_rmt.batch_selection import fresh_seed
from dp_rmt.data import DOCUMENT_TASKS, TABLE_TO_TEXT_TASKS, fingerprint
from dp_rmt.denoising import matrix_view
from dp_rmt.finetuning.microbatches import with_microbatch_size
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.classification import load_glue_task
from dp_rmt.finetuning.tasks.documents import load_document_task
from dp_rmt.finetuning.tasks.task import Task, delta_for, resolve_model_path
from dp_rmt.finetuning.tasks.text import load_text_task
from dp_rmt.finetuning.transforms import MATRIX_DENOISERS, build_transforms, learning_rate_schedule, name_and_options
from dp_rmt.mechanism import DPSGD
from dp_rmt.training.partitioning import batch_parts, init_state, jit_train_step, make_mesh
from dp_rmt.training.processes import of_first
from dp_rmt.training.train import TrainLoop
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.trees import split_params


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm, ready to train.

    Attributes:
      loop: the training loop.
      state: the initial state.
      delta: of the guarantee.
      identity: what a checkpoint must agree on to be resumed.
      sampling_seed: for a fresh run; a resumed one goes on with its checkpoint's.
    """

    loop: TrainLoop
    state: TrainState
    delta: float
    identity: Mapping[str, Any]
    sampling_seed: int


def load_task(settings: Settings) -> Task:
    """Reads data and model, and checks that they fit each other.

    Args:
      settings: their data, model and seed.

    Returns:
      A `Task`.

    Raises:
      ValueError, FileNotFoundError: something is missing, broken or does not fit; the message says what to do.
    """
    if settings.data.task in DOCUMENT_TASKS:
        task = load_document_task(settings)
    else:
        task = load_text_task(settings) if settings.data.task in TABLE_TO_TEXT_TASKS else load_glue_task(settings)
    return dataclasses.replace(task, base_model=resolve_model_path(settings.model.path))


def task_key(settings: Settings) -> Hashable:
    """What a task is made of: equal for settings that have the same one."""
    return settings.data, settings.model, settings.generation, settings.seed


class TaskLoader:
    """`load_task` that keeps its last task, for runs in a row that have the same one."""

    def __init__(self) -> None:
        self._last: tuple[Hashable, Task] | None = None

    def __call__(self, settings: Settings) -> Task:
        """The task of these settings; errors as of `load_task`."""
        key = task_key(settings)
        if self._last is None or self._last[0] != key:
            self._last = key, load_task(settings)
        return self._last[1]


def build_mechanism(settings: Settings, num_examples: int, num_devices: int = 1) -> tuple[DPSGD, float]:
    """The DP-SGD of a run on so many training examples, and its delta.

    Args:
      settings: their privacy and train.
      num_examples: rows of the training data.
      num_devices: that examples are divided over; a microbatch is rounded up to a multiple of it, which changes neither
        the samples nor the accounting.

    Returns:
      ``(mechanism, delta)``.

    Raises:
      ValueError: the batch does not fit the data, or epsilon cannot be reached.
    """
    privacy, train = settings.privacy, settings.train
    delta = delta_for(privacy, num_examples)
    microbatch_size = 1 if train.microbatch_size == "auto" else train.microbatch_size
    options: dict[str, Any] = {
        "num_examples": num_examples,
        "expected_batch_size": privacy.expected_batch_size,
        "num_steps": train.num_steps or max(1, round(train.epochs * num_examples / privacy.expected_batch_size)),
        "clip": privacy.clip,
        "max_batch_size": privacy.max_batch_size,
        "batch_multiple_of": microbatch_size,
        "microbatch_size": microbatch_size,
        "clipping_method": train.clipping_method,
        "accountant": privacy.accountant,
    }
    try:
        if math.isinf(privacy.epsilon):
            mechanism = DPSGD(**options, l2_clip_norm=math.inf, noise_multiplier=0.0)
        else:
            options["l2_clip_norm"] = privacy.l2_clip_norm
            mechanism = DPSGD.calibrated(epsilon=privacy.epsilon, delta=delta, **options)
    except ValueError as error:
        raise ValueError(f"config.privacy and config.train on {num_examples} training examples: {error}") from error
    # Rounded up afterwards: the batch shape stays that of the config, and the train loop pads it to whole microbatches.
    for_devices = -(-microbatch_size // num_devices) * num_devices
    return dataclasses.replace(mechanism, microbatch_size=for_devices), delta


def build_run(
    settings: Settings, task: Task, *, name: str, observe: Callable[[Transforms], Transforms] | None = None
) -> Run:
    """Puts the pieces of one arm together.

    Args:
      settings: of the arm.
      task: data and model.
      name: for the progress bar.
      observe: puts what reads along, such as `optax.snapshot`, between the stages of a step.

    Returns:
      A `Run`.
    """
    mesh = make_mesh(**settings.mesh.as_dict())
    settings = with_microbatch_size(settings, task)
    mechanism, delta = build_mechanism(settings, task.num_examples, batch_parts(mesh))
    _warn_of_large_delta(name, mechanism, delta)
    given = settings.privacy.sampling_seed, settings.privacy.noise_seed
    sampling_seed, noise_seed = (of_first(fresh_seed()) if seed is None else seed for seed in given)
    transforms = build_transforms(settings, mechanism, noise_seed, mesh)
    if observe is not None:
        transforms = observe(transforms)
    params, frozen = split_params(task.params, task.trainable)
    _log_sizes(params, frozen)
    _warn_of_nothing_to_denoise(name, settings, params)
    state, shardings = init_state(transforms, params, frozen, mesh)
    train_step = make_train_step(
        mechanism,
        task.losses,
        transforms,
        nonprivate_metrics=settings.privacy.nonprivate_metrics,
        layout=shardings.params,
    )
    evaluators = {
        name: task.evaluator(arrays, settings.train.eval_batch_size) for name, arrays in task.evaluations.items()
    }
    loop = TrainLoop(
        train_step=jit_train_step(train_step, mesh, shardings),
        mechanism=mechanism,
        delta=delta,
        arrays=task.train,
        lengths=task.lengths,
        evaluators=evaluators,
        learning_rate=learning_rate_schedule(settings.train, mechanism.num_steps),
        eval_every=settings.train.eval_every,
        checkpoint_every=settings.train.checkpoint_every,
        name=name,
        mesh=mesh,
    )
    _trace(loop, state)
    return Run(loop, state, delta, _identity(settings, task, mechanism, delta), sampling_seed)


def _warn_of_large_delta(name: str, mechanism: DPSGD, delta: float) -> None:
    if mechanism.noise_multiplier > 0 and delta * mechanism.num_examples >= 1:
        logging.warning(
            "%s: config.privacy.delta=%g is at least 1 / N = %.3g of the %d training examples. At such a delta the "
            "guarantee allows publishing an example outright, and the statement will say so; set it well below, or "
            "leave it out for N^-1.1",
            name,
            delta,
            1 / mechanism.num_examples,
            mechanism.num_examples,
        )


def _warn_of_nothing_to_denoise(name: str, settings: Settings, params: Any) -> None:
    names = [name_and_options(named)[0] for named in (*settings.denoise, settings.optimizer)]
    of_matrices = [each for each in names if each in MATRIX_DENOISERS]
    if of_matrices and not matrix_view.matrix_leaves(params):
        logging.warning(
            "%s: %s denoises matrices, and none is trained with config.model.tuning=%r and config.model.trainable=%r: "
            "this run is the one without denoising. Set config.denoise=() to say so, or train matrices, too",
            name,
            of_matrices[0],
            settings.model.tuning,
            settings.model.trainable,
        )


def _trace(loop: TrainLoop, state: TrainState) -> None:
    """Traces a step, so that what clipping refuses is refused here; the trace is not lost, the first step uses it."""
    mechanism = loop.mechanism
    nobody = np.full(mechanism.truncation.max_batch_size, -1, np.int32)
    try:
        jax.eval_shape(loop.train_step, state, loop.groups(nobody))
    except ValueError as error:
        raise ValueError(
            f"config.train.clipping_method={mechanism.clipping_method!r} does not fit this model: {error}. "
            "In a config: let config.model.trainable match all other parameters, or give "
            "config.train.clipping_method='vmap' (slower; each example's gradient takes the memory of the model)"
        ) from error


def _identity(settings: Settings, task: Task, mechanism: DPSGD, delta: float) -> dict[str, Any]:
    facts = dataclasses.asdict(mechanism) | {"delta": delta, "train_data": fingerprint(task.train)}
    facts["microbatch_size"] = mechanism.batch_multiple_of  # as in the config, not rounded up for these devices
    facts |= {f"model.{key}": value for key, value in settings.model.as_dict().items()}
    facts |= {name: getattr(settings.train, name) for name in ("learning_rate", "schedule", "warmup_steps")}
    facts |= {"denoise": settings.denoise, "optimizer": settings.optimizer}
    return {name: str(value) for name, value in facts.items()}


def _log_sizes(params: Any, frozen: Any) -> None:
    trained, kept = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, frozen))
    matrices = matrix_view.matrix_leaves(params)
    logging.info("%.2fM trained parameters (%d matrix leaves), %.2fM frozen", trained / 1e6, len(matrices), kept / 1e6)
