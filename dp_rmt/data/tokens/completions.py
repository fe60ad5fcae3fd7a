"""Prompts and completions as tokens. A causal language model learns the completion, and continues the prompt.

    [BOS]  source  separator | target  EOS
    ------ no loss --------- | --- loss ---

This is the layout of Li et al. 2022 (arXiv 2110.05679), where the separator is the tokenizer's BOS token
("<|endoftext|>" of GPT-2). Sources and targets are tokenised apart, so that a prompt has the same tokens in training
and in generation. The leading BOS is there only if the tokenizer itself puts one (Llama, Gemma; not GPT-2). The text
template of Li et al. leaves two spaces before "<|endoftext|>" as tokens of their own; these are left out here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from dp_rmt.data.readers.text_pairs import TextPairs
from dp_rmt.data.tokens.token_cache import Tokenized, cache_key, read_or_build
from dp_rmt.data.tokens.token_rows import check_is_fast, log_truncation, pad_right


def tokenize_completions(
    pairs: TextPairs,
    tokenizer: Any,
    *,
    max_length: int,
    separator: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, np.ndarray]:
    """Tokenises (source, target) pairs and pads on the right to `max_length`; only target and EOS have a loss.

    If a row is too long, its source loses its end. If that is not enough, the target loses its end, with the EOS token,
    because the text did not end there. A target never loses its beginning. The log says how many rows were cut.

    Args:
        pairs: N sources and targets. Each pair is one example, the unit of privacy.
        tokenizer: a fast tokenizer of `transformers` with an EOS token. If it has no pad token, EOS pads.
        max_length: L, tokens per row, special tokens included.
        separator: text between source and target, such as "\\n"; None is the BOS token, or EOS if there is no BOS.
        cache_dir: a folder in which the arrays are kept under a SHA-256 of everything they depend on. It then holds the
            examples, so protect it like the data. None keeps nothing.

    Returns:
        `input_ids`, `attention_mask` (0 on padding) and `loss_mask`, each (N, L) int32. `loss_mask` is 1 at a token
        that is to be predicted from the tokens before it.

    Raises:
        ValueError: there are no examples, the tokenizer has no EOS, a target has no tokens, or `max_length` has no room
            for any of the target; the message names the row, counted from 1.
    """
    layout = _layout(tokenizer, separator)
    if len(pairs) == 0:
        raise ValueError("There are no examples to tokenise.")
    if cache_dir is None:
        arrays, num_truncated = _tokenize(pairs, tokenizer, layout, max_length)
    else:
        arrays, num_truncated = read_or_build(
            cache_key(
                tokenizer,
                {"completions": dataclasses.asdict(layout), "max_length": max_length},
                texts=(pairs.sources, pairs.targets),
                arrays={},
            ),
            lambda: _tokenize(pairs, tokenizer, layout, max_length),
            cache_dir=cache_dir,
            num_examples=len(pairs),
        )
    log_truncation(num_truncated, len(pairs), max_length)
    return arrays


def tokenize_prompts(
    sources: Sequence[str], tokenizer: Any, *, max_length: int, separator: str | None = None, cut: bool = False
) -> list[list[int]]:
    """Tokenises the prompts to continue. The tokens are those of training, up to where the target begins.

    Args:
        sources: N linearised tables or instructions.
        tokenizer: as in `tokenize_completions`.
        max_length: the most tokens of a prompt, which is the model's context less the tokens to generate.
        separator: as in `tokenize_completions`.
        cut: True cuts the end of a longer source, as training does, and logs how many were cut. False refuses it.

    Returns:
        N rows of different lengths, each at least 1 and at most `max_length`.

    Raises:
        ValueError: a prompt is longer (the message names its row, counted from 1), or as in `tokenize_completions`.
    """
    layout = _layout(tokenizer, separator)
    room = max_length - len(layout.start) - len(layout.separator)
    if room < 1:
        raise ValueError(f"max_length={max_length} has no room for a prompt. Raise it, or generate fewer tokens.")
    ids = _encode(sources, tokenizer, layout)
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
    return [[*layout.start, *row[:room], *layout.separator] for row in ids]


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


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The tokens around source and target.

    Attributes:
        start: BOS, or nothing.
        separator: the tokens between source and target.
        end: the EOS token.
        pad: the padding token.
        lead: what is put before a text, so that its first word is the token of a word inside a text.
    """

    start: tuple[int, ...]
    separator: tuple[int, ...]
    end: int
    pad: int
    lead: str


def _layout(tokenizer: Any, separator: str | None) -> _Layout:
    check_is_fast(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, so the end of a text cannot be learned. Set"
            " one: tokenizer.eos_token = ..."
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if separator is None:
        between = [eos if bos is None else bos]
    else:
        between = tokenizer(separator, add_special_tokens=False)["input_ids"]
        if not between:
            raise ValueError(f"The separator {separator!r} has no tokens. Choose another text, or None.")
    # "a a" is twice the same token if words carry their own mark (Llama's "▁a", whole words). If the space is part of
    # the token (GPT-2's "a", "Ġa"), a leading space gives the first word its usual token.
    word = tokenizer("a a", add_special_tokens=False)["input_ids"]
    return _Layout(
        start=(bos,) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else (),
        separator=tuple(between),
        end=eos,
        pad=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        lead="" if word[0] == word[-1] else " ",
    )


def _encode(texts: Sequence[str], tokenizer: Any, layout: _Layout) -> list[list[int]]:
    if not texts:
        return []
    distinct = list(dict.fromkeys(texts))  # E2E has nine targets for one source
    # With split_special_tokens, "<|endoftext|>" in somebody's text is text, and not the end of it.
    ids = tokenizer(
        [layout.lead + text.strip() for text in distinct],
        add_special_tokens=False,
        split_special_tokens=True,
        truncation=False,
        padding=False,
        return_attention_mask=False,
    )["input_ids"]
    rows = dict(zip(distinct, ids, strict=True))
    return [rows[text] for text in texts]


def _tokenize(pairs: TextPairs, tokenizer: Any, layout: _Layout, max_length: int) -> Tokenized:
    room = max_length - len(layout.start) - len(layout.separator)
    if room < 1:
        raise ValueError(
            f"max_length={max_length} leaves nothing of the target of row 1: {max_length - room} tokens are special"
            " tokens and the separator. Raise it."
        )
    rows, starts, num_truncated = [], [], 0
    sources = _encode(pairs.sources, tokenizer, layout)
    targets = _encode(pairs.targets, tokenizer, layout)
    for number, (source, target) in enumerate(zip(sources, targets, strict=True), start=1):
        if not target:
            raise ValueError(
                f"Nothing of the target of row {number} remains as tokens: it is {pairs.targets[number - 1]!r}. Remove"
                " the row, or give it its text."
            )
        completion = [*target, layout.end][:room]
        prompt = [*layout.start, *source[: room - len(completion)], *layout.separator]
        num_truncated += len(source) + len(target) + 1 > room
        starts.append(len(prompt))
        rows.append(prompt + completion)
    input_ids, is_token = pad_right(rows, max_length, layout.pad)
    is_target = is_token & (np.arange(max_length) >= np.asarray(starts)[:, None])
    arrays = {
        "input_ids": input_ids,
        "attention_mask": is_token.astype(np.int32),
        "loss_mask": is_target.astype(np.int32),
    }
    return arrays, num_truncated
