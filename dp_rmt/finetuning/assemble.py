"""From settings to a run that is ready to train; everything that can be wrong is found here, before the first step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from absl import logging
from jax.sharding import Mesh

from dp_rmt.clipping.execution import Execution
from dp_rmt.data import DOCUMENT_TASKS, TABLE_TO_TEXT_TASKS, fingerprint
from dp_rmt.denoising import matrix_view
from dp_rmt.finetuning import defaults
from dp_rmt.finetuning.geometry import Geometry, geometry_of
from dp_rmt.finetuning.plan import Planned, build_mechanism, delta_for
from dp_rmt.finetuning.settings import Settings, Whitening
from dp_rmt.finetuning.stages import build_transforms, learning_rate_schedule
from dp_rmt.finetuning.tasks.classification import load_glue_task, load_labelled_task
from dp_rmt.finetuning.tasks.documents import load_document_task
from dp_rmt.finetuning.tasks.task import Evaluator, Task, resolve_model_path
from dp_rmt.finetuning.tasks.text import load_own_text_task, load_text_task
from dp_rmt.finetuning.transforms import name_and_options
from dp_rmt.mechanism import DPSGD
from dp_rmt.models.huggingface.folder import content_digest, resolve_folder
from dp_rmt.training.guarantee import About
from dp_rmt.training.microbatches import fitting_microbatch_size
from dp_rmt.training.partitioning import make_mesh
from dp_rmt.training.prepare import Seeds, prepare_run
from dp_rmt.training.private_scores import PrivateScores
from dp_rmt.training.run import Run
from dp_rmt.training.sharding_rules import SHARDING_RULES
from dp_rmt.training.task import Task as TrainedTask
from dp_rmt.training.train_state import Transforms
from dp_rmt.trees import split_params


def load_task(settings: Settings, rows: Any = None, planned: Planned | None = None) -> Task:
    """Reads data and model, and checks that they fit each other.

    Args:
      settings: data, model, generation and seed are read, and privacy for the check of delta.
      rows: the rows of one's own data that a Python program holds, in the place of `data.path`.
      planned: is told the number of examples before the model is loaded, and may raise; None checks delta.

    Returns:
      A `Task`.

    Raises:
      ValueError, FileNotFoundError: something is missing, broken or does not fit; the message says what to do.
    """
    if planned is None:
        planned = functools.partial(_check_delta, settings)
    own = {"labelled_table": load_labelled_task, "text_pairs": load_own_text_task, "documents": load_document_task}
    if settings.data.task in own:
        source = settings.data.path if rows is None else rows
        if source is None:
            raise ValueError(
                f"config.data.task={settings.data.task!r} reads your own data: set --config.data.path to a file, a "
                "folder or hub:NAME, or call dp_rmt.finetune(train=ROWS)"
            )
        task = own[settings.data.task](settings, source, planned)
    elif rows is not None:
        raise ValueError(f"config.data.task={settings.data.task!r} reads its own files and takes no rows: leave it out")
    elif settings.data.task in TABLE_TO_TEXT_TASKS:
        task = load_text_task(settings, planned)
    elif settings.data.task in DOCUMENT_TASKS:
        task = load_document_task(settings, settings.data.path, planned)
    else:
        task = load_glue_task(settings, planned)
    base_model = resolve_model_path(settings.model.path)
    folder = resolve_folder(base_model)
    return dataclasses.replace(
        task, base_model=base_model, base_folder=str(folder), base_content=content_digest(folder)
    )


def _check_delta(settings: Settings, num_examples: int, notes: Sequence[str]) -> None:
    delta_for(settings.privacy, num_examples, "example" if settings.data.user_column is None else "user")


def task_key(settings: Settings) -> Hashable:
    """The settings that a task is made of: two settings with equal keys have the same task."""
    return settings.data, settings.model, settings.generation, settings.seed


class TaskLoader:
    """`load_task`, which keeps its last task for successive runs that have the same one."""

    def __init__(self) -> None:
        self._last: tuple[Hashable, Task] | None = None

    def __call__(self, settings: Settings) -> Task:
        """The task of these settings; errors as in `load_task`."""
        key = task_key(settings)
        if self._last is None or self._last[0] != key:
            self._last = key, load_task(settings)
        return self._last[1]


def build_run(
    settings: Settings, task: Task, *, name: str, observe: Callable[[Transforms], Transforms] | None = None
) -> Run:
    """Puts the pieces of one arm together.

    Args:
      settings: settings of the arm.
      task: data and model.
      name: name for the progress bar.
      observe: adds transformations that only look, such as `optax.snapshot`, between the stages of a step.

    Returns:
      A `Run`.
    """
    mesh, trained = make_mesh(**settings.mesh.as_dict()), _trained_task(settings, task)
    settings = _with_microbatch_size(settings, trained, mesh)
    privacy, train = settings.privacy, settings.train
    mechanism, delta = build_mechanism(settings, trained.num_units)
    geometry = geometry_of(settings, task)
    _warn_of_nothing_to_truncate(name, settings, split_params(task.params, task.trainable)[0])

    def transforms(mechanism: DPSGD, noise_seed: int, mesh: Mesh) -> Transforms:
        coordinates = None if geometry is None else geometry.coordinates
        stages = build_transforms(settings, mechanism, noise_seed, mesh, coordinates)
        return stages if observe is None else observe(stages)

    return prepare_run(
        trained,
        mechanism,
        transforms,
        delta=delta,
        name=name,
        mesh=mesh,
        rules=SHARDING_RULES,
        execution=Execution(train.clipping_method, mechanism.batch_multiple_of),
        seeds=Seeds(privacy.sampling_seed, privacy.noise_seed),
        learning_rate=learning_rate_schedule(train, mechanism.num_steps),
        eval_every=train.eval_every,
        checkpoint_every=train.checkpoint_every,
        checkpoints=settings.checkpoints.as_dict(),
        nonprivate_metrics=privacy.nonprivate_metrics,
        identity={
            **{f"model.{key}": value for key, value in settings.model.as_dict().items()},
            "model.path.content": task.base_content,
            **{f"train.{key}": getattr(train, key) for key in ("learning_rate", "schedule", "warmup_steps", "advice")},
            # Left out where nothing is averaged, so that what was begun before there was this option can go on.
            **({} if train.average_iterates is None else {"train.average_iterates": train.average_iterates}),
            "denoise": settings.denoise,
            "optimizer": settings.optimizer,
            **({} if geometry is None else _coordinates(settings.whitening, geometry)),
        },
        facts=None if geometry is None else geometry.facts(),
        about=About(
            base_model=settings.model.path,  # as it was given: package:NAME/FOLDER, and not where it lies
            task=settings.data.task,
            tuning=settings.model.tuning,
            target_epsilon=privacy.epsilon,
            texts_of=task.prompts.split if task.prompts else None,
            coordinates_from=None if geometry is None else geometry.rows,
        ),
        private_scores=private_scores(settings, mechanism.num_steps, delta, task),
    )


def private_scores(settings: Settings, num_steps: int, delta: float, task: Task | None = None) -> PrivateScores | None:
    """The noise of the scores of a run; None where its evaluation data is public.

    Args:
      settings: of the run.
      num_steps: its updates.
      delta: of its guarantee, and of that of the evaluation data.
      task: has the evaluation data; None where the scores are to be priced and not released.
    """
    epsilon = settings.privacy.evaluation_epsilon
    if epsilon is None:
        return None
    found = {} if task is None else task.evaluations
    rows = {name: len(next(iter(arrays.values()))) for name, arrays in found.items()}
    parts = [f"{name}={fingerprint(arrays)}" for name, arrays in sorted(found.items())]
    content = " ".join([*parts, f"eval_batch_size={settings.train.eval_batch_size}"])
    return PrivateScores(epsilon, delta, num_steps, settings.train.eval_every, rows, content)


def _coordinates(whitening: Whitening, geometry: Geometry) -> dict[str, Any]:
    """The facts that the coordinates of a run depend on."""
    facts = {f"whitening.{key}": value for key, value in whitening.as_dict().items()}
    return facts if geometry.text_digest is None else facts | {"whitening.text.content": geometry.text_digest}


def evaluators(settings: Settings, task: Task) -> dict[str, Evaluator]:
    """``params -> scores`` for each of the task's evaluation data, by name."""
    size = settings.train.eval_batch_size
    return {name: task.evaluator(arrays, size) for name, arrays in task.evaluations.items()}


def _trained_task(settings: Settings, task: Task) -> TrainedTask:
    """The part of the task that training needs."""
    scores = evaluators(settings, task)
    return TrainedTask(
        task.train, task.losses, task.params, task.trainable, task.lengths, scores, users=task.users or None
    )


def _with_microbatch_size(settings: Settings, task: TrainedTask, mesh: Mesh) -> Settings:
    """Fills in ``train.microbatch_size`` where it is "auto", by `fitting_microbatch_size`.

    The shape of a batch is rounded up to whole microbatches, so that the size is a part of the run's identity. To
    resume on a machine with other memory, give the size that the first machine found.
    """
    if settings.train.microbatch_size != "auto":
        return settings
    mechanism = DPSGD(
        num_examples=task.num_units,
        expected_batch_size=defaults.expected_batch_size(settings.privacy.expected_batch_size, task.num_units),
        num_steps=1,
        l2_clip_norm=settings.privacy.l2_clip_norm,
        noise_multiplier=0.0,
        clip=settings.privacy.clip,
        rows_per_user=None if task.users is None else settings.privacy.rows_per_user,
    )
    size = fitting_microbatch_size(task, mechanism, settings.train.clipping_method, mesh)
    return settings.changed({"train.microbatch_size": size})


def _warn_of_nothing_to_truncate(name: str, settings: Settings, params: Any) -> None:
    """Warns of a truncation without matrices; `prepare_run` warns of the other denoisers, which have a state."""
    truncates = any(name_and_options(named)[0] == "truncate_rank" for named in settings.denoise)
    if truncates and not matrix_view.matrix_leaves(params):
        logging.warning(
            "%s: truncate_rank truncates matrices, and none is trained with config.model.tuning=%r and "
            "config.model.trainable=%r, so this is the run without it. Leave it out of config.denoise to say so, or "
            "train matrices, too",
            name,
            settings.model.tuning,
            settings.model.trainable,
        )
