"""The names of a classifier's logits: `id2label` in `config.json`, and the order that a caller has them in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from dp_rmt.models.heads import SequenceClassifier
from dp_rmt.models.huggingface.names import LeafName, Model


def label_rows(hf_config: Mapping[str, Any], label_names: Sequence[str], where: str) -> tuple[int, ...]:
    """Finds the logit of each label in a trained classifier by the names that its file gives them.

    Names are equal if they differ in upper and lower case, or in what stands between words, alone.

    Args:
        hf_config: the content of `config.json`.
        label_names: the caller's classes, in the caller's order.
        where: the file, for messages.

    Returns:
        For each class of the caller the number of the logit in the file.

    Raises:
        ValueError: the file names other labels.

    >>> config = {"id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}}
    >>> label_rows(config, ("entailment", "neutral", "contradiction"), "config.json")
    (2, 1, 0)
    """
    given = hf_config.get("id2label") or {}
    names = {int(number): str(name) for number, name in given.items()}
    if all(name == f"LABEL_{number}" for number, name in names.items()):  # what transformers writes for no names
        logging.warning(
            "%s gives the labels of its classifier no names (id2label): they are taken to be %s, in this order",
            where,
            ", ".join(label_names),
        )
        return tuple(range(len(label_names)))
    numbers = {_plain(name): number for number, name in names.items()}
    wanted = [_plain(name) for name in label_names]
    if sorted(numbers) != sorted(wanted) or sorted(names) != list(range(len(wanted))):
        raise ValueError(
            f"{where}: id2label names the labels {', '.join(names.values())}, but those of the data are "
            f"{', '.join(label_names)}; which is which? Write the data's names into id2label, each at the number of "
            "its logit, or start from the pre-trained model that this classifier was fine-tuned from"
        )
    return tuple(numbers[name] for name in wanted)


def in_label_order(module: Model, leaf: LeafName, values: Any) -> Any:
    """The values of a leaf of a file, with the logits of a classifier in the module's order."""
    return values[..., np.array(_rows(module))] if _has_logits(module, leaf) else values


def in_file_order(module: Model, leaf: LeafName, values: Any) -> Any:
    """The inverse of `in_label_order`."""
    return values[..., np.argsort(_rows(module))] if _has_logits(module, leaf) else values


def _rows(module: Model) -> tuple[int, ...]:
    return module.label_rows if isinstance(module, SequenceClassifier) else ()


def _has_logits(module: Model, leaf: LeafName) -> bool:
    return bool(_rows(module)) and leaf.path[0] == "classifier"


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_") or name
