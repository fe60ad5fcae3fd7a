"""A run that was trained before, to be asked again: the model of its last checkpoint, on the same data or on others.

Nothing is trained and nothing is released, so that neither the guarantee nor the run's identity is asked for. What
training fixed stays: a change may be one of the data, of the way of writing and evaluating, and of the devices.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from dp_rmt.clipping.quantile import QuantileClipping
from dp_rmt.correlated_noise import BandedToeplitz
from dp_rmt.finetuning import assemble
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.geometry import geometry_of
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.stages import build_transforms
from dp_rmt.finetuning.tasks import synthetic as synthetic_task
from dp_rmt.finetuning.tasks.task import Task
from dp_rmt.finetuning.workdir import CONFIG_FILE, NOT_THE_EXPERIMENT, as_json, flatten
from dp_rmt.mechanism import DPSGD
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.training import processes
from dp_rmt.training.checkpoint import Checkpoints, can_go_on
from dp_rmt.training.ledger import only_writer, read_ledger
from dp_rmt.training.partitioning import init_state, make_mesh
from dp_rmt.training.run import CHECKPOINTS
from dp_rmt.training.sharding_rules import SHARDING_RULES
from dp_rmt.trees import split_params
from dp_rmt.types import Params

MAY_CHANGE = (*NOT_THE_EXPERIMENT, "data.", "model.dtype", "model.remat", "model.flash_attention")
"""The settings that a trained model can be asked with, beside those that it was trained with."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained arm.

    Attributes:
      settings: with the changes.
      workdir: the arm's own folder.
      task: data and module; its parameters are those before training.
      params: all parameters after training, as they are evaluated and may be released.
    """

    settings: Settings
    workdir: Path
    task: Task
    params: Params


def read_trained(workdir: Path, arm: str | None, change: Callable[[Settings], Settings]) -> Trained:
    """Reads an arm's model: that of its last checkpoint, or `model/` where a folder was copied without checkpoints.

    Args:
      workdir: the folder that the program was given.
      arm: name of one of its arms; may be left out if there is only one.
      change: makes the settings to ask with from those of the run.

    Raises:
      FileNotFoundError: nothing has been trained there.
      ValueError: there is no such arm, or a change is not one of `MAY_CHANGE` or does not fit the model.
      BlockingIOError: the run is training at this moment.
    """
    config = workdir / CONFIG_FILE
    if not config.exists():
        raise FileNotFoundError(f"{workdir} holds no {CONFIG_FILE}: give the folder of a run")
    each = arm_settings(Settings.from_config(json.loads(config.read_text(encoding="utf-8"))))
    name = next(iter(each)) if arm is None and len(each) == 1 else arm
    if name not in each:
        raise ValueError(f"{workdir} has the arms {', '.join(each)}: name one of them")
    folder = workdir if len(each) == 1 else workdir / name
    settings = _changed(each[name], change)
    asked = settings
    if settings.synthetic is not None:
        asked = synthetic_task.prepare({name: settings}, workdir / "public")[name]
    if can_go_on(folder / CHECKPOINTS):
        task = assemble.load_task(asked)
        params = _of_checkpoint(asked, folder, task)
    elif (folder / "model" / "config.json").exists():
        # Low-rank updates are merged there: the module is the plain one, and all of it was saved.
        asked = asked.changed({"model": {"path": str(folder / "model"), "tuning": "full", "trainable": ".*"}})
        task = assemble.load_task(asked)
        params = task.params
    else:
        raise FileNotFoundError(f"{folder} has neither checkpoints nor a model: train the run first")
    _check_classes(each[name], settings, folder, task)
    return Trained(settings, folder, task, params)


def _changed(settings: Settings, change: Callable[[Settings], Settings]) -> Settings:
    """The settings with the changes.

    Raises:
      ValueError: training fixed what is changed, the settings no longer go together, or the evaluation data is private
        and other data is asked for.
    """
    changed = change(settings)
    before, after = flatten(as_json(settings)), flatten(as_json(changed))
    fixed = [key for key in after if before.get(key) != after[key] and not key.startswith(MAY_CHANGE)]
    if fixed:
        key = fixed[0]
        raise ValueError(
            f"config.{key} was fixed by training: there {before.get(key)!r}, asked for {after[key]!r}. A trained model "
            "can be asked with other settings of data, generation, evaluation (train.eval_batch_size) and mesh; train "
            "another run for the rest"
        )
    if changed.privacy.evaluation_epsilon is not None and changed.data != settings.data:
        raise ValueError(
            f"config.privacy.evaluation_epsilon={changed.privacy.evaluation_epsilon}: the scores of this run are those "
            "that it released, with noise, on its own evaluation data, and it has none on other data. Leave "
            "config.data as it was, or evaluate the saved model in transformers"
        )
    (checked,) = arm_settings(changed).values()
    return checked


def _of_checkpoint(settings: Settings, folder: Path, task: Task) -> Params:
    """The parameters of the last checkpoint, as they are evaluated."""
    statement, entries = PrivacyStatement.from_json(read_privacy(folder)), read_ledger(folder)
    mechanism = DPSGD(
        num_examples=statement.num_examples,  # those of the training, whatever data is asked about
        expected_batch_size=statement.expected_batch_size,
        num_steps=entries[-1].num_steps if entries else max(1, statement.num_steps),
        noise_multiplier=statement.noise_multiplier,
        l2_clip_norm=statement.l2_clip_norm,
        max_batch_size=statement.max_batch_size,
        clip_quantile=statement.clip_quantile and QuantileClipping(*statement.clip_quantile),
        noise_generator=statement.noise_generator,
        noise_strategy=None if statement.noise_coefficients is None else BandedToeplitz(statement.noise_coefficients),
    )
    mesh, geometry = make_mesh(**settings.mesh.as_dict()), geometry_of(settings, task)
    coordinates = None if geometry is None else geometry.coordinates
    stages = build_transforms(settings, mechanism, 0, mesh, coordinates)
    template, _ = init_state(stages, *split_params(task.params, task.trainable), mesh, SHARDING_RULES)
    with only_writer(folder):  # opening checkpoints removes what a save under way has written so far
        checkpoints = Checkpoints(folder / CHECKPOINTS, None)
        restored = checkpoints.restore(template)
        checkpoints.close()
    if restored is None or int(restored[0].step) == 0:
        raise FileNotFoundError(f"{folder} holds no checkpoint of an update: train the run first")
    return processes.to_host(stages.published_params(restored[0]))


def _check_classes(trained: Settings, asked: Settings, folder: Path, task: Task) -> None:
    """Raises ValueError if the classes may be others, or in another order, than those that were trained."""
    if not task.label_names or trained.data == asked.data:
        return
    saved = folder / "model" / "config.json"
    names = trained.data.labels
    if not names and saved.exists():
        found = json.loads(saved.read_text(encoding="utf-8"))["id2label"]
        names = tuple(found[str(number)] for number in range(len(found)))
    if not names and trained.data.task == asked.data.task == "labelled_table":
        raise ValueError(
            f"{folder} does not say which classes it was trained on, in which order: its config.data.labels are empty, "
            "and it has no model/ yet. Let the run come to its end first"
        )
    if names and tuple(task.label_names) != tuple(names):
        raise ValueError(
            f"the classes of this data are {', '.join(task.label_names)}, and the model was trained on "
            f"{', '.join(names)}: give --config.data.labels={tuple(names)!r}"
        )
