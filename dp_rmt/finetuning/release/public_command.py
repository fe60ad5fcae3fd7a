"""The command that trains such a model, made of settings that may be published.

It is an allow-list by type. Numbers, switches and choices are shown; text that a user typed, such as a path, a column
or the name of a run, becomes a word in capitals. So a new option is private until it is named here.
"""

from __future__ import annotations

import shlex
import typing
from typing import Any

from dp_rmt.finetuning.data_settings import PUBLISHED_TASKS
from dp_rmt.finetuning.options import walk
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.workdir import is_secret

NAMES_OF_PARTS = ("denoise", "optimizer", "model.trainable", "model.lora.targets", "checkpoints.score")
"""Options that are text, and name parts of the library or of the model."""
_ELSEWHERE = ("name", "arms", "model.path", "privacy.epsilon", "data.path", "data.cache_dir")
_GROUPS_ELSEWHERE = ("release.", "mesh.", "checkpoints.", "synthetic.")


def public_command(settings: Settings, base_model: str | None) -> str:
    """The command of these settings, for a shell; the options that have their default are left out.

    Args:
      settings: of one arm.
      base_model: public name of the pre-trained model on the hub; None if it is not known.

    >>> public_command(Settings().changed({"train.num_steps": 9, "data.path": "/home/me/x.csv"}), "roberta-base")
    'dp-rmt finetune --model=roberta-base --train=DATA --epsilon=8.0 --config.data.task=sst2 --config.train.num_steps=9'
    """
    words = ["dp-rmt", "finetune"]
    if settings.synthetic is not None:
        words += ["--config=CONFIG.py", f"--config.privacy.epsilon={settings.privacy.epsilon}"]
    else:
        is_named = settings.data.path is None and settings.data.task in PUBLISHED_TASKS
        train = settings.data.task if is_named else "DATA"
        words += [f"--model={base_model or 'MODEL'}", f"--train={train}", f"--epsilon={settings.privacy.epsilon}"]
        if not is_named:
            words.append(f"--config.data.task={settings.data.task}")
    started = Settings().changed({"data.task": settings.data.task})
    for key, kind, _ in walk(Settings):
        if key in _ELSEWHERE or key.startswith(_GROUPS_ELSEWHERE) or is_secret(key):
            continue
        value = _value(settings, key)
        if value != _value(started, key):
            shown = key.rpartition(".")[2].upper() if _is_typed(key, kind) else str(value)
            words.append(f"--config.{key}={shown}")
    if settings.synthetic is not None:
        words += [f"--config.synthetic.{key}={value}" for key, value in settings.synthetic.as_dict().items()]
    return shlex.join(words)


def _is_typed(key: str, kind: Any) -> bool:
    """Whether the option holds text that a user typed, rather than a number, a switch, a choice or a part's name."""
    return key not in NAMES_OF_PARTS and str in (kind, *_parts(kind))


def _parts(kind: Any) -> list[Any]:
    inner = [] if typing.get_origin(kind) is typing.Literal else [*typing.get_args(kind)]
    return inner + [part for each in inner for part in _parts(each)]


def _value(settings: Settings, key: str) -> Any:
    found: Any = settings
    for part in key.split("."):
        found = getattr(found, part)
    return found
