"""Documents of one's own: folders of .txt files, rows with a column of text, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dp_rmt.data import Extras, load_documents


def texts(rows: Any) -> list[str]:
    return [document.text for document in rows]


def test_every_file_of_a_folder_is_one_document(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"\ufeff{name} é\r\n\r\nsecond part\r\n", encoding="utf-8", newline="")
    (tmp_path / "notes.md").write_text("no document")
    found = load_documents("documents", path=tmp_path, sensitive=())
    assert texts(found.train) == ["a.txt é\n\nsecond part", "b.txt é\n\nsecond part"]
    assert found.train[1].where == f"{tmp_path / 'b.txt'}, line 1"
    assert found.notes == ("documents: 2, each one example of its own and one sequence, whatever its length",)


def test_folders_are_splits(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(split)
    found = load_documents("documents", path=tmp_path, sensitive=())
    assert (texts(found.train), texts(found.evaluations["dev"])) == (["train"], ["valid"])
    with pytest.raises(ValueError, match=r"config.data.dev_share=0.5: .* has a folder dev already"):
        load_documents("documents", path=tmp_path, sensitive=(), extras=Extras(dev_share=0.5))
    (tmp_path / "train" / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no folder train with .txt files, only dev"):
        load_documents("documents", path=tmp_path, sensitive=())


def test_rows_have_a_column_of_text_and_may_have_others() -> None:
    rows = [{"body": f" text {number}", "id": number, "canary": number == 7} for number in range(40)]
    options: dict[str, Any] = {"sensitive": (), "text_column": "body"}
    found = load_documents("documents", path=rows, **options)
    assert texts(found.train)[:2] == [" text 0", " text 1"]  # as they are, since spans count their characters
    shared = load_documents("documents", path=rows, **options, extras=Extras(dev_share=0.5))
    assert shared.train[-1].is_canary
    assert sorted(texts([*shared.train, *shared.evaluations["dev"]])) == sorted(texts(found.train))
    assert len(shared.evaluations["dev"]) > 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("book.txt", "a", r"book.txt: a .txt file is one document, and one document is one example. Give a folder"),
        ("docs/a.txt", " \n\n", r"a.txt has nothing but blank lines. Remove the file"),
        ("docs/a.txt", "", r"a.txt is empty \(0 bytes\)"),
        ("a.csv", "text,canary\nx,true\n", "a.csv, line 2: 'canary' must be true or false, got 'true'"),
        ("a.jsonl", '{"body": "x"}\n', "a.jsonl, line 1: there is no column 'text', only 'body'"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "a.jsonl, line 1: .* half of a surrogate pair"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_documents("documents", path=file.parent if "/" in name else file, sensitive=())
