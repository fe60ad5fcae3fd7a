"""Prompts and completions as tokens. A causal language model learns the completion, and continues the prompt.

    [BOS]  source  separator | target  EOS
    ------ no loss --------- | --- loss ---

This is the layout of Li et al. 2022 (arXiv 2110.05679), where the separator is the tokenizer's BOS token
("<|endoftext|>" of GPT-2); a tokenizer's own chat template is another (`dp_rmt.data.prompt_format`). Sources and
targets are tokenised apart, so that a prompt has the same tokens in training and in generation. The leading BOS is
there only if the tokenizer itself puts one (Llama, Gemma; not GPT-2). The text template of Li et al. leaves two spaces
before "<|endoftext|>" as tokens of their own; these are left out here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from dp_rmt.data.prompt_format import Layout, PromptFormat, prompt_format_of
from dp_rmt.data.readers.text_pairs import TextPairs, Turn
from dp_rmt.data.tokens.conversations import Piece, encode_conversations, encode_texts
from dp_rmt.data.tokens.token_cache import Tokenized, cache_key, read_or_build
from dp_rmt.data.tokens.token_rows import log_truncation, pad_right

_Rows = tuple[list[list[int]], list[list[int]], int]
"""Of each row its tokens, and 1 for each that is learned; and how many rows were cut."""


def tokenize_completions(
    pairs: TextPairs,
    tokenizer: Any,
    *,
    max_length: int,
    prompt_format: PromptFormat | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, np.ndarray]:
    """Tokenises (source, target) pairs and pads on the right to `max_length`; only target and EOS have a loss.

    If a row is too long, its source loses its end. If that is not enough, the target loses its end, with the EOS token,
    because the text did not end there. A target never loses its beginning. A conversation, or a row that a chat
    template writes, loses its end. The log says how many rows were cut.

    Args:
        pairs: N sources and targets. Each pair is one example, the unit of privacy.
        tokenizer: a fast tokenizer of `transformers` with an EOS token. If it has no pad token, EOS pads.
        max_length: L, tokens per row, special tokens included.
        prompt_format: how source and target are put together; None is the separator's, with BOS as separator.
        cache_dir: a folder in which the arrays are kept under a SHA-256 of everything they depend on. It then holds the
            examples, so protect it like the data. None keeps nothing.

    Returns:
        `input_ids`, `attention_mask` (0 on padding) and `loss_mask`, each (N, L) int32. `loss_mask` is 1 at a token
        that is to be predicted from the tokens before it.

    Raises:
        ValueError: there are no examples, the tokenizer has no EOS, a target has no tokens, or `max_length` has no room
            for any of the target; the message names the row, by its place in a file if that is known.
    """
    prompt_format = prompt_format or prompt_format_of(tokenizer, "separator")
    if len(pairs) == 0:
        raise ValueError("There are no examples to tokenise.")
    if cache_dir is None:
        arrays, num_truncated = _tokenize(pairs, tokenizer, prompt_format, max_length)
    else:
        arrays, num_truncated = read_or_build(
            cache_key(
                tokenizer,
                {
                    "completions": dataclasses.asdict(prompt_format.layout),
                    "max_length": max_length,
                    "template": prompt_format.jinja if prompt_format.name == "template" else None,
                },
                texts=(pairs.sources, pairs.targets, pairs.histories),
                arrays={},
            ),
            lambda: _tokenize(pairs, tokenizer, prompt_format, max_length),
            cache_dir=cache_dir,
            num_examples=len(pairs),
        )
    log_truncation(num_truncated, len(pairs), max_length)
    return arrays


def tokenize_prompts(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    prompt_format: PromptFormat | None = None,
    histories: Sequence[Sequence[Turn]] = (),
    cut: bool = False,
) -> list[list[int]]:
    """Tokenises the prompts to continue. The tokens are those of training, up to where the target begins.

    Args:
        sources: N linearised tables or instructions.
        tokenizer: as in `tokenize_completions`.
        max_length: the most tokens of a prompt, which is the model's context less the tokens to generate.
        prompt_format: as in `tokenize_completions`.
        histories: of each row the turns before its source; empty if no row has any.
        cut: True cuts the end of a longer source, as training does, and logs how many were cut. False refuses it.

    Returns:
        N rows of different lengths, each at least 1 and at most `max_length`.

    Raises:
        ValueError: a prompt is longer (the message names its row, counted from 1), or as in `tokenize_completions`.
    """
    prompt_format = prompt_format or prompt_format_of(tokenizer, "separator")
    layout = prompt_format.layout
    if prompt_format.name == "separator" and not any(histories):
        before, after = layout.start, layout.separator
        ids = encode_texts(sources, tokenizer, layout)
    else:
        before, after = (), ()
        rows = _conversations(sources, histories)
        pieces = encode_conversations(rows, tokenizer, prompt_format, lambda row: f"prompt {row + 1}")
        ids = [_joined(row) for row in pieces]
    room = max_length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"max_length={max_length} has no room for a prompt. Raise it, or generate fewer tokens.")
    is_long = [len(row) > room for row in ids]
    if any(is_long) and not cut:
        row = is_long.index(True)
        raise ValueError(
            f"Prompt {row + 1} has {len(ids[row]) + max_length - room} tokens, but only max_length={max_length} fit"
            f" ({sum(is_long)} of {len(ids)} prompts are too long). Generate fewer tokens, use a model with a longer"
            f" context, or cut the sources. It begins {sources[row][:60]!r}."
        )
    if ids:
        logging.info("%d of %d prompts were cut to %d tokens.", sum(is_long), len(ids), max_length)
    return [[*before, *row[:room], *after] for row in ids]


def decode_completions(ids: Sequence[Sequence[int]] | np.ndarray, tokenizer: Any) -> list[str]:
    """Decodes generated tokens, each row up to its first EOS, without special tokens or spaces at the ends.

    Args:
        ids: N rows of token ids, without those of the prompt.
        tokenizer: as in `tokenize_completions`.

    Returns:
        N texts.
    """
    rows = [[int(token) for token in row] for row in ids]
    rows = [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in rows]
    return [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip() for row in rows]


def _tokenize(pairs: TextPairs, tokenizer: Any, prompt_format: PromptFormat, max_length: int) -> Tokenized:
    if prompt_format.name == "separator" and not pairs.histories:
        rows, learned, num_truncated = _pair_rows(pairs, tokenizer, prompt_format.layout, max_length)
    else:
        rows, learned, num_truncated = _conversation_rows(pairs, tokenizer, prompt_format, max_length)
    input_ids, is_token = pad_right(rows, max_length, prompt_format.layout.pad)
    arrays = {
        "input_ids": input_ids,
        "attention_mask": is_token.astype(np.int32),
        "loss_mask": pad_right(learned, max_length, 0)[0],
    }
    return arrays, num_truncated


def _pair_rows(pairs: TextPairs, tokenizer: Any, layout: Layout, max_length: int) -> _Rows:
    room = max_length - len(layout.start) - len(layout.separator)
    if room < 1:
        raise ValueError(
            f"max_length={max_length} leaves nothing of the target of row 1: {max_length - room} tokens are special"
            " tokens and the separator. Raise it."
        )
    rows, learned, num_truncated = [], [], 0
    sources = encode_texts(pairs.sources, tokenizer, layout)
    targets = encode_texts(pairs.targets, tokenizer, layout)
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if not target:
            raise ValueError(
                f"{pairs.place(number)}: nothing of the target remains as tokens: it is {pairs.targets[number]!r}."
                " Remove the row, or give it its text."
            )
        completion = [*target, layout.end][:room]
        prompt = [*layout.start, *source[: room - len(completion)], *layout.separator]
        num_truncated += len(source) + len(target) + 1 > room
        rows.append(prompt + completion)
        learned.append([0] * len(prompt) + [1] * len(completion))
    return rows, learned, num_truncated


def _conversation_rows(pairs: TextPairs, tokenizer: Any, prompt_format: PromptFormat, max_length: int) -> _Rows:
    conversations = [
        [*turns, Turn("assistant", target)]
        for turns, target in zip(_conversations(pairs.sources, pairs.histories), pairs.targets, strict=True)
    ]
    rows, learned, num_truncated = [], [], 0
    for number, pieces in enumerate(encode_conversations(conversations, tokenizer, prompt_format, pairs.place)):
        ids = _joined(pieces)
        is_learned = [int(piece.is_learned) for piece in pieces for _ in piece.ids]
        if not any(is_learned[1:max_length]):  # nothing stands before a first token to predict it from
            raise ValueError(
                f"{pairs.place(number)}: what is to be learned begins after token {is_learned.index(1)}, but "
                f"config.data.max_length={max_length} keeps no token of it. Raise it, or shorten what stands before it."
            )
        num_truncated += len(ids) > max_length
        rows.append(ids[:max_length])
        learned.append([0, *is_learned[1:max_length]])
    return rows, learned, num_truncated


def _conversations(sources: Sequence[str], histories: Sequence[Sequence[Turn]]) -> list[list[Turn]]:
    """Of each row all turns up to the user's last one."""
    before = histories or ((),) * len(sources)
    return [[*turns, Turn("user", source)] for turns, source in zip(before, sources, strict=True)]


def _joined(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]
