"""Text from tables or instructions: E2E, DART or the user's own rows, and a decoder."""

from __future__ import annotations

import math
from pathlib import Path

from dp_rmt.data import TextPairs, TextReferences, load_table_to_text, tokenize_completions, tokenize_prompts
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.task import Prompts, Task, decoder_task, delta_for, load_decoder


def load_text_task(settings: Settings) -> Task:
    """The task of sources, their texts and a decoder; arguments and errors as in `assemble.load_task`.

    Returns:
      A `Task` with the loss of the texts' own tokens, and the prompts to write for.
    """
    data = settings.data
    texts = load_table_to_text(
        data.task, path=data.path, max_train_examples=data.max_train_examples, train_split=data.train_split
    )
    delta_for(settings.privacy, len(texts.train))
    decoder = load_decoder(settings)

    def tokenize(pairs: TextPairs):
        return tokenize_completions(
            pairs, decoder.tokenizer, max_length=data.max_length, cache_dir=Path(data.cache_dir).expanduser()
        )

    compared = {name: rows for name, rows in texts.evaluations.items() if rows.has_references}
    written = settings.generation.split
    if written not in compared:
        raise ValueError(
            f"config.generation.split={written!r}: there is no such split with references; choose from "
            f"{', '.join(compared) or 'nothing'}"
        )
    chosen = _spread(compared[written], settings.generation.max_prompts)
    room = decoder.module.config.max_position_embeddings - settings.generation.max_new_tokens
    token_ids = tokenize_prompts(chosen.sources, decoder.tokenizer, max_length=room)
    watched = {name: rows for name, rows in compared.items() if name != written} or {written: chosen}
    arrays = {"train": tokenize(texts.train), **{name: tokenize(rows.pairs()) for name, rows in watched.items()}}
    return decoder_task(settings, decoder, arrays, Prompts(written, chosen.sources, token_ids, chosen.references))


def _spread(rows: TextReferences, most: int | None) -> TextReferences:
    """At most this many rows, evenly spaced, because neighbours are often about the same thing."""
    return rows[:: math.ceil(len(rows) / most)] if most else rows
