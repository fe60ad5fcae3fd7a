"""Documents as they are, and a decoder; memorisation is measured on these."""

from __future__ import annotations

from dp_rmt.data import DocumentSet, load_documents, tokenize_documents
from dp_rmt.finetuning.settings import Data, Settings
from dp_rmt.finetuning.tasks.task import Task, decoder_task, delta_for, load_decoder


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
    """The task of documents and a decoder; arguments and errors as in `assemble.load_task`.

    Returns:
      A `Task` with the loss of all tokens; its arrays have a ``sensitive_mask``, which training does not look at.
    """
    data = settings.data
    documents = read_documents_of(data)
    delta_for(settings.privacy, len(documents.train))
    decoder = load_decoder(settings)
    splits = {"train": documents.train}
    splits |= {name: rows[slice(data.max_eval_documents)] for name, rows in documents.evaluations.items()}
    arrays = {
        name: tokenize_documents(rows, decoder.tokenizer, max_length=data.max_length) for name, rows in splits.items()
    }
    return decoder_task(settings, decoder, arrays, prompts=None)
