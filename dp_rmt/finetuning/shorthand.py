"""A model, data and an epsilon in a few words, as `dp_rmt.finetune` and ``dp-rmt finetune`` take them.

Nothing here imports JAX.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_rmt.finetuning.options import kinds, walk
from dp_rmt.finetuning.settings import Data, DocumentTaskName, Settings, TextTaskName

EPOCHS = 3.0
"""Length of a run whose length is not given."""


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
      changes: any settings, by name: nested, dotted, or the last part of a dotted name where that says enough.

    Returns:
      The settings; of a text or document task with the head "causal_lm", and 3 epochs long, unless changed.

    Raises:
      ValueError: there is no such setting, or its value cannot be used.
      FileNotFoundError: there is neither a file nor a folder nor a task of this name.

    >>> settings = settings_from("roberta-base", "sst2", 3.0, {"num_steps": 100, "data": {"max_length": 32}})
    >>> settings.data.task, settings.model.path, settings.privacy.epsilon, settings.train.num_steps
    ('sst2', 'roberta-base', 3.0, 100)
    """
    given = Settings() if model is None else Settings().changed({"model.path": model})
    if epsilon is not None:
        given = given.changed({"privacy.epsilon": epsilon})
    if train is not None:
        given = given.changed(_data(str(train)))
    settings = given.changed({_full_name(key): value for key, value in (changes or {}).items()})
    causal = (*typing.get_args(TextTaskName), *typing.get_args(DocumentTaskName))
    if settings.data.task in causal and settings.model.head == given.model.head:
        settings = settings.changed({"model.head": "causal_lm"})
    if settings.train.epochs is None and settings.train.num_steps is None:
        settings = settings.changed({"train.epochs": EPOCHS})
    return settings


def _full_name(key: str) -> str:
    """The dotted name of a setting that is given by its last part."""
    if "." in key or key in kinds(Settings):
        return key
    found = [
        full for full, *_ in walk(Settings) if full.rpartition(".")[2] == key and not full.startswith("synthetic.")
    ]
    if len(found) > 1:
        raise ValueError(
            f"{key}: which of {', '.join(found)} is meant? Give the whole name, as in **{{{found[0]!r}: ...}}"
        )
    return found[0] if found else key


def _data(train: str) -> dict[str, Any]:
    tasks = [name for kind in typing.get_args(kinds(Data)["task"]) for name in typing.get_args(kind)]
    if train in tasks:
        return {"data.task": train}
    if not Path(train).exists():
        raise FileNotFoundError(
            f"train={train!r}: there is no such file or folder, nor such a task; the tasks are {', '.join(tasks)}"
        )
    return {"data.path": train, "data.task": "labelled_table"}
