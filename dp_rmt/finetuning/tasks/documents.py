"""Documents as they are, and a decoder; memorisation is measured on these."""

from __future__ import annotations

from dp_rmt.data import DocumentSet, Source, load_documents, tokenize_documents
from dp_rmt.finetuning.data_settings import Data
from dp_rmt.finetuning.plan import Planned
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.task import (
    NOTHING_TO_EVALUATE,
    Task,
    decoder_task,
    load_decoder,
    num_units,
    own_extras,
)


def read_documents_of(data: Data, source: Source | None) -> DocumentSet:
    """The documents that `config.data` names, or that come from Python."""
    return load_documents(
        data.task,
        path=source,
        sensitive=data.sensitive,
        max_train_examples=data.max_train_examples,
        skip_lines=data.skip_lines,
        text_column=data.text_columns[0],
        extras=own_extras(data),
        user_column=data.user_column,
    )


def load_document_task(settings: Settings, source: Source | None, planned: Planned) -> Task:
    """The task of documents and a decoder; arguments and errors as in `assemble.load_task`.

    Args:
      settings: data, model and seed are read.
      source: what `config.data.path` names, or rows from Python.
      planned: told the number of documents, or of their users.

    Returns:
      A `Task` with the loss of all tokens; its arrays have a ``sensitive_mask``, which training does not look at.
    """
    data = settings.data
    documents = read_documents_of(data, source)
    users = tuple(document.user for document in documents.train if document.user)
    notes = (*documents.notes, *([] if documents.evaluations else [NOTHING_TO_EVALUATE]))
    planned(num_units(users, len(documents.train)), notes)
    decoder = load_decoder(settings)
    splits = {"train": documents.train}
    splits |= {name: rows[slice(data.max_eval_documents)] for name, rows in documents.evaluations.items()}
    arrays = {
        name: tokenize_documents(rows, decoder.tokenizer, max_length=data.max_length) for name, rows in splits.items()
    }
    return decoder_task(settings, decoder, arrays, prompts=None, users=users)
