"""Finds the sensitive characters of a text by exact attributes of a database, by patterns, or by Presidio."""

from __future__ import annotations

import csv
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from dp_rmt.data.readers.text_files import open_text

Span = tuple[int, int]
"""The characters ``[start, end)`` of a text."""
Finder = Callable[[str], list[Span]]
"""A function that returns the sensitive spans of a text, in any order; they may overlap."""

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
PATTERNS = {
    # These are digits, with what stands between them in telephone, card and order numbers.
    "numbers": r"(?<!\w)\d+(?:[-.,/ ]\d+)*(?!\w)",
    # These are capitals and digits, as in tracking numbers.
    "codes": r"(?<!\w)[A-Z0-9]{8,}(?!\w)",
    "emails": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "dates": rf"(?<!\w)(?:\d{{4}}-\d\d?-\d\d?|\d\d?[./]\d\d?[./]\d{{2,4}}|\d\d?\.? {_MONTH} \d{{4}}"
    rf"|{_MONTH} \d\d?(?:st|nd|rd|th)?, \d{{4}})(?!\w)",
}


def pattern_finder(name: str) -> Finder:
    """Makes a finder of what looks like a number, a code, an e-mail address or a date.

    Args:
        name: a key of `PATTERNS`.

    Returns:
        The finder.

    >>> text = "Ann, ann@x.org, 980.322.8737, 0UOKFRS1GA, 3 March 2020"
    >>> [[text[i:j] for i, j in pattern_finder(name)(text)] for name in ("numbers", "codes", "emails", "dates")]
    [['980.322.8737', '3', '2020'], ['0UOKFRS1GA'], ['ann@x.org'], ['3 March 2020']]
    """
    pattern = re.compile(PATTERNS[name])
    return lambda text: [match.span() for match in pattern.finditer(text)]


def attribute_finder(values: Iterable[str]) -> Finder:
    """Makes a finder of exact values of a database, as whole words.

    Args:
        values: names, addresses, numbers. Hundreds of thousands cost nothing but memory, since only a text's words are
            looked up.

    Returns:
        The finder.

    >>> attribute_finder(["Ann Lee", "Ann", "542-016"])("Ann Lees, Ann Lee: 542-016-4")
    [(0, 3), (10, 17), (10, 13), (19, 26)]
    """
    by_first_word: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for value in dict.fromkeys(values):
        word = re.search(r"\w+", value)
        if word is None:
            raise ValueError(f"the attribute {value!r} has no letter and no digit: it would be found anywhere")
        by_first_word[word[0]].append((word.start(), value))

    def find(text: str) -> list[Span]:
        spans = []
        for word in re.finditer(r"\w+", text):
            for offset, value in by_first_word.get(word[0], ()):
                start = word.start() - offset
                end = start + len(value)
                if start >= 0 and text.startswith(value, start) and not re.match(r"\w", text[end : end + 1]):
                    spans.append((start, end))
        return spans

    return find


def read_attributes(file: pathlib.Path, column: str | None = None) -> list[str]:
    """Reads all values of a CSV file with a header, except a first column without a name, which counts the rows.

    Args:
        file: the table.
        column: the one column that is read; None for all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a table; the message has file and line.
    """
    values: list[str] = []
    with open_text(file, advice="it holds the personal attributes to look for, as CSV.", newline="") as stream:
        rows = csv.reader(stream)
        header = next(rows)
        if column is not None and column not in header:
            raise ValueError(f"{file} has no column {column!r}, only {', '.join(filter(None, header))}.")
        wanted = [name for name in header if name and column in (None, name)]
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"{file}, line {rows.line_num}: {len(row)} columns under {len(header)} in the header.")
            values += [value for name, value in zip(header, row, strict=True) if name in wanted and value.strip()]
    if not values:
        raise ValueError(f"{file} holds no attributes below its header.")
    return values


def presidio_finder(language: str = "en") -> Finder:
    """Makes a finder of what Presidio's statistical model recognises: names, places, numbers.

    Raises:
        ImportError: Presidio is not installed; the message says how to install it.
    """
    try:
        from presidio_analyzer import AnalyzerEngine
    except ImportError as error:
        raise ImportError(
            "config.data.sensitive names 'presidio', which is not installed: pip install 'dp_rmt[presidio]' and a "
            "spaCy model (python -m spacy download en_core_web_lg), or leave 'presidio' out"
        ) from error
    engine = AnalyzerEngine()
    return lambda text: [(found.start, found.end) for found in engine.analyze(text=text, language=language)]


def merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Unites spans into spans in ascending order that do not touch.

    >>> merged([(5, 8), (0, 2), (7, 9)])
    ((0, 2), (5, 9))
    """
    union: list[Span] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return tuple(union)
