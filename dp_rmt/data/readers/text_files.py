"""Opens text files, after the checks of every reader: that the file is there, is not empty and is UTF-8."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import IO


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
