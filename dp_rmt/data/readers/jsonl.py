"""Reads instructions and responses of one's own, one JSON object in each line."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from dp_rmt.data.readers.text_files import open_text
from dp_rmt.data.readers.text_pairs import Record

_KEYS = ("instruction", "response", "references")


def read_jsonl(file: str | os.PathLike[str]) -> list[Record]:
    """Reads a JSONL file; blank lines are skipped.

    Keys of each line:
        instruction: the source, a string.
        response: the text to learn, or the one reference, a string.
        references: an optional list of strings, which are all the acceptable responses of an evaluation row. `response`
            may then be left out. If it is given and not in the list, it is one more reference.

    Returns:
        One record for each line, in the order of the file. In a training file each reference is an example of its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such an object; the message has file and line.
    """
    file = pathlib.Path(file)
    advice = (
        "the folder must hold train.jsonl and may hold dev.jsonl and test.jsonl, one JSON object per line with the"
        ' keys "instruction" and "response". Set --config.data.path to that folder.'
    )
    records = []
    with open_text(file, advice=advice, newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                records.append(_record(json.loads(line.rstrip()), place))
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}, column {error.colno}: broken JSON: {error.msg}.") from None
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
    if not records:
        raise ValueError(f"{file} holds no rows. Write one JSON object per line.")
    return records


def read_jsonl_split(folder: pathlib.Path, split: str) -> list[Record]:
    """Reads `<split>.jsonl` of a folder."""
    return read_jsonl(folder / f"{split}.jsonl")


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f'expected an object {{"instruction": ..., "response": ...}}, got a {type(row).__name__}.')
    unknown = sorted(set(row) - set(_KEYS))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}: the keys are {', '.join(_KEYS)}.")
    references = row.get("references", [])
    if not isinstance(references, list):
        raise ValueError(f"'references' must be a list of strings, got a {type(references).__name__}.")
    if "response" in row and row["response"] not in references:
        references = [row["response"], *references]
    if not references:
        raise ValueError("there is neither a 'response' nor a list of 'references'.")
    for name, text in [("instruction", row.get("instruction")), *(("response", text) for text in references)]:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the {name} must be a string that is not empty, got {text!r}.")
    return Record(row["instruction"].strip(), tuple(text.strip() for text in references), where)
