"""Documents as they are, and a decoder: what memorisation is measured on."""

from __future__ import annotations

from dp_rmt.data import DocumentSet, load_documents, tokenize_documents
from dp_rmt.finetuning.settings import Data, Settings
from dp_rmt.finetuning.tasks.task import Task, delta_for, group_lengths, load_decoder, loss_evaluator
from dp_rmt.training.losses import completion_losses


def read_documents_of(data: Data) -> DocumentSet:
    """The documents that `config.data` names."""
    return load_documents(
        data.task,
        path=data.path,
        sensitive=data.sensitive,
        max_train_examples=data.max_train_examples,
        skip_lines=data.skip_lines,
    )


def load_document_task(settings: Settings) -> Task:
    """Reads documents and a decoder, and checks that they fit each other.

    Args:
      settings: their data, model and seed.

    Returns:
      A `Task` with the loss of all tokens; its arrays have a ``sensitive_mask``, which training does not look at.

    Raises:
      ValueError, FileNotFoundError: something is missing, broken or does not fit; the message says what to do.
    """
    data = settings.data
    documents = read_documents_of(data)
    delta_for(settings.privacy, len(documents.train))
    module, params, trainable, tokenizer = load_decoder(settings)
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
        evaluator=loss_evaluator(losses, lengths),
    )
