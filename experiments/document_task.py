"""Documents as they are, and a decoder: what memorisation is measured on."""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from dp_rmt.data import DocumentSet, load_documents, tokenize_documents
from dp_rmt.models import DecoderConfig, load_pretrained, load_tokenizer
from dp_rmt.training.evaluation import make_loss_evaluator
from dp_rmt.training.losses import completion_losses
from experiments.task import Task, adapted, check_length, group_lengths, resolve_model_path


def read_documents_of(data: ConfigDict) -> DocumentSet:
    """The documents that `config.data` names."""
    return load_documents(
        data.task,
        path=data.path,
        sensitive=data.sensitive,
        max_train_examples=data.max_train_examples,
        skip_lines=data.skip_lines,
    )


def load_document_task(config: ConfigDict) -> Task:
    """Reads documents and a decoder, and checks that they fit each other.

    Args:
      config: data, model and seed of `configs.base`.

    Returns:
      A `Task` with the loss of all tokens; its arrays have a ``sensitive_mask``, which training does not look at.

    Raises:
      ValueError, FileNotFoundError: something is missing, broken or does not fit; the message says what to do.
    """
    data, model = config.data, config.model
    documents = read_documents_of(data)
    folder = resolve_model_path(model.path)
    module, params = load_pretrained(
        folder, head="causal_lm", key=jax.random.key(config.seed), dtype=model.dtype, remat=model.remat
    )
    assert isinstance(module.config, DecoderConfig)
    tokenizer = load_tokenizer(folder, vocab_size=module.config.vocab_size)
    check_length(data.max_length, module.config.max_position_embeddings, folder)
    module, params, trainable = adapted(config, module, params)
    splits = {"train": documents.train}
    splits |= {name: rows[slice(data.max_eval_documents)] for name, rows in documents.evaluations.items()}
    arrays = {name: tokenize_documents(rows, tokenizer, max_length=data.max_length) for name, rows in splits.items()}
    losses, lengths = completion_losses(module), group_lengths(data)
    return Task(
        train=arrays.pop("train"),
        evaluations=arrays,
        lengths=lengths,
        tokenizer=tokenizer,
        module=module,
        params=params,
        trainable=trainable,
        losses=losses,
        evaluator=lambda arrays, batch_size: make_loss_evaluator(
            losses, arrays, lengths=lengths, batch_size=batch_size
        ),
    )
