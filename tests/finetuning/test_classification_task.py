"""Classification tasks of models as they come: words without a row, labels in another order, layers that are absent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.classification import load_glue_task
from dp_rmt.models import SequenceClassifier, init_params, load_pretrained, load_tokenizer, save_pretrained
from dp_rmt.trees import leaves_by_path

MakeConfig = Callable[..., Settings]


def planned(num_rows: int, users: Any) -> None:
    """No plan is printed."""


def test_a_tokenizer_with_words_that_the_model_has_no_row_for_is_refused(
    make_config: MakeConfig, model: Path, tmp_path: Path
) -> None:
    """Their embedding would be NaN, and so the logits of the texts that have them."""
    folder = shutil.copytree(model, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["[USER]"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=rf"has the token '\[USER\]' with id {rows}, but the model's .* has {rows} rows"
    ):
        load_glue_task(make_config({"model.path": str(folder)}), planned)


def test_a_classifier_that_was_trained_before_keeps_its_labels(
    make_config: MakeConfig, model: Path, tmp_path: Path
) -> None:
    encoder, _ = load_pretrained(model, head="masked_lm")
    module = SequenceClassifier(encoder.config, 2)
    params = init_params(module, jax.random.key(3))
    names, tokenizer = ("POSITIVE", "NEGATIVE"), load_tokenizer(model)
    save_pretrained(tmp_path / "trained", module, params, tokenizer=tokenizer, label_names=names)
    task = load_glue_task(make_config({"model.path": str(tmp_path / "trained")}), planned)
    assert task.label_names == ("negative", "positive")
    np.testing.assert_array_equal(task.params["classifier"]["kernel"], params["classifier"]["kernel"][:, ::-1])
    names = ("anger", "joy")
    save_pretrained(tmp_path / "other", module, params, tokenizer=tokenizer, label_names=names)
    with pytest.raises(ValueError, match=r"names the labels anger, joy, but those of the data are negative, positive"):
        load_glue_task(make_config({"model.path": str(tmp_path / "other")}), planned)


@pytest.mark.parametrize(
    "changes",
    [
        {"tuning": "lora", "trainable": ".*"},
        {"tuning": "bias", "trainable": ".*"},
        {"tuning": "full", "trainable": "^classifier/"},
    ],
    ids=lambda changes: changes["tuning"],
)
def test_a_pooler_that_the_file_lacks_trains(changes: dict[str, str], make_config: MakeConfig) -> None:
    """The folder is that of a masked language model, so that the pooler is drawn at random."""
    task = load_glue_task(make_config({f"model.{name}": value for name, value in changes.items()}), planned)
    trained = {path for path in dict(leaves_by_path(task.params)) if re.search(task.trainable, path)}
    assert {"pooler/kernel", "pooler/bias", "classifier/kernel", "classifier/bias"} <= trained
    assert not any(path.startswith("encoder") and path.endswith("kernel") and "lora" not in path for path in trained)
