"""Rows of one's own say whose they are."""

from __future__ import annotations

import json

import pytest

from dp_rmt.data import Columns, load_documents, load_labelled_table, load_own_pairs


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "who": f"p{i % 3}"} for i in range(6)]
    return write(tmp_path / "train.jsonl", rows)


def test_labelled_text(file):
    table = load_labelled_table(file, Columns(user="who"), max_train_examples=4)
    assert table.train.users == ("p0", "p1", "p2", "p0")
    assert load_labelled_table(file).train.users == ()
    with pytest.raises(ValueError, match="no column 'whom'"):
        load_labelled_table(file, Columns(user="whom"))


def test_evaluation_rows_need_no_users(file):
    write(file.parent / "dev.jsonl", [{"text": "t", "label": "a"}])
    assert load_labelled_table(file.parent, Columns(user="who")).evaluations["dev"].users == ()


def test_text_from_text(tmp_path):
    rows = [{"instruction": f"q{i}", "response": "a", "who": f"p{i % 2}"} for i in range(3)]
    pairs = load_own_pairs(write(tmp_path / "train.jsonl", rows), user_column="who")
    assert pairs.train.users == ("p0", "p1", "p0")
    assert pairs.train[1:].users == ("p1", "p0")


def test_documents(file):
    documents = load_documents("documents", path=file, sensitive=(), user_column="who")
    assert [document.user for document in documents.train] == ["p0", "p1", "p2"] * 2


def test_a_row_without_a_user_is_refused(tmp_path):
    rows = [{"text": "t", "label": "a", "who": "p"}, {"text": "u", "label": "b", "who": " "}]
    with pytest.raises(ValueError, match="'who' is empty"):
        load_labelled_table(write(tmp_path / "train.jsonl", rows), Columns(user="who"))
