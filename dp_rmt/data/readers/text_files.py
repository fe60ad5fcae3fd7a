"""What every reader of a text file does first: is it there, is it empty, is it UTF-8."""

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
        advice: where it should come from; said when it is missing.
        newline: as in `open`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty or not UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {advice}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (0 bytes). Download the file again.")
    # utf-8-sig: some published files start with a byte-order mark (MRPC's does).
    with file.open(encoding="utf-8-sig", newline=newline) as stream:
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}). Convert it, or download it again.") from error
