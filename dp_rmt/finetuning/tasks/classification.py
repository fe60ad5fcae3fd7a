"""Classification of sentences: GLUE data or labelled text of one's own, and an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dp_rmt.data import (
    Columns,
    Examples,
    Infilling,
    Source,
    label_word_ids,
    load_glue,
    load_labelled_table,
    tokenize_cached,
    tokenize_classification,
)
from dp_rmt.finetuning.plan import Planned
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.classifier import Classifier
from dp_rmt.finetuning.tasks.task import (
    NOTHING_TO_EVALUATE,
    Task,
    adapted,
    check_length,
    group_lengths,
    num_units,
    own_extras,
    resolve_model_path,
)
from dp_rmt.models import EncoderConfig, load_pretrained, load_tokenizer
from dp_rmt.training.evaluation import make_evaluator
from dp_rmt.training.losses import classifier_logits, infilling_logits, label_losses


def load_glue_task(settings: Settings, planned: Planned) -> Task:
    """The task of GLUE data and an encoder; arguments and errors as in `assemble.load_task`."""
    data = settings.data
    glue = load_glue(data.task, path=data.path, max_train_examples=data.max_train_examples, dropped=data.drop_labels)
    infilling = glue.task.infilling if settings.model.head == "infilling" else None
    if settings.model.head == "infilling" and infilling is None:
        raise ValueError(f"config.model.head='infilling': {data.task} has no prompt; use 'classification'")
    splits = {"train": glue.train, **glue.evaluations}
    if data.user_column is not None:
        raise ValueError(f"config.data.user_column={data.user_column!r}: the rows of {data.task} have no person's id")
    planned(len(glue.train), ())
    return _classification_task(settings, splits, glue.task.label_names, glue.task.metrics, infilling)


def load_labelled_task(settings: Settings, source: Source, planned: Planned) -> Task:
    """The task of labelled text of one's own and an encoder; arguments and errors as in `assemble.load_task`."""
    data = settings.data
    if settings.model.head == "infilling":
        raise ValueError(
            "config.model.head='infilling': labelled text of one's own has no prompt; use 'classification'"
        )
    columns = Columns(
        data.text_columns, data.label_column, data.labels, data.regression, data.drop_labels, data.user_column
    )
    table = load_labelled_table(source, columns, extras=own_extras(data), max_train_examples=data.max_train_examples)
    count = num_units(table.train.users, len(table.train))
    planned(count, (*table.notes, *([] if table.evaluations else [NOTHING_TO_EVALUATE])))
    metrics = ("pearson", "spearman") if data.regression else ("accuracy",)
    return _classification_task(settings, {"train": table.train, **table.evaluations}, table.labels, metrics, None)


def _classification_task(
    settings: Settings,
    splits: Mapping[str, Examples],
    names: Sequence[str],
    metrics: Sequence[str],
    infilling: Infilling | None,
) -> Task:
    """The task of these rows: an encoder that tells the named classes apart, or scores texts if there are none."""
    data, model = settings.data, settings.model
    folder = resolve_model_path(model.path)
    module, params = load_pretrained(
        folder,
        head="masked_lm" if infilling else "classification",
        num_labels=max(len(names), 1),
        label_names=None if infilling else (tuple(names) or None),
        key=jax.random.key(settings.seed),
        dtype=model.dtype,
        remat=model.remat,
        flash_attention=model.flash_attention,
    )
    assert isinstance(module.config, EncoderConfig)
    tokenizer = load_tokenizer(folder, vocab_size=module.config.vocab_size)
    check_length(data.max_length, module.config.max_sequence_length, folder)
    module, params, trainable = adapted(settings, module, params)
    layout: dict[str, Any] = {"max_length": data.max_length, "infilling": infilling}
    arrays = {
        split: tokenize_cached(examples, tokenizer, cache_dir=Path(data.cache_dir).expanduser(), **layout)
        for split, examples in splits.items()
    }
    if infilling is None:
        logits = classifier_logits(module)
    else:
        logits = infilling_logits(module, label_word_ids(tokenizer, infilling))
    lengths = group_lengths(data)
    return Task(
        train=arrays.pop("train"),
        evaluations=arrays,
        lengths=lengths,
        tokenizer=tokenizer,
        module=module,
        params=params,
        trainable=trainable,
        losses=lambda params, batch: label_losses(logits(params, batch), batch["label"]),
        evaluator=lambda arrays, batch_size: make_evaluator(
            logits, arrays, metrics=metrics, lengths=lengths, batch_size=batch_size
        ),
        label_names=None if infilling else (tuple(names) or None),
        num_labels=len(names) or None,
        classifier=Classifier(
            tuple(names),
            logits,
            lambda examples: tokenize_classification(examples, tokenizer, **layout),
            settings.train.eval_batch_size,
            splits["train"].text_pairs is not None,
        ),
        users=splits["train"].users,
    )
