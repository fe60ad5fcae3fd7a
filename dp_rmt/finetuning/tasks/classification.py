"""Classification of sentences: GLUE data and an encoder."""

from __future__ import annotations

from pathlib import Path

import jax

from dp_rmt.data import label_word_ids, load_glue, tokenize_cached
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.task import Task, adapted, check_length, delta_for, group_lengths, resolve_model_path
from dp_rmt.models import EncoderConfig, load_pretrained, load_tokenizer
from dp_rmt.training.evaluation import make_evaluator
from dp_rmt.training.losses import classifier_logits, infilling_logits, label_losses


def load_glue_task(settings: Settings) -> Task:
    """Reads GLUE data and an encoder, and checks that they fit each other.

    Args:
      settings: their data, model and seed.

    Returns:
      A `Task` that classifies.

    Raises:
      ValueError, FileNotFoundError: something is missing, broken or does not fit; the message says what to do.
    """
    data, model = settings.data, settings.model
    glue = load_glue(data.task, path=data.path, max_train_examples=data.max_train_examples)
    delta_for(settings.privacy, len(glue.train))
    folder = resolve_model_path(model.path)
    tokenizer = load_tokenizer(folder)
    infilling = glue.task.infilling if model.head == "infilling" else None
    if model.head == "infilling" and infilling is None:
        raise ValueError(f"config.model.head='infilling': {data.task} has no prompt; use 'classification'")
    module, params = load_pretrained(
        folder,
        head="masked_lm" if infilling else "classification",
        num_labels=glue.task.num_labels,
        key=jax.random.key(settings.seed),
        dtype=model.dtype,
        remat=model.remat,
        flash_attention=model.flash_attention,
    )
    assert isinstance(module.config, EncoderConfig)
    check_length(data.max_length, module.config.max_sequence_length, folder)
    module, params, trainable = adapted(settings, module, params)

    def tokenize(examples):
        return tokenize_cached(
            examples,
            tokenizer,
            max_length=data.max_length,
            infilling=infilling,
            cache_dir=Path(data.cache_dir).expanduser(),
        )

    if infilling is None:
        logits = classifier_logits(module)
    else:
        logits = infilling_logits(module, label_word_ids(tokenizer, infilling))
    lengths = group_lengths(data)
    return Task(
        train=tokenize(glue.train),
        evaluations={name: tokenize(examples) for name, examples in glue.evaluations.items()},
        lengths=lengths,
        tokenizer=tokenizer,
        module=module,
        params=params,
        trainable=trainable,
        losses=lambda params, batch: label_losses(logits(params, batch), batch["label"]),
        evaluator=lambda arrays, batch_size: make_evaluator(
            logits, arrays, metrics=glue.task.metrics, lengths=lengths, batch_size=batch_size
        ),
        label_names=None if infilling else (tuple(glue.task.label_names) or None),
        num_labels=None if glue.task.is_regression else glue.task.num_labels,
    )
