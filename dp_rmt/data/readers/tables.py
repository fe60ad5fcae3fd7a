"""Tables of one's own, split by split: files, a folder, a hub name, or what a Python program holds in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from dp_rmt.data.readers.hub import load_hub_dataset
from dp_rmt.data.readers.rows import SUFFIXES, Row, as_row, read_rows
from dp_rmt.extras import extra

SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val", "eval"), "test": ("test",)}
"""The splits, and the names that files and data sets have for each."""
HUB = "hub:"
"""What stands before the name of a data set on the hub, so that a mistyped path never leaves the machine."""

RowT = TypeVar("RowT")
Source = str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any]
"""A file, a folder, hub:NAME, a `datasets.Dataset` or `DatasetDict`, rows as dictionaries, or {split: such rows}."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One split.

    Attributes:
      rows: its rows.
      classes: by column the names of its classes, of a data set that declares them.
    """

    rows: Sequence[Row]
    classes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Extras:
    """Where other splits come from, if the source of the training rows does not hold them.

    Attributes:
      dev_path, test_path: files of rows.
      dev_share: the share of the training rows that is held out for "dev", see `is_held_out`.
    """

    dev_path: str | None = None
    test_path: str | None = None
    dev_share: float | None = None


ONLY_THE_SOURCE = Extras()
"""No other splits than those of the source."""


def read_tables(source: Source, extras: Extras = ONLY_THE_SOURCE) -> dict[str, Table]:
    """Reads every split that there is.

    Args:
      source: where the rows are.
      extras: files of other splits.

    Returns:
      "train", and "dev" and "test" as far as there are such rows.

    Raises:
      FileNotFoundError: there is no such file or folder, or no split to train on.
      ValueError: rows are malformed, or a split comes twice; the message says where.
      RuntimeError: the hub could not be read.
    """
    tables = _tables(source)
    for split, path in (("dev", extras.dev_path), ("test", extras.test_path)):
        if path is None:
            continue
        if split in tables:
            raise ValueError(f"config.data.{split}_path={path}: the data has a split {split} already; leave one out")
        tables[split] = Table(read_rows(pathlib.Path(path)))
    if extras.dev_share is not None and "dev" in tables:
        raise ValueError(
            f"config.data.dev_share={extras.dev_share}: the data has a split dev already; leave the share out"
        )
    return tables


def shared_out(rows: Sequence[RowT], share: float, text: Callable[[RowT], str]) -> dict[str, list[RowT]]:
    """Training rows with a public random share held out, by `is_held_out`.

    Args:
      rows: all rows.
      share: of `Extras`.
      text: the text of a row that decides.

    Returns:
      "train" and "dev".

    Raises:
      ValueError: one of them has no rows.
    """
    parts: dict[str, list[RowT]] = {"train": [], "dev": []}
    for row in rows:
        parts["dev" if is_held_out(text(row), share) else "train"].append(row)
    if not all(parts.values()):
        raise ValueError(
            f"config.data.dev_share={share} of {len(rows)} rows leaves no row to train on, or none to evaluate on. "
            "Take another share, or give --config.data.dev_path"
        )
    return parts


def is_held_out(text: str, share: float) -> bool:
    """Whether a row with this text belongs to the share that is held out for evaluation.

    A fixed hash of the text decides, and no other row takes part. So one example more or less changes one row of one
    side, as the guarantee assumes; a shuffle of all rows would not do. Rows with equal texts stay together.

    >>> sum(is_held_out(f"text {number}", 0.1) for number in range(1000))
    95
    """
    digest = hashlib.sha256(f"dp_rmt dev_share\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def described(source: Source) -> str:
    """The source in a few words, for messages."""
    return str(source) if isinstance(source, str | os.PathLike) else f"the rows given ({type(source).__name__})"


def _tables(source: Source) -> dict[str, Table]:
    if isinstance(source, str) and source.startswith(HUB):
        return _from_hub(source)
    if isinstance(source, str | os.PathLike):
        path = pathlib.Path(source)
        return _from_folder(path) if path.is_dir() else {"train": Table(read_rows(path))}
    if isinstance(source, Mapping):
        return _named({name: _in_memory(rows, name) for name, rows in source.items()}, described(source))
    return {"train": _in_memory(source, "train")}


def _from_hub(source: str) -> dict[str, Table]:
    name, _, config = source.removeprefix(HUB).partition(":")
    advice = "download its files yourself and give their folder."
    loaded = load_hub_dataset(name, config or None, what=f"the data set {name}", advice=advice)
    return _named({split: _in_memory(rows, f"{name}, {split}") for split, rows in loaded.items()}, source)


def _from_folder(folder: pathlib.Path) -> dict[str, Table]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        with extra("finetune"):
            import datasets  # here, since other formats need no package

        loaded = datasets.load_from_disk(os.fspath(folder))
        splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
        return _named({name: _in_memory(rows, f"{folder}, {name}") for name, rows in splits.items()}, str(folder))
    found: dict[str, Table] = {}
    for split, names in SPLITS.items():
        files = [file for name in names for suffix in SUFFIXES if (file := folder / f"{name}{suffix}").is_file()]
        if len(files) > 1:
            raise ValueError(f"{folder} has {' and '.join(file.name for file in files)}: leave one of them there")
        if files:
            found[split] = Table(read_rows(files[0]))
    if "train" not in found:
        raise FileNotFoundError(
            f"{folder} has no file train{', train'.join(SUFFIXES)}: give a folder that has one of them, or the file "
            "itself"
        )
    return found


def _named(tables: Mapping[str, Table], where: str) -> dict[str, Table]:
    """The tables by this library's names of splits; splits with other names are left out."""
    found = {}
    for split, names in SPLITS.items():
        there = [name for name in names if name in tables]
        if len(there) > 1:
            raise ValueError(f"{where} has the splits {' and '.join(there)}: leave one of them out")
        if there:
            found[split] = tables[there[0]]
    if "train" not in found:
        raise ValueError(f"{where} has no split 'train', only {', '.join(map(repr, tables))}. Name one of them so.")
    return found


def _in_memory(rows: Any, name: str) -> Table:
    """A `datasets.Dataset`, or dictionaries."""
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise ValueError(f"{name}: expected rows as dictionaries, got a {type(rows).__name__}")
    features = getattr(rows, "features", None) or {}
    classes = {column: tuple(kind.names) for column, kind in features.items() if hasattr(kind, "int2str")}
    found = []
    for number, fields in enumerate(rows, start=1):
        row = as_row(f"{name}, row {number}", fields)
        named = {column: _class_name(row.fields.get(column), names) for column, names in classes.items()}
        found.append(Row(row.where, {**row.fields, **named}))
    if not found:
        raise ValueError(f"{name} has no rows. Give a row for each example.")
    return Table(found, classes)


def _class_name(number: Any, names: Sequence[str]) -> str | None:
    """The name of a class; None for -1, with which data sets of the hub mark rows without a label."""
    return None if number is None or number < 0 else names[number]
