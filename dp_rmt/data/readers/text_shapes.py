"""The shapes in which people keep text to be written from text, recognised by the names of their columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from dp_rmt.data.readers.rows import Row, field_of, is_empty, text_of
from dp_rmt.data.readers.text_pairs import Record, Turn

REFERENCES, SYSTEM = "references", "system"
"""Columns that any shape may have: further acceptable answers, and what the assistant is told before."""
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Which columns hold what.

    Attributes:
      source: the column of the source; None for conversations.
      target: the column of the text to learn; None for conversations.
      context: a column whose text, where there is any, stands behind the source; None if there is none.
      messages: the column of whole conversations; None if there is none.
    """

    source: str | None = None
    target: str | None = None
    context: str | None = None
    messages: str | None = None

    def __str__(self) -> str:
        if self.messages is not None:
            return f"conversations in {self.messages!r}, with loss on what the assistant says"
        context = "" if self.context is None else f" (and {self.context!r} behind it)"
        return f"{self.source!r}{context} -> {self.target!r}"

    def unused(self, columns: Collection[str]) -> list[str]:
        """The columns that are carried along and not looked at."""
        return [name for name in columns if name not in {*dataclasses.astuple(self), REFERENCES, SYSTEM}]


_SHAPES = (
    Shape(messages="messages"),  # of OpenAI, and of most chat data sets
    Shape(messages="conversations"),  # ShareGPT
    Shape("instruction", "output", "input"),  # Alpaca
    Shape("instruction", "response", "context"),  # Dolly
    Shape("instruction", REFERENCES),
    Shape("prompt", "completion"),
    Shape("prompt", "response"),
    Shape("question", "answer"),
    Shape("source", "target"),
)
KNOWN = "; ".join(
    shape.messages or f"{shape.source}{f', {shape.context}' if shape.context else ''}, {shape.target}"
    for shape in _SHAPES
)
"""The columns of the shapes that are recognised, for messages."""


def recognised(columns: Collection[str]) -> Shape | None:
    """The first shape whose columns are all there; None if there is none.

    >>> str(recognised(["id", "instruction", "input", "output"]))
    "'instruction' (and 'input' behind it) -> 'output'"
    """
    for shape in _SHAPES:
        if all(name in columns for name in (shape.messages, shape.source, shape.target) if name is not None):
            return dataclasses.replace(shape, context=shape.context if shape.context in columns else None)
    return None


def read_record(row: Row, shape: Shape) -> Record:
    """Reads one row.

    Returns:
      The record; without references if there is no answer in the row.

    Raises:
      ValueError: a text is missing or no text; the message has the place.
    """
    if shape.messages is not None:
        return _conversation(row, _turns(field_of(row, shape.messages), f"{row.where}, column {shape.messages!r}"))
    assert shape.source is not None
    assert shape.target is not None
    source, answer = row.fields.get(shape.source), row.fields.get(shape.target)
    if isinstance(source, list | tuple) and isinstance(answer, list | tuple) and shape.target != REFERENCES:
        return _conversation(row, [*_turns(source, row.where), *_turns(answer, row.where)])
    text = text_of(row, shape.source)
    if shape.context is not None and not is_empty(row.fields.get(shape.context)):
        text = f"{text}\n\n{text_of(row, shape.context)}"
    answers = [] if shape.target == REFERENCES or is_empty(answer) else [text_of(row, shape.target)]
    return Record(text, _distinct([*answers, *_references(row)]), row.where, _system(row))


def read_prompt(prompt: str | Sequence[Mapping[str, Any]], where: str) -> Record:
    """A prompt to write an answer for: a text, or the messages of a conversation that ends with the user's.

    Raises:
      ValueError: the messages are none, or end with what the assistant said.
    """
    if isinstance(prompt, str):
        return Record(prompt, (), where)
    record = read_record(Row(where, {"messages": prompt}), Shape(messages="messages"))
    if record.references:
        raise ValueError(f"{where}: the conversation ends with the assistant's turn; end it with what the user says")
    return record


def _references(row: Row) -> list[str]:
    """Further answers of a row, which is a list of texts."""
    references = row.fields.get(REFERENCES)
    if references is None:
        return []
    if not isinstance(references, list | tuple):
        raise ValueError(f"{row.where}: {REFERENCES!r} must be a list of texts, got a {type(references).__name__}")
    for text in references:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{row.where}: each of {REFERENCES!r} must be a text that is not empty, got {text!r}")
    return list(references)


def _distinct(texts: Sequence[str]) -> tuple[str, ...]:
    """The texts without spaces at their ends, each once: else a text of one person would be two examples."""
    return tuple(dict.fromkeys(text.strip() for text in texts))


def _system(row: Row) -> tuple[Turn, ...]:
    return () if is_empty(row.fields.get(SYSTEM)) else (Turn("system", text_of(row, SYSTEM)),)


def _turns(messages: Any, where: str) -> list[Turn]:
    """The turns of a list of messages, as {role, content} or as ShareGPT's {from, value}."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{where}: expected a list of messages, got {messages!r}")
    turns = []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{place}: expected an object with role and content, got a {type(message).__name__}")
        role = message.get("role", message.get("from"))
        if role not in _ROLES:
            raise ValueError(
                f"{place}: the role {role!r} is not known, only {', '.join(_ROLES)}. Remove the message, or give it to "
                "one of them"
            )
        turns.append(Turn(_ROLES[role], _content(message.get("content", message.get("value")), place)))
    return turns


def _content(content: Any, place: str) -> str:
    if isinstance(content, list | tuple):  # OpenAI's parts
        parts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        content = "".join(parts) if len(parts) == len(content) else None
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{place}: its content must be a text that is not empty, got {content!r}")
    return content.strip()


def _conversation(row: Row, turns: Sequence[Turn]) -> Record:
    turns = [*(_system(row) if turns[0].role != "system" else ()), *turns]
    said = [turn.role for turn in turns[turns[0].role == "system" :]]
    if said != (["user", "assistant"] * len(said))[: len(said)] or not said:
        raise ValueError(
            f"{row.where}: the turns must be the user's and the assistant's by turns, the user's first, and at most "
            f"one of the system before; they are {', '.join(turn.role for turn in turns)}. Join or remove some"
        )
    if said[-1] == "user":
        return Record(turns[-1].content, (), row.where, tuple(turns[:-1]))
    return Record(turns[-2].content, (turns[-1].content,), row.where, tuple(turns[:-2]))
