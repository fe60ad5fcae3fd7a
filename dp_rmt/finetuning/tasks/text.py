"""Text from text: E2E, DART or the user's own rows, and a decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from dp_rmt.data import (
    PromptFormat,
    Shape,
    Source,
    TextPairs,
    TextReferences,
    load_own_pairs,
    load_table_to_text,
    prompt_format_of,
    tokenize_completions,
    tokenize_prompts,
)
from dp_rmt.finetuning.data_settings import Data
from dp_rmt.finetuning.plan import Planned
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.task import (
    NOTHING_TO_EVALUATE,
    Decoder,
    Prompts,
    Task,
    decoder_task,
    load_decoder,
    num_units,
    own_extras,
)


def load_text_task(settings: Settings, planned: Planned) -> Task:
    """The task of E2E or DART and a decoder; arguments and errors as in `assemble.load_task`.

    Returns:
      A `Task` with the loss of the texts' own tokens, and the prompts to write for.
    """
    data = settings.data
    texts = load_table_to_text(
        data.task, path=data.path, max_train_examples=data.max_train_examples, train_split=data.train_split
    )
    train = texts.train
    if data.user_column == "source":
        train = dataclasses.replace(train, users=train.sources)
    elif data.user_column is not None:
        raise ValueError(f"config.data.user_column={data.user_column!r}: of {data.task} it can be 'source' alone")
    planned(num_units(train.users, len(train)), ())
    compared = {name: rows for name, rows in texts.evaluations.items() if rows.has_references}
    written = settings.generation.split
    if written not in compared:
        raise ValueError(
            f"config.generation.split={written!r}: there is no such split with references; choose from "
            f"{', '.join(compared) or 'nothing'}"
        )
    decoder = load_decoder(settings)
    # The published numbers are those of the separator, whatever template the tokenizer may have.
    wanted = "separator" if data.prompt_format == "auto" else data.prompt_format
    return _text_task(settings, decoder, prompt_format_of(decoder.tokenizer, wanted), train, compared, written)


def load_own_text_task(settings: Settings, source: Source, planned: Planned) -> Task:
    """The task of text from text of one's own and a decoder; arguments and errors as in `assemble.load_task`.

    Returns:
      A `Task` with the loss of the answers' own tokens. It writes for `config.generation.split`, or the other split if
      only that has rows; without both there are no prompts, and nothing is evaluated.
    """
    data = settings.data
    texts = load_own_pairs(
        source,
        _shape(data),
        extras=own_extras(data),
        max_train_examples=data.max_train_examples,
        user_column=data.user_column,
    )
    compared = {name: rows for name, rows in texts.evaluations.items() if rows.has_references}
    wanted = settings.generation.split
    written = wanted if wanted in compared else next(iter(compared), None)
    notes = list(texts.notes)
    if written is None:
        notes.append(f"{NOTHING_TO_EVALUATE}, and no texts are written")
    elif written != wanted:
        notes.append(f"there are no answers to compare with in {wanted}, so that texts are written for {written}")
    planned(num_units(texts.train.users, len(texts.train)), notes)
    decoder = load_decoder(settings)
    prompt_format = prompt_format_of(decoder.tokenizer, data.prompt_format)
    return _text_task(settings, decoder, prompt_format, texts.train, compared, written)


def _shape(data: Data) -> Shape | None:
    """The columns that are named; None if none are."""
    named = (data.source_column, data.target_column, data.messages_column)
    if named == (None, None, None):
        return None
    if (data.messages_column is None) == (data.source_column is None or data.target_column is None):
        raise ValueError(
            "config.data: name both source_column and target_column, or messages_column alone; got "
            f"source_column={data.source_column!r}, target_column={data.target_column!r}, "
            f"messages_column={data.messages_column!r}"
        )
    return Shape(data.source_column, data.target_column, None, data.messages_column)


def _text_task(
    settings: Settings,
    decoder: Decoder,
    prompt_format: PromptFormat,
    train: TextPairs,
    compared: Mapping[str, TextReferences],
    written: str | None,
) -> Task:
    """The task of these rows; texts are written for the split `written`, and the loss is watched on the others."""
    data = settings.data

    def tokenize(pairs: TextPairs):
        return tokenize_completions(
            pairs,
            decoder.tokenizer,
            max_length=data.max_length,
            prompt_format=prompt_format,
            cache_dir=Path(data.cache_dir).expanduser(),
        )

    if written is None:
        return decoder_task(settings, decoder, {"train": tokenize(train)}, None, prompt_format, train.users)
    chosen = _spread(compared[written], settings.generation.max_prompts)
    room = decoder.module.config.max_position_embeddings - settings.generation.max_new_tokens
    token_ids = tokenize_prompts(
        chosen.sources,
        decoder.tokenizer,
        max_length=room,
        prompt_format=prompt_format,
        histories=chosen.histories,
    )
    watched = {name: rows for name, rows in compared.items() if name != written} or {written: chosen}
    arrays = {"train": tokenize(train), **{name: tokenize(rows.pairs()) for name, rows in watched.items()}}
    prompts = Prompts(written, chosen.sources, token_ids, chosen.references)
    return decoder_task(settings, decoder, arrays, prompts, prompt_format, train.users)


def _spread(rows: TextReferences, most: int | None) -> TextReferences:
    """At most this many rows, evenly spaced, because neighbours are often about the same thing."""
    return rows[:: math.ceil(len(rows) / most)] if most else rows
