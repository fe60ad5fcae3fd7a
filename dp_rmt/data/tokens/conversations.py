"""Conversations as tokens: what the assistant said is learned, and what stands before it is given.

A conversation is ONE example, the unit of privacy, however many turns it has. Every stretch of text between two
changes of "learned" and "given" is tokenised apart, so that a prompt has the same tokens in training and in generation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dp_rmt.data.prompt_format import Layout, PromptFormat
from dp_rmt.data.readers.text_pairs import Turn


class Piece(NamedTuple):
    """A stretch of tokens, and whether they are to be predicted."""

    ids: list[int]
    is_learned: bool


def encode_conversations(
    conversations: Sequence[Sequence[Turn]],
    tokenizer: Any,
    prompt_format: PromptFormat,
    place: Callable[[int], str],
) -> list[list[Piece]]:
    """Tokenises conversations. One that ends with the user's turn ends with what makes the assistant answer.

    Args:
      conversations: N, each with a user's turn at least.
      tokenizer: a fast tokenizer of `transformers`.
      prompt_format: how the turns are put together.
      place: names the place of a row, counted from 0, for messages.

    Returns:
      N lists of pieces.

    Raises:
      ValueError: the template does not take a conversation, or a text reads as one of its special tokens; the message
        names the row.
    """
    if prompt_format.name == "separator":
        return _separated(conversations, tokenizer, prompt_format.layout)
    special = re.compile("|".join(map(re.escape, _special_texts(tokenizer))) or "(?!)")
    written = []
    for row, turns in enumerate(conversations):
        for turn in turns:
            if match := special.search(turn.content):
                raise ValueError(
                    f"{place(row)}: a text of the {turn.role} holds {match[0]!r}, which the chat template would take "
                    "for a special token. Write it otherwise, or set --config.data.prompt_format=separator"
                )
        written.append(_rendered(turns, tokenizer, prompt_format.jinja, place(row)))
    encode = _encoder([text for stretches in written for text, _ in stretches], tokenizer, split_special_tokens=False)
    end = prompt_format.layout.end
    rows = []
    for turns, stretches in zip(conversations, written, strict=True):
        pieces = [Piece(encode(text), is_learned) for text, is_learned in stretches]
        if turns[-1].role == "assistant":
            pieces = _ended(pieces, end)
        rows.append(pieces)
    return rows


def encode_texts(texts: Sequence[str], tokenizer: Any, layout: Layout) -> list[list[int]]:
    """Tokenises texts as they stand inside a prompt; "<|endoftext|>" in somebody's text is text, and not its end."""
    encode = _encoder([layout.lead + text.strip() for text in texts], tokenizer, split_special_tokens=True)
    return [encode(layout.lead + text.strip()) for text in texts]


def _encoder(texts: Sequence[str], tokenizer: Any, *, split_special_tokens: bool) -> Callable[[str], list[int]]:
    distinct = list(dict.fromkeys(texts))  # E2E has nine targets for one source
    if not distinct:
        return lambda text: []
    ids = tokenizer(
        distinct,
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        truncation=False,
        padding=False,
        return_attention_mask=False,
    )["input_ids"]
    return dict(zip(distinct, ids, strict=True)).__getitem__


def _separated(conversations: Sequence[Sequence[Turn]], tokenizer: Any, layout: Layout) -> list[list[Piece]]:
    rows = [_with_system_in_front(turns) for turns in conversations]
    texts = iter(encode_texts([turn.content for row in rows for turn in row], tokenizer, layout))
    encoded = []
    for row in rows:
        pieces = [Piece(list(layout.start), is_learned=False)]
        for turn in row:
            said = turn.role == "assistant"
            pieces.append(Piece([*next(texts), *((layout.end,) if said else layout.separator)], said))
        encoded.append(pieces)
    return encoded


def _with_system_in_front(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without those of the system, whose text becomes the beginning of the turn after it."""
    kept, before = [], ""
    for turn in turns:
        if turn.role == "system":
            before += turn.content.strip() + "\n\n"
        else:
            kept.append(Turn(turn.role, before + turn.content.strip()))
            before = ""
    return kept


def _rendered(turns: Sequence[Turn], tokenizer: Any, jinja: str, where: str) -> list[tuple[str, bool]]:
    """The stretches of a conversation as the chat template writes it, and whether each is learned."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]

    def write(count: int, *, asks: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], chat_template=jinja, tokenize=False, add_generation_prompt=asks
        )

    try:
        whole = write(len(turns), asks=turns[-1].role != "assistant")
        stretches, done = [], 0
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before, after = write(number, asks=True), write(number + 1, asks=False)
            if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
                raise ValueError(
                    f"{where}: the chat template of this tokenizer writes an earlier turn otherwise once another "
                    "follows, so that what the assistant said there cannot be learned as it will be asked for. Give "
                    "one answer a row, or set --config.data.prompt_format=separator"
                )
            stretches += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
    except ValueError:
        raise
    except Exception as error:  # what a template raises is up to its author, and jinja2 may be absent
        raise ValueError(
            f"{where}: the chat template of this tokenizer does not take this conversation ({type(error).__name__}: "
            f"{error}). Mend the row, or set --config.data.prompt_format=separator"
        ) from error
    return [stretch for stretch in [*stretches, (whole[done:], False)] if stretch[0]]


def _ended(pieces: list[Piece], end: int) -> list[Piece]:
    """The pieces with EOS in the last one that is learned: else nothing would teach the model to stop."""
    last = max(number for number, piece in enumerate(pieces) if piece.is_learned)
    if end not in pieces[last].ids:
        pieces[last] = Piece([*pieces[last].ids, end], is_learned=True)
    return pieces[: last + 1]


def _special_texts(tokenizer: Any) -> list[str]:
    return sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)[::-1]
