"""The arms of an experiment, and the mistakes in their settings that can be found without data and model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from dp_rmt.finetuning.data_settings import CAUSAL_TASKS, OF_OWN_TASKS, OWN_TASKS, Data
from dp_rmt.finetuning.options import replaced
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.stages import check_transforms
from dp_rmt.finetuning.texts import decoding

FOLDER_NAME = re.compile(r"\w[\w.-]*")
"""The names of arms and jobs: neither "..", nor anything that a command takes for a flag."""


def arm_settings(settings: Settings) -> dict[str, Settings]:
    """The checked settings of every arm; an experiment without arms is its own only arm, named after it.

    Args:
      settings: settings of the experiment.

    Returns:
      name -> settings without arms, in order.

    Raises:
      ValueError: a key is unknown, a value cannot be used, or two values do not go together.
    """
    whole, arms = dataclasses.replace(settings, arms={}), {}
    for name, changes in (dict(settings.arms) or {settings.name: {}}).items():
        if not FOLDER_NAME.fullmatch(name):
            raise ValueError(
                f"config.arms: the name {name!r} becomes a folder; use letters, digits, '.', '_' and '-', the first "
                "a letter, a digit or '_'"
            )
        arms[name] = dataclasses.replace(replaced(whole, changes, f"config.arms.{name}"), arms={})
        for complaint in _complaints(arms[name]):
            raise ValueError(complaint)
        check_transforms(arms[name])
    return arms


def _complaints(settings: Settings) -> Iterator[str]:
    """What does not go together in the settings, in messages for the user."""
    data, model, privacy, train = settings.data, settings.model, settings.privacy, settings.train
    if train.epochs is not None and train.num_steps is not None:
        yield "give config.train.epochs or config.train.num_steps, and not both; with neither a run has 3 epochs"
    if data.task == "auto":
        yield (
            "config.data.task='auto' is what --train=DATA means without a task; in a file of settings, name one of "
            f"{', '.join(OWN_TASKS)}"
        )
    if privacy.evaluation_epsilon is not None and (model.head == "causal_lm" or math.isinf(privacy.evaluation_epsilon)):
        yield (
            f"config.privacy.evaluation_epsilon={privacy.evaluation_epsilon} gives accuracies noise, and has to be "
            "finite; a decoder has none, and shows rows of its evaluation data: leave it out"
        )
    if privacy.noise_bands > 1 and (data.user_column is not None or privacy.clip_quantile is not None):
        other = "data.user_column" if data.user_column is not None else "privacy.clip_quantile"
        yield (
            f"config.privacy.noise_bands={privacy.noise_bands} does not go with config.{other}, with which the "
            "guarantee of correlated noise is not derived here: leave one of them out"
        )
    if math.isinf(privacy.epsilon) and privacy.clip == "automatic":
        yield "config.privacy.epsilon=inf switches clipping off; config.privacy.clip='automatic' needs a finite one"
    unused = [name for name in OF_OWN_TASKS if getattr(data, name) != getattr(Data(), name)]
    if unused and data.task not in OWN_TASKS:
        yield (
            f"config.data.{unused[0]}={getattr(data, unused[0])!r} is for one's own data; leave it out, or let "
            f"config.data.task be one of {', '.join(OWN_TASKS)} in the place of {data.task!r}"
        )
    if (data.task in CAUSAL_TASKS) != (model.head == "causal_lm"):
        yield (
            f"config.data.task={data.task!r} and config.model.head={model.head!r} do not go together: "
            f"{', '.join(CAUSAL_TASKS)} need 'causal_lm', the others one of the encoder's heads"
        )
    if model.tuning != "full" and model.trainable != ".*":
        yield (
            f"config.model.trainable={model.trainable!r} belongs to config.model.tuning='full'; "
            f"{model.tuning!r} says itself what trains, so leave config.model.trainable out"
        )
    if model.flash_attention and train.clipping_method == "vmap":
        yield (
            "config.model.flash_attention does not go with config.train.clipping_method='vmap', under which cuDNN's "
            "kernel cannot be traced; choose another method"
        )
    try:
        decoding(settings.generation)
    except ValueError as error:
        yield f"config.generation: {error}"
