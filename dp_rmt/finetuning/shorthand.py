"""A model, data and an epsilon in a few words, as `dp_rmt.finetune` and ``dp-rmt finetune`` take them.

Nothing here imports JAX.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_rmt.finetuning.options import kinds, walk
from dp_rmt.finetuning.settings import DocumentTaskName, GlueTaskName, Settings, TextTaskName

_CAUSAL = (*typing.get_args(TextTaskName), *typing.get_args(DocumentTaskName))
_ON_THE_HUB = (*typing.get_args(GlueTaskName), "e2e", "dart")
EPOCHS = 3.0
"""The length of a run if neither epochs nor num_steps are given."""


def settings_from(
    model: str | None = None,
    train: str | Path | None = None,
    epsilon: float | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of a run that is described in a few words; all else has its default.

    Args:
      model: folder, name on the hub, or package:NAME/FOLDER.
      train: what is trained on: a CSV, TSV or JSONL file of labelled text (`data.text_columns`, `data.label_column`), a
        folder of such files, the name of a task, which then comes from the hub, or the folder of the task that
        `data.task` names.
      epsilon: the privacy budget.
      changes: any settings by name: nested, dotted, or the last part of a dotted name, if only one setting has it.

    Returns:
      The settings. Unless changed, a text or document task has the head "causal_lm", and a run is 3 epochs long.

    Raises:
      ValueError: there is no such setting, or its value cannot be used.
      FileNotFoundError: there is neither a file nor a folder nor a task of this name.

    >>> settings = settings_from("roberta-base", "sst2", 3.0, {"num_steps": 100, "data": {"max_length": 32}})
    >>> settings.data.task, settings.model.path, settings.privacy.epsilon, settings.train.num_steps
    ('sst2', 'roberta-base', 3.0, 100)
    """
    return completed(
        started(model, train, epsilon).changed({_full_name(key): value for key, value in (changes or {}).items()})
    )


def started(model: str | None, train: str | Path | None, epsilon: float | None) -> Settings:
    """The settings that follow from these three, before others are changed; errors as in `settings_from`."""
    changes: dict[str, Any] = {} if train is None else _data(str(train))
    changes |= {} if model is None else {"model.path": model}
    changes |= {} if epsilon is None else {"privacy.epsilon": epsilon}
    return Settings().changed(changes)


def completed(settings: Settings) -> Settings:
    """The settings with a decoder's head and a length filled in where they are needed and not given."""
    if settings.data.task in _CAUSAL and settings.model.head == "classification":
        settings = settings.changed({"model.head": "causal_lm"})
    if settings.train.epochs is None and settings.train.num_steps is None:
        settings = settings.changed({"train.epochs": EPOCHS})
    return settings


def _full_name(key: str) -> str:
    """The dotted name of a setting that is given by its last part."""
    if "." in key or key in kinds(Settings):
        return key
    names = [name.split(".") for name, *_ in walk(Settings) if not name.startswith("synthetic.")]
    found = list(dict.fromkeys(".".join(name[: name.index(key) + 1]) for name in names if key in name[1:]))
    if len(found) > 1:
        raise ValueError(
            f"{key}: which of {', '.join(found)} is meant? Give the whole name, as in **{{{found[0]!r}: ...}}"
        )
    return found[0] if found else key


def _data(train: str) -> dict[str, Any]:
    if train in _ON_THE_HUB:
        return {"data.task": train}
    if not Path(train).exists():
        raise FileNotFoundError(
            f"train={train!r}: there is no such file or folder, nor such a task; the hub has {', '.join(_ON_THE_HUB)}"
        )
    return {"data.path": train, "data.task": "labelled_table"}
