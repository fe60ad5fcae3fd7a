"""Text from tables or instructions: E2E, DART or the user's own rows, and a decoder."""

from __future__ import annotations

import math
from pathlib import Path

from dp_rmt.data import TextPairs, TextReferences, load_table_to_text, tokenize_completions, tokenize_prompts
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.task import Prompts, Task, delta_for, group_lengths, load_decoder, loss_evaluator
from dp_rmt.training.losses import completion_losses


def load_text_task(settings: Settings) -> Task:
    """Reads pairs of source and text, and a decoder, and checks that they fit each other.

    Args:
      settings: their data, model, generation and seed.

    Returns:
      A `Task` with the loss of the texts' own tokens, and the prompts to write for.

    Raises:
      ValueError, FileNotFoundError: something is missing, broken or does not fit; the message says what to do.
    """
    data = settings.data
    texts = load_table_to_text(
        data.task, path=data.path, max_train_examples=data.max_train_examples, train_split=data.train_split
    )
    delta_for(settings.privacy, len(texts.train))
    module, params, trainable, tokenizer = load_decoder(settings)

    def tokenize(pairs: TextPairs):
        return tokenize_completions(
            pairs, tokenizer, max_length=data.max_length, cache_dir=Path(data.cache_dir).expanduser()
        )

    losses, lengths = completion_losses(module), group_lengths(data)
    compared = {name: rows for name, rows in texts.evaluations.items() if rows.has_references}
    written = settings.generation.split
    if written not in compared:
        raise ValueError(
            f"config.generation.split={written!r}: there is no such split with references; choose from "
            f"{', '.join(compared) or 'nothing'}"
        )
    chosen = _spread(compared[written], settings.generation.max_prompts)
    room = module.config.max_position_embeddings - settings.generation.max_new_tokens
    prompts = tokenize_prompts(chosen.sources, tokenizer, max_length=room)
    watched = {name: rows for name, rows in compared.items() if name != written} or {written: chosen}
    return Task(
        train=tokenize(texts.train),
        evaluations={name: tokenize(rows.pairs()) for name, rows in watched.items()},
        lengths=lengths,
        tokenizer=tokenizer,
        module=module,
        params=params,
        trainable=trainable,
        losses=losses,
        evaluator=loss_evaluator(losses, lengths),
        prompts=Prompts(written, chosen.sources, prompts, chosen.references),
    )


def _spread(rows: TextReferences, most: int | None) -> TextReferences:
    """At most so many rows, evenly spaced: neighbours are often about the same thing."""
    return rows[:: math.ceil(len(rows) / most)] if most else rows
