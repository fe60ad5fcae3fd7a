"""Labelled text of one's own: three formats give the same rows, and what is wrong is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dp_rmt.data import Columns, load_labelled_table

ROWS = [("a film, long", "good"), ('she said "no"', "bad"), ("café", "good")]


def as_csv(rows: list[tuple[str, str]]) -> str:
    quoted = ('"{}"'.format(text.replace('"', '""')) for text, _ in rows)
    return "text,label\n" + "".join(f"{text},{label}\n" for text, (_, label) in zip(quoted, rows, strict=True))


def as_tsv(rows: list[tuple[str, str]]) -> str:
    return "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)


def as_jsonl(rows: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


FORMATS: dict[str, Callable[[list[tuple[str, str]]], str]] = {"csv": as_csv, "tsv": as_tsv, "jsonl": as_jsonl}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_every_format_gives_the_same_rows(suffix: str, start: str, tmp_path: Path) -> None:
    file = tmp_path / f"reviews.{suffix}"
    file.write_text(start + FORMATS[suffix](ROWS) + "\n", encoding="utf-8")  # with a byte-order mark, and a blank line
    table = load_labelled_table(file, Columns(labels=("bad", "good")))
    assert table.labels == ("bad", "good")
    assert table.train.texts == tuple(text for text, _ in ROWS)
    assert table.train.text_pairs is None
    assert table.train.labels.tolist() == [1, 0, 1]
    assert table.evaluations == {}


def test_a_folder_has_splits_and_the_order_of_the_labels_is_that_given(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(as_csv(ROWS), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text(as_tsv(ROWS[:1]), encoding="utf-8")
    table = load_labelled_table(tmp_path, Columns(labels=("good", "bad")), max_train_examples=2)
    assert table.train.labels.tolist() == [0, 1]
    assert {name: rows.labels.tolist() for name, rows in table.evaluations.items()} == {"dev": [0]}


def test_pairs_and_numbers_for_labels(tmp_path: Path) -> None:
    rows = [{"a": "one", "b": "two", "y": 1}, {"a": "three", "b": "four", "y": 0}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = load_labelled_table(tmp_path / "pairs.jsonl", Columns(("a", "b"), "y", ("0", "1")))
    assert (table.train.texts, table.train.text_pairs) == (("one", "three"), ("two", "four"))
    assert table.train.labels.tolist() == [1, 0]


def test_labels_that_are_not_given_are_those_of_the_training_rows_and_a_warning_says_what_that_gives_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.csv").write_text(as_csv(ROWS), encoding="utf-8")
    assert load_labelled_table(tmp_path).labels == ("bad", "good")
    assert "the classes bad, good are those that occur in the training rows" in caplog.text
    assert "the guarantee does not cover" in caplog.text
    caplog.clear()
    load_labelled_table(tmp_path, Columns(labels=("bad", "good")))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "text,label\nx,good\ny,fine\n", {}, "a.csv, line 3: unknown label 'fine' .* 'bad', 'good'"),
        ("a.csv", "text,label\nx\n", {}, r"a.csv, line 2: 1 fields where the header has 2 \(text, label\)"),
        ("a.csv", 'text,label\n"x,good\n', {}, "a.csv, line 2: unexpected end of data"),
        ("a.csv", "text,label\n ,good\n", {}, "a.csv, line 2: column 'text' is empty"),
        ("a.csv", "text,label\n", {}, "a.csv has no rows"),
        ("a.csv", "", {}, "is empty"),
        ("a.csv", "review,label\nx,good\n", {}, "line 2: there is no column 'text', only 'review', 'label'"),
        ("a.tsv", "text\tlabel\nx\ty\tgood\n", {}, "a.tsv, line 2: 3 fields where the header has 2"),
        ("a.jsonl", '{"text": "x"\n', {}, "a.jsonl, line 1, column .*: broken JSON"),
        ("a.jsonl", "[1]\n", {}, "a.jsonl, line 1: expected an object .* got a list"),
        ("a.txt", "x", {}, "rows are read from files that end with .csv, .tsv, .jsonl, .json, .parquet"),
        ("a.csv", "text,label\nx,good\n", {"labels": ()}, "there is one class alone, 'good'"),
        ("a.csv", "text,label\nx,good\n", {"texts": ()}, "name one column of texts, or two"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_labelled_table(tmp_path / name, Columns(**{"labels": ("bad", "good"), **options}))


def test_a_folder_without_train_or_with_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has no file train.csv, train.tsv, train.jsonl, train.json, train.parquet"
    ):
        load_labelled_table(tmp_path)
    for suffix, write in FORMATS.items():
        (tmp_path / f"train.{suffix}").write_text(write(ROWS))
    with pytest.raises(ValueError, match=r"has train.csv and train.tsv and train.jsonl: leave one"):
        load_labelled_table(tmp_path)
