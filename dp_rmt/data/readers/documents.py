"""Documents to learn as they are, with a mask of their sensitive tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dp_rmt.data.readers.sensitive import Span
from dp_rmt.data.tokens.token_rows import check_is_fast, log_truncation, pad_right


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, which is ONE example: the unit of privacy.

    Attributes:
        text: the document's text.
        where: its file and line.
        is_canary: True for a planted document, whose sensitive characters are the secret.
        spans: the sensitive characters, as spans in ascending order that do not touch.
        user: the id of the person whose document it is; empty if that is not known.
    """

    text: str
    where: str
    is_canary: bool = False
    spans: tuple[Span, ...] = ()
    user: str = ""


def tokenize_beginnings(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts that a model is to go on with, as those of the documents that it was trained on begin."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [[*_start(tokenizer), *row] for row in ids]


def _start(tokenizer: Any) -> list[int]:
    """What stands before a document: a decoder's first token has nothing before it. Without BOS it is EOS, as in the
    training of GPT-2."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [token for token in (eos if bos is None else bos,) if token is not None]


def tokenize_documents(documents: Sequence[Document], tokenizer: Any, *, max_length: int) -> dict[str, np.ndarray]:
    """Tokenises documents with BOS and EOS, if the tokenizer has them; there is loss on all tokens but the first.

    A token is sensitive if any of its characters is. Longer documents lose their end; canaries must fit.

    Args:
        documents: N.
        tokenizer: a fast tokenizer of `transformers`.
        max_length: L, tokens per row, special tokens included.

    Returns:
        `input_ids`, `attention_mask`, `loss_mask` and `sensitive_mask` (a part of `loss_mask`), each (N, L) int32.

    Raises:
        ValueError: there are no documents, or a canary is longer than `max_length`; the message has its file and line.
    """
    check_is_fast(tokenizer)
    if not documents:
        raise ValueError("There are no documents to tokenise.")
    encoded = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        split_special_tokens=True,  # if somebody's text has "</s>" in it, that is text
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    start, eos = _start(tokenizer), tokenizer.eos_token_id
    end = [] if eos is None else [eos]
    rows, sensitive, num_cut = [], [], 0
    for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        row = [*start, *ids, *end]
        if len(row) > max_length and document.is_canary:
            raise ValueError(
                f"{document.where}: the canary has {len(row)} tokens, but max_length={max_length} is the context of "
                "the training data: it would be cut and measure nothing. Shorten it, or raise config.data.max_length."
            )
        num_cut += len(row) > max_length
        rows.append(row[:max_length])
        marks = [any(a < stop and b > begin for begin, stop in document.spans) for a, b in offsets]
        sensitive.append([*([0] * len(start)), *map(int, marks), *([0] * len(end))][:max_length])
    log_truncation(num_cut, len(rows), max_length)
    padding = tokenizer.pad_token_id
    input_ids, is_token = pad_right(rows, max_length, (eos or 0) if padding is None else padding)
    sensitive_mask, _ = pad_right(sensitive, max_length, 0)
    is_target = is_token & (np.arange(max_length) > 0)
    return {
        "input_ids": input_ids,
        "attention_mask": is_token.astype(np.int32),
        "loss_mask": is_target.astype(np.int32),
        "sensitive_mask": sensitive_mask * is_target,
    }
