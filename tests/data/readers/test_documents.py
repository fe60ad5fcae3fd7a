"""Documents, what is sensitive in them, and every way in which their files can be wrong."""

import csv
import io
import itertools
import json
import os
import pathlib
import sys
import tarfile
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_rmt.data import Document, load_documents, tokenize_documents
from dp_rmt.data.readers.documents import tokenize_beginnings
from dp_rmt.data.readers.sensitive import PATTERNS, attribute_finder, merged, pattern_finder

DIALOGUES = {
    "train/dial-10.txt": "SYS: Hello.\nUSR: I'm Ann Lee, 555-01-44.\n",
    "train/dial-2.txt": "SYS: Hi.\nUSR: Bob, of 1 Main Road.",
    "train/canary-0.txt": "My ID is 341752.",
    "valid/dial-0.txt": "SYS: Hi.\nUSR: Nobody.",
    "test/dial-0.txt": "SYS: Hi.\nUSR: Cid.",
}
DATABASE = [["", "name", "address", "order"], ["0", "Ann Lee", "1 Main Road", "555-01-44"], ["1", "Cid", "x", "9"]]


def customersim(folder, dialogues=DIALOGUES, database=DATABASE):
    with tarfile.open(folder / "simdial.tar.gz", "w:gz") as archive:
        for name, text in dialogues.items():
            member = tarfile.TarInfo(f"data/simdial/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    with (folder / "database_20000.csv").open("w", newline="") as file:
        csv.writer(file).writerows(database)
    return folder


def documents(folder, rows, spans=None, split="train"):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    if spans is not None:
        (folder / f"{split}.spans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spans), "utf-8")
    return folder


def sensitive_texts(document):
    return [document.text[start:end] for start, end in document.spans]


def test_customersim_in_the_order_of_its_numbers_with_canaries_last(tmp_path):
    found = load_documents("customersim", path=customersim(tmp_path), sensitive=("attributes", "numbers"))
    assert [document.text[-12:] for document in found.train] == ["1 Main Road.", ", 555-01-44.", "D is 341752."]
    assert [document.is_canary for document in found.train] == [False, False, True]
    assert [sensitive_texts(document) for document in found.train] == [
        ["1 Main Road"],
        ["Ann Lee", "555-01-44"],
        ["341752"],
    ]
    assert sensitive_texts(found.evaluations["test"][0]) == ["Cid"]
    assert found.train[0].where == f"{tmp_path}/simdial.tar.gz, data/simdial/train/dial-2.txt, line 1"


def test_canaries_are_kept_beside_the_first_dialogues_and_whole(tmp_path):
    found = load_documents("customersim", path=customersim(tmp_path), sensitive=(), max_train_examples=1, skip_lines=1)
    assert [document.text for document in found.train] == ["USR: Bob, of 1 Main Road.", "My ID is 341752."]
    with pytest.raises(ValueError, match=r"train/dial-\d+.txt has no text after its first 2 lines"):
        load_documents("customersim", path=tmp_path, sensitive=(), skip_lines=2)


def test_attributes_are_whole_words_and_may_begin_with_a_bracket():
    find = attribute_finder(["(980) 322", "Ann", "Annabel Lee"])
    text = "Annabel Lee, Ann, Anna, XAnn: (980) 322, (980) 3225"
    assert [text[start:end] for start, end in find(text)] == ["Annabel Lee", "Ann", "(980) 322"]
    with pytest.raises(ValueError, match="'--' has no letter and no digit"):
        attribute_finder(["--"])


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("numbers", "at 8, call 542-016-4074 or 2414767171; v2", ["8", "542-016-4074", "2414767171"]),
        ("emails", "to a.b+c@x-y.co.uk, not @x", ["a.b+c@x-y.co.uk"]),
        ("dates", "2020-01-31, 3/4/21, 12 March 2020; March", ["2020-01-31", "3/4/21", "12 March 2020"]),
        ("dates", "on Mar 3rd, 1999", ["Mar 3rd, 1999"]),
        ("codes", "0UOKFRS1GA, HELLO, ABCDEFGH", ["0UOKFRS1GA", "ABCDEFGH"]),
    ],
)
def test_patterns(name, text, found):
    assert [text[start:end] for start, end in pattern_finder(name)(text)] == found


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)).map(lambda s: (s[0], s[0] + s[1]))))
def test_merged_spans_are_the_union_ascending_and_apart(spans):
    union = merged(spans)
    assert {c for start, end in union for c in range(start, end)} == {c for a, b in spans for c in range(a, b)}
    assert all(first[1] < second[0] for first, second in itertools.pairwise(union))


def test_span_files_mark_their_documents(tmp_path):
    rows = [{"text": "Zoë is 8."}, {"text": "My ID is 12.", "canary": True}]
    spans = [{"line": 2, "start": 9, "end": 11}, {"line": 1, "start": 0, "end": 3, "text": "Zoë"}]
    documents(tmp_path, rows, spans)
    documents(tmp_path, rows[:1], [], split="test")
    found = load_documents("documents", path=tmp_path, sensitive=("spans",))
    assert [sensitive_texts(document) for document in found.train] == [["Zoë"], ["12"]]
    assert found.train[1].is_canary
    assert list(found.evaluations) == ["test"]
    both = load_documents("documents", path=tmp_path, sensitive=("spans", "numbers"))
    assert [sensitive_texts(document) for document in both.train] == [["Zoë", "8"], ["12"]]


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"line": 1, "start": 0, "end": 9}, r"line 2: the span \[0, 9\) does not fit .*jsonl, line 1, which has 3"),
        ({"line": 1, "start": 2, "end": 2}, r"line 2: the span \[2, 2\) does not fit"),
        ({"line": 1, "start": -1, "end": 2}, r"line 2: the span \[-1, 2\) does not fit"),
        ({"line": 7, "start": 0, "end": 1}, "line 2: there is no document in line 7"),
        ({"line": 1, "start": 0, "end": 2, "text": "an"}, r"characters \[0, 2\) of .* are 'An', not 'an'"),
        ({"line": 1, "start": 0}, "line 2: expected an object with the keys line, start, end"),
        ({"line": 1, "start": 0, "end": 1.0}, "line 2: 'end' must be of type int, got 1.0"),
        ({"line": 1, "start": 0, "end": True}, "line 2: 'end' must be of type int, got True"),
        ([1], "line 2: expected an object .* got list"),
    ],
)
def test_spans_that_do_not_fit_name_file_and_line(tmp_path, span, message):
    documents(tmp_path, [{"text": "Ann"}], [{"line": 1, "start": 0, "end": 1}, span])
    with pytest.raises(ValueError, match=message) as caught:
        load_documents("documents", path=tmp_path, sensitive=("spans",))
    assert str(tmp_path / "train.spans.jsonl") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": [3]}\n', r"train.jsonl, line 2: column 'text' holds a list, and not text"),
        ('{"text": " "}\n', "train.jsonl, line 1: column 'text' is empty"),
        ('{"text": "a"\n', "train.jsonl, line 1, column 13: broken JSON"),
        ('{"text": "a", "canary": 1}\n', "line 1: 'canary' must be true or false, got 1"),
        ("\n\n", "has no rows"),
        ("", "is empty"),
    ],
)
def test_broken_documents_name_file_and_line(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_documents("documents", path=tmp_path, sensitive=("numbers",))


def test_missing_span_files_and_data(tmp_path):
    documents(tmp_path, [{"text": "Ann"}])
    with pytest.raises(FileNotFoundError, match=r"train.spans.jsonl does not exist: it must hold one JSON object"):
        load_documents("documents", path=tmp_path, sensitive=("spans",))
    with pytest.raises(FileNotFoundError, match=r"simdial.tar.gz does not exist: it comes with"):
        load_documents("customersim", path=tmp_path, sensitive=())
    with pytest.raises(ValueError, match=r"set --config.data.path"):
        load_documents("documents", path=None, sensitive=())


def test_an_empty_sensitive_set_names_where_it_was_looked_for(tmp_path):
    documents(tmp_path, [{"text": "Ann"}], [])
    with pytest.raises(ValueError, match=rf"{tmp_path}: none of the 1 training documents has a sensitive") as caught:
        load_documents("documents", path=tmp_path, sensitive=("spans", "numbers"))
    assert f"{tmp_path / 'train.spans.jsonl'}, pattern 'numbers'" in str(caught.value)
    customersim(tmp_path, database=[["", "name"], ["0", "Zed"]])
    with pytest.raises(ValueError, match=r"simdial.tar.gz: none of the 3 .*database_20000.csv"):
        load_documents("customersim", path=tmp_path, sensitive=("attributes",))


@pytest.mark.parametrize(
    ("task", "sensitive", "message"),
    [
        ("documents", ("attributes",), "'attributes' does not go with the task 'documents'"),
        ("customersim", ("spans",), "'spans' does not go with the task 'customersim'"),
        ("e2e", (), "Unknown task of documents 'e2e'"),
    ],
)
def test_sources_that_do_not_go_with_the_task(tmp_path, task, sensitive, message):
    with pytest.raises(ValueError, match=message):
        load_documents(task, path=tmp_path, sensitive=sensitive)


@pytest.mark.parametrize("content", [b"", b"no archive", "cut"])
def test_a_damaged_archive(tmp_path, content):
    customersim(tmp_path)
    path = tmp_path / "simdial.tar.gz"
    path.write_bytes(path.read_bytes()[:60] if content == "cut" else content)
    with pytest.raises(ValueError, match=r"simdial.tar.gz is damaged"):
        load_documents("customersim", path=tmp_path, sensitive=())


def test_another_archive_and_a_ragged_database(tmp_path):
    customersim(tmp_path, dialogues={"train/other.txt": "x"})
    with pytest.raises(ValueError, match=r"holds no files train/dial-NUMBER.txt"):
        load_documents("customersim", path=tmp_path, sensitive=())
    customersim(tmp_path, database=[["", "name"], ["0", "Ann", "more"]])
    with pytest.raises(ValueError, match=r"database_20000.csv, line 2: 3 columns under 2"):
        load_documents("customersim", path=tmp_path, sensitive=("attributes",))


def test_presidio_is_asked_if_it_is_there_and_its_absence_is_told(tmp_path, monkeypatch):
    documents(tmp_path, [{"text": "I am Ann."}])
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ImportError, match=r"pip install 'dp_rmt\[presidio\]'"):
        load_documents("documents", path=tmp_path, sensitive=("presidio",))
    asked = []

    class AnalyzerEngine:
        def analyze(self, *, text, language):
            asked.append((text, language))
            return [types.SimpleNamespace(start=5, end=8)]

    fake = types.ModuleType("presidio_analyzer")
    fake.AnalyzerEngine = AnalyzerEngine
    monkeypatch.setitem(sys.modules, "presidio_analyzer", fake)
    found = load_documents("documents", path=tmp_path, sensitive=("presidio",))
    assert sensitive_texts(found.train[0]) == ["Ann"]
    assert asked == [("I am Ann.", "en")]


def test_tokens_are_sensitive_where_any_character_is(byte_tokenizer):
    text = "it was great terrible"
    rows = tokenize_documents(
        [Document(text, "here", spans=((9, 10),)), Document("it", "there")], byte_tokenizer, max_length=12
    )
    ids, marks = rows["input_ids"], rows["sensitive_mask"]
    tokens = byte_tokenizer.convert_ids_to_tokens(ids[0])
    assert [token for token, mark in zip(tokens, marks[0], strict=True) if mark] == ["Ġgreat"]
    assert (tokens[0], ids[1][0]) == ("<s>", byte_tokenizer.bos_token_id)
    length = int(rows["attention_mask"][1].sum())
    assert ids[1][length - 1] == byte_tokenizer.eos_token_id
    np.testing.assert_array_equal(rows["loss_mask"][1], [0] + [1] * (length - 1) + [0] * (12 - length))
    assert marks[1].sum() == 0


def test_the_beginning_of_a_text_has_the_tokens_that_documents_begin_with(byte_tokenizer):
    documents = [Document("A text that ends.", "a"), Document("B", "b")]
    rows = tokenize_documents(documents, byte_tokenizer, max_length=64)
    for row, ids in zip(rows["input_ids"], tokenize_beginnings(["A text that", "B"], byte_tokenizer), strict=True):
        assert row[: len(ids)].tolist() == ids
    assert len(ids) == 2  # BOS, and no EOS: the text goes on
    assert tokenize_beginnings([], byte_tokenizer) == []


def test_long_documents_are_cut_and_long_canaries_refused(byte_tokenizer):
    document = Document("it was great", "a.jsonl, line 4", spans=((0, 12),))
    rows = tokenize_documents([document], byte_tokenizer, max_length=3)
    assert rows["attention_mask"].tolist() == [[1, 1, 1]]
    assert rows["sensitive_mask"].tolist() == [[0, 1, 1]]
    canary = Document("it was great", "a.jsonl, line 4", is_canary=True)
    with pytest.raises(ValueError, match=r"a.jsonl, line 4: the canary has 5 tokens, but max_length=3 is the context"):
        tokenize_documents([canary], byte_tokenizer, max_length=3)
    with pytest.raises(ValueError, match="no documents"):
        tokenize_documents([], byte_tokenizer, max_length=3)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_alone_is_a_source(tmp_path, name):
    documents(tmp_path, [{"text": "1, ABCDEFGH, a@b.c, 2020-01-31"}])
    assert load_documents("documents", path=tmp_path, sensitive=(name,)).train[0].spans


def test_the_real_customersim():
    shared = os.environ.get("DP_RMT_SHARED")
    folder = pathlib.Path(shared or "absent") / "data" / "customersim"
    if not folder.is_dir():
        pytest.skip("DP_RMT_SHARED does not name a folder that holds data/customersim")
    found = load_documents("customersim", path=folder, sensitive=("attributes", "codes", "numbers"))
    assert (len(found.train), {name: len(rows) for name, rows in found.evaluations.items()}) == (
        10_010,
        {"dev": 1000, "test": 1000},
    )
    canaries = [document for document in found.train if document.is_canary]
    assert [sensitive_texts(document) for document in canaries] == [["341752"]] * 10
    assert sensitive_texts(found.train[1]) == ["James Salim", "980.322.8737", "0UOKFRS1GA"]
    without = sum(not document.spans for document in found.train)
    assert without == 0
