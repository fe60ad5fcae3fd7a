"""Opens text files, after the checks of every reader: that the file is there, is not empty and is UTF-8."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import IO, Any


@contextlib.contextmanager
def open_text(file: pathlib.Path, *, advice: str, newline: str | None = None) -> Iterator[IO[str]]:
    """Opens a UTF-8 file (with or without a byte-order mark) for reading.

    Args:
        file: the file.
        advice: where the file should come from; the message has it if the file is missing.
        newline: as in `open`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty or not UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {advice}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (0 bytes). Download the file again.")
    # The encoding is utf-8-sig, as some published files (MRPC's) start with a byte-order mark.
    with file.open(encoding="utf-8-sig", newline=newline) as stream:
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}). Convert it, or download it again.") from error


def check_text(value: Any, where: str) -> None:
    r"""Refuses a text, or a text anywhere in lists and objects, that has half of a surrogate pair.

    JSON can spell such halves. They are no characters, and no tokenizer takes them.

    Args:
        value: what was read.
        where: its place, for the message.

    Raises:
        ValueError: there is such a text.

    >>> check_text({"text": ["fine", "\ud83d"]}, "a.jsonl, line 3")
    Traceback (most recent call last):
    ValueError: a.jsonl, line 3: '\ud83d' has half of a surrogate pair (\ud83d) at character 0, ...
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {value[:60]!a} has half of a surrogate pair ({ascii(value[error.start])[1:-1]}) at "
                f"character {error.start}, which is no character. Write the whole pair, or remove it."
            ) from None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_text(key, where)
            check_text(inner, where)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_text(inner, where)
