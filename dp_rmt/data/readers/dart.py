"""Reads DART (Nan et al. 2021, arXiv 2007.02871), from sets of triples (subject, relation, object) to text."""

from __future__ import annotations

import os
import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

from absl import logging

from dp_rmt.data.readers.hub import load_converted_splits
from dp_rmt.data.readers.json_files import json_list
from dp_rmt.data.readers.text_files import open_text
from dp_rmt.data.readers.text_pairs import Record

HUB_DATASET = "Yale-LILY/dart"
_FILE = "dart-v1.1.1-full-{}"
_DECLARED = re.compile(r"""<\?xml[^>]*?encoding\s*=\s*["']([^"']+)["']""")


def linearize_triples(triples: Sequence[Sequence[str]]) -> str:
    """Writes triples as `subject : relation : object | ...`, with the relation in lower case.

    This is the form behind the literature's DART numbers with GPT-2 (Li & Liang 2021, arXiv 2101.00190; privately Li et
    al. 2022, arXiv 2110.05679).

    >>> linearize_triples([("Mars Hill College", "JOINED", "1973"), ("Mars Hill College", "LOCATION", "Mars Hill")])
    'Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill'
    """
    return " | ".join(f"{subject} : {relation.lower()} : {object_}" for subject, relation, object_ in triples)


def read_dart_json(file: str | os.PathLike[str]) -> list[Record]:
    """Reads a JSON file of DART: a list of `{"tripleset": [[s, r, o], ...], "annotations": [{"text": ...}, ...]}`.

    Returns:
        One record for each entry, in the order of the file, with all its texts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the JSON is broken (the message has file and line), or an entry has another form (file and number,
          counted from 1).
    """
    file = pathlib.Path(file)
    entries = json_list(file, advice=_advice(file))
    return _records([(_json_triples, _json_texts, entry) for _, entry in entries], file)


def read_dart_xml(file: str | os.PathLike[str]) -> list[Record]:
    """Reads an XML file of DART: `entry` elements with `modifiedtripleset/mtriple` and `lex`.

    It returns and raises what `read_dart_json` does. The message about broken XML has the line.
    """
    file = pathlib.Path(file)
    with open_text(file, advice=_advice(file)) as stream:
        text = stream.read()
    declared = _DECLARED.match(text)
    if declared and not text.isascii() and declared[1].lower() not in ("utf-8", "utf8"):
        raise ValueError(
            f'{file}, line 1: the declaration says encoding="{declared[1]}", but the bytes of the file are UTF-8. '
            'Write encoding="UTF-8" there, or convert the file to UTF-8 if its letters look wrong.'
        )
    try:
        root = ElementTree.fromstring(text)  # of text, whose declaration no longer counts
    except ElementTree.ParseError as error:
        line, column = error.position
        raise ValueError(f"{file}, line {line}, column {column + 1}: broken XML: {error}. Download it again.") from None
    return _records([(_xml_triples, _xml_texts, entry) for entry in root.iter("entry")], file)


def read_dart_split(folder: pathlib.Path, split: str) -> list[Record]:
    """Reads train, dev or test from a folder, from its JSON or XML file, whichever it has."""
    name = _FILE.format(split)
    if not (folder / f"{name}.json").is_file() and (folder / f"{name}.xml").is_file():
        return read_dart_xml(folder / f"{name}.xml")
    return read_dart_json(folder / f"{name}.json")


def read_dart_hub() -> dict[str, list[Record]]:
    """Reads all splits from the hub.

    Raises:
        RuntimeError: the hub could not be read.
        ValueError: an entry has another form.
    """
    splits = load_converted_splits(
        HUB_DATASET,
        what="DART",
        advice="download its JSON files from github.com/Yale-LILY/dart and set --config.data.path to their folder.",
    )
    return {name: _hub_records(split, f"{HUB_DATASET}, {name}") for name, split in splits.items()}


def _hub_records(split, where: str) -> list[Record]:
    rows = zip(split["tripleset"], split["annotations"], strict=True)
    return _records([(_json_triples, _hub_texts, {"tripleset": t, "annotations": a}) for t, a in rows], where)


def _records(entries: Sequence[tuple], where: str | os.PathLike[str]) -> list[Record]:
    """Makes records of entries, which come with readers of triples and texts; their ValueErrors get file and number."""
    records, num_dropped = [], 0
    for number, (read_triples, read_texts, entry) in enumerate(entries, start=1):
        place = f"{where}, entry {number}"
        try:
            triples, texts = read_triples(entry), read_texts(entry)
            if not triples:
                raise ValueError("there are no triples.")
            kept = tuple(text.strip() for text in texts if text.strip())
            if not kept:
                raise ValueError("there is no text, or only empty ones.")
        except ValueError as error:
            raise ValueError(f"{place}: {error} Remove the entry, or download the file again.") from None
        num_dropped += len(texts) - len(kept)
        records.append(Record(linearize_triples(triples), kept, place))
    if not records:
        raise ValueError(f"{where} holds no entries. Download the file again.")
    if num_dropped:  # the published test set has one
        logging.warning("%s: dropped %d empty texts of entries that have others.", where, num_dropped)
    return records


def _json_triples(entry: Any) -> list[list[str]]:
    triples = entry.get("tripleset") if isinstance(entry, dict) else None
    if not isinstance(triples, list | tuple):
        raise ValueError('expected an object with the list "tripleset".')
    for triple in triples:
        _check_triple(triple)
    return [[part.strip() for part in triple] for triple in triples]


def _json_texts(entry: Any) -> list[str]:
    annotations = entry.get("annotations")
    if not isinstance(annotations, list | tuple):
        raise ValueError('expected the list "annotations".')
    texts = [annotation.get("text") if isinstance(annotation, dict) else None for annotation in annotations]
    return _check_texts(texts)


def _hub_texts(entry: Any) -> list[str]:
    # What is a list of objects in the file is an object of lists in older conversions of the hub.
    annotations = entry["annotations"]
    return _check_texts(annotations["text"]) if isinstance(annotations, dict) else _json_texts(entry)


def _xml_triples(entry: ElementTree.Element) -> list[list[str]]:
    triples = [(element.text or "").split(" | ") for element in entry.iterfind("modifiedtripleset/mtriple")]
    for triple in triples:
        _check_triple(triple)
    return [[part.strip() for part in triple] for triple in triples]


def _xml_texts(entry: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in entry.iterfind("lex")]


def _check_triple(triple: Any) -> None:
    is_triple = isinstance(triple, list | tuple) and len(triple) == 3
    if not is_triple or not all(isinstance(part, str) and part.strip() for part in triple):
        raise ValueError(f"{triple!r} is not a triple of three texts (subject, relation, object).")


def _check_texts(texts: Sequence[Any]) -> list[str]:
    for text in texts:
        if not isinstance(text, str):
            raise ValueError('every annotation must be an object with the string "text".')
    return list(texts)


def _advice(file: pathlib.Path) -> str:
    advice = (
        f"the folder of DART must hold {_FILE.format('train')}.json, ...-dev.json and ...-test.json, or the same as"
        " .xml (github.com/Yale-LILY/dart, data/v1.1.1). Set --config.data.path to that folder, or leave it unset to"
        " download from the Hugging Face hub."
    )
    if "train" in file.name:
        advice += " Without the training file, --config.data.train_split=dev trains on dev and evaluates on test alone."
    return advice
