"""Reads the E2E NLG challenge (Novikova et al. 2017, arXiv 1706.09254): restaurants, from attributes to a sentence."""

from __future__ import annotations

import csv
import os
import pathlib
import re

from dp_rmt.data.readers.hub import load_converted_splits
from dp_rmt.data.readers.text_files import open_text
from dp_rmt.data.readers.text_pairs import Record

HUB_DATASET = "tuetschek/e2e_nlg"
# Attribute names as Li & Liang 2021 (arXiv 2101.00190) and, privately, Li et al. 2022 (arXiv 2110.05679) write them.
_ATTRIBUTE_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_ATTRIBUTE = re.compile(r"\s*([^\[\],]+?)\s*\[([^\[\]]*)\]\s*(?:,|$)")
_ADVICE = (
    "the folder of E2E must hold trainset.csv, devset.csv and testset_w_refs.csv (or testset.csv, which has no"
    " references). Set --config.data.path to that folder, or leave it unset to download from the Hugging Face hub."
)


def linearize_meaning(meaning: str) -> str:
    """Writes a meaning representation as `name : value | name : value`, in its order.

    This is the form behind the literature's E2E numbers with GPT-2 (Li & Liang 2021, figure 1; Li et al. 2022), except
    that the values stay as published, such as "£30". In their copy of the data they were split into tokens ("£ 30").

    Raises:
        ValueError: it is not of the form `attribute[value], attribute[value]`.

    >>> linearize_meaning("name[Blue Spice], eatType[pub], familyFriendly[no]")
    'name : Blue Spice | Type : pub | family friendly : no'
    """
    parts, position = [], 0
    while position < len(meaning):
        match = _ATTRIBUTE.match(meaning, position)
        if match is None or not match[2].strip():
            raise ValueError(
                f"the meaning representation {meaning!r} is malformed at {meaning[position:].strip()!r}: expected"
                " 'attribute[value], attribute[value], ...'."
            )
        parts.append(f"{_ATTRIBUTE_NAMES.get(match[1], match[1])} : {match[2].strip()}")
        position = match.end()
    if not parts:
        raise ValueError("the meaning representation is empty.")
    return " | ".join(parts)


def read_e2e_csv(file: str | os.PathLike[str]) -> list[Record]:
    """Reads a CSV file of E2E with columns `mr` and `ref`, or without `ref` (the test set without references).

    Other columns are not looked at, such as `fixed` and `orig_mr` of the cleaned E2E (Dušek et al. 2019, arXiv
    1911.03905). Blank lines are skipped.

    Returns:
        One record for each row, in the order of the file, with one reference or none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the columns are wrong, a row is malformed or a text is empty; the message has file and line.
    """
    file = pathlib.Path(file)
    records = []
    with open_text(file, advice=_ADVICE, newline="") as stream:
        # With `strict` a stray quote is an error, and not text that swallows the rows after it.
        rows = csv.reader(stream, strict=True)
        line = 1
        try:
            header = [name.strip().lower() for name in next(rows)]
            if "mr" not in header or ("ref" not in header and len(header) > 1):
                raise ValueError(f"the columns are {header}, but E2E has 'mr,ref', or 'mr' without references.")
            line = rows.line_num + 1
            for row in filter(None, rows):
                records.append(_record(row, header, f"{file}, line {line}"))
                line = rows.line_num + 1
        except UnicodeDecodeError:
            raise
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"{file}, line {line}: {error} Correct the file, or download it again from"
                " github.com/tuetschek/e2e-dataset."
            ) from None
    if not records:
        raise ValueError(f"{file} has a header but no rows. Download the file again.")
    return records


def read_e2e_split(folder: pathlib.Path, split: str) -> list[Record]:
    """Reads train, dev or test from a folder. For the test set, the file with references is preferred."""
    names = {"train": ("trainset.csv",), "dev": ("devset.csv",), "test": ("testset_w_refs.csv", "testset.csv")}[split]
    found = [folder / name for name in names if (folder / name).is_file()]
    return read_e2e_csv(found[0] if found else folder / names[0])


def read_e2e_hub() -> dict[str, list[Record]]:
    """Reads all splits from the hub.

    Raises:
        RuntimeError: the hub could not be read.
        ValueError: a row is malformed.
    """
    splits = load_converted_splits(
        HUB_DATASET,
        what="E2E",
        advice="download the CSV files of github.com/tuetschek/e2e-dataset and set --config.data.path to their folder.",
    )
    return {name: _hub_records(split, f"{HUB_DATASET}, {name}") for name, split in splits.items()}


def _hub_records(split, where: str) -> list[Record]:
    rows = zip(split["meaning_representation"], split["human_reference"], strict=True)
    records = []
    for number, row in enumerate(rows, start=1):
        place = f"{where}, row {number}"
        try:
            records.append(_record(list(row), ["mr", "ref"], place))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return records


def _record(row: list[str], header: list[str], where: str) -> Record:
    if len(row) != len(header):
        raise ValueError(
            f"{len(row)} fields where the header has {len(header)} ({', '.join(header)}): a text with a comma must"
            " stand in double quotes."
        )
    fields = dict(zip(header, row, strict=True))
    source = linearize_meaning(fields["mr"])
    references = (fields["ref"].strip(),) if "ref" in fields else ()
    if not all(references):
        raise ValueError("the text in column 'ref' is empty.")
    return Record(source, references, where)
