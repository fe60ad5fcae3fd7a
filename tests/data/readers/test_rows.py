"""Rows of one's own in every format, and what is wrong with them by place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from own_data import CELLS, FORMATS, MATRIX, TEXTS, lines

from dp_rmt.data import Columns, Extras, load_documents, load_labelled_table, load_own_pairs, read_prompt, read_tables
from dp_rmt.data.readers.text_pairs import Turn
from dp_rmt.data.readers.text_shapes import Shape


@pytest.mark.parametrize(("task", "kind"), MATRIX)
def test_every_format_gives_the_rows_that_were_written(task: str, kind: str, tmp_path: Path) -> None:
    rows = CELLS[task].rows
    tables = read_tables(FORMATS[kind](rows, tmp_path))
    assert set(tables) == ({"train", "dev"} if "split" in kind else {"train"})
    for table in tables.values():
        if CELLS[task].is_flat:  # in CSV and TSV all is text
            found = [{name: str(value) for name, value in row.fields.items()} for row in table.rows]
            assert found == [{name: str(value) for name, value in row.items()} for row in rows]
        else:
            assert json.dumps([row.fields for row in table.rows]) == json.dumps(list(rows))
        assert len({row.where for row in table.rows}) == len(rows)


def examples(task: str, source: Any) -> Any:
    """What is trained on, and where it stands, by the task's own reader."""
    cell = CELLS[task]
    named = dict(cell.settings)
    if cell.task == "labelled_table":
        label = named.pop("label_column", "label")
        train = load_labelled_table(source, Columns(named.pop("text_columns", ("text",)), label, **named)).train
        assert train.labels is not None
        return train.texts, train.text_pairs, train.labels.tolist()
    if cell.task == "text_pairs":
        shape = Shape(named["source_column"], named["target_column"]) if named else None
        return load_own_pairs(source, shape).train
    return [document.text for document in load_documents("documents", path=source, sensitive=()).train]


@pytest.mark.parametrize(("task", "kind"), MATRIX)
def test_every_format_gives_the_examples_that_dictionaries_give(task: str, kind: str, tmp_path: Path) -> None:
    rows = CELLS[task].rows
    assert examples(task, FORMATS[kind](rows, tmp_path)) == examples(task, list(rows))


def test_a_place_is_the_line_where_a_row_begins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",x\n\nlast,y\n')
    rows = read_tables(tmp_path / "a.csv")["train"].rows
    assert [row.where for row in rows] == [f"{tmp_path / 'a.csv'}, line 2", f"{tmp_path / 'a.csv'}, line 5"]
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    rows = read_tables(tmp_path / "a.jsonl")["train"].rows
    assert [row.where.rpartition(", ")[2] for row in rows] == ["line 2", "line 4"]


def test_a_long_text_is_one_field(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "long " * 60_000 + ",x\nshort,y\n")
    assert len(read_tables(tmp_path / "a.csv")["train"].rows[0].fields["text"]) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nx,\xff\n", r"a.csv is not UTF-8 text"),
        ("a.csv", b"text,text\nx,y\n", r"a.csv, line 1: a column comes twice among text, text"),
        ("a.csv", b'text,label\n"x" y,z\n', r"a.csv, line 2: .*expected after .*Mend the quotes"),
        ("a.tsv", b"text\tlabel\nx\ty\tz\n", r"a.tsv, line 2: 3 fields .*: remove tabs from inside"),
        (
            "a.jsonl",
            b'{"text": "a\\ud83d b"}\n',
            r"a.jsonl, line 1: 'a\\ud83d b' has half of a surrogate .* character 1",
        ),
        ("a.jsonl", b'{"a": [{"b": "\\udc00"}]}\n', r"a.jsonl, line 1: .* half of a surrogate pair \(\\udc00\)"),
        ("a.json", b'[{"text": "a"},\n{"text": "\\ud83d"}]', r"a.json, entry 2: .* half of a surrogate pair"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', r"a.json, line 2, .* Rename it to a.jsonl, as it has an object"),
        ("a.json", b'{"rows": []}', r"a.json holds a JSON dict, and not a list"),
        ("a.json", b"[1]", r"a.json, entry 1: expected an object .* got a int"),
        ("a.parquet", b"PAR1", r"a.parquet is no Parquet file that can be read"),
        ("a.xlsx", b"x", r"a.xlsx: rows are read from files that end with .csv"),
        ("a.jsonl", b"\n\n", "a.jsonl has no rows"),
    ],
)
def test_what_is_wrong_is_named_by_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tables(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"a": 1}, "b"], "train, row 2: expected an object with a field for each column, got a str"),
        ([{"a": "\ud800"}], "train, row 1: .* half of a surrogate pair"),
        ([], "train has no rows"),
        (3, "train: expected rows as dictionaries, got a int"),
        ({"test": [{"a": 1}]}, r"the rows given \(dict\) has no split 'train', only 'test'"),
        ({"train": [{"a": 1}], "dev": [{"a": 1}], "valid": [{"a": 1}]}, "has the splits dev and valid: leave one"),
    ],
)
def test_what_is_wrong_with_rows_from_python_is_named(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tables(source)


def test_other_splits_come_from_files_of_their_own(tmp_path: Path) -> None:
    for name in ("rows", "more"):
        (tmp_path / f"{name}.jsonl").write_text(lines(CELLS["scores"].rows))
    more = str(tmp_path / "more.jsonl")
    tables = read_tables(tmp_path / "rows.jsonl", Extras(dev_path=more, test_path=more))
    assert {split: len(table.rows) for split, table in tables.items()} == {"train": 24, "dev": 24, "test": 24}
    (tmp_path / "rows.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "more.jsonl").rename(tmp_path / "dev.jsonl")
    with pytest.raises(ValueError, match=r"config.data.dev_path=.*: the data has a split dev already"):
        read_tables(tmp_path, Extras(dev_path=more))
    with pytest.raises(ValueError, match=r"config.data.dev_share=0.5: the data has a split dev already"):
        read_tables(tmp_path, Extras(dev_share=0.5))


def test_one_example_more_changes_one_row_of_a_held_out_share() -> None:
    """Neighbours differ in one example of what is trained on, or in none; a shuffle would change many."""
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(400)]
    columns, extras = Columns(labels=("a", "b")), Extras(dev_share=0.25)
    whole = load_labelled_table(rows, columns, extras=extras)
    assert 70 < len(whole.evaluations["dev"]) < 130  # 100 are expected, with a standard deviation of 8.7
    assert len(whole.train) + len(whole.evaluations["dev"]) == 400
    for left_out in (0, 7, 399):
        fewer = load_labelled_table(rows[:left_out] + rows[left_out + 1 :], columns, extras=extras)
        texts, there = [text for text in whole.train.texts if text != f"text {left_out}"], fewer.train.texts
        assert list(there) == texts
    doubled = load_labelled_table([*rows, *rows], columns, extras=extras)
    assert not set(doubled.train.texts) & set(doubled.evaluations["dev"].texts)
    with pytest.raises(ValueError, match=r"config.data.dev_share=0.01 of 2 rows leaves no row to train on, or none to"):
        load_labelled_table(rows[:2], columns, extras=Extras(dev_share=0.01))


def test_classes_that_a_data_set_declares_are_public(caplog: pytest.LogCaptureFixture) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes", "so"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    unlabelled = {"text": ["d", "e"], "label": [-1, -1]}
    both = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict(rows, features=features),
            "test": datasets.Dataset.from_dict(unlabelled, features=features),
        }
    )
    table = load_labelled_table(both)
    assert table.labels == ("no", "yes", "so")
    assert table.train.labels is not None
    assert table.train.labels.tolist() == [1, 0, 1]
    assert caplog.text == ""
    assert table.evaluations == {}
    assert "test has no labels, and is left out" in table.notes
    with pytest.raises(ValueError, match="train, row 1: column 'label' is empty"):
        load_labelled_table({"train": both["test"]})


def test_scores_and_whole_numbers(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": 2.5}]
    table = load_labelled_table(rows, Columns(regression=True))
    assert (table.labels, table.train.labels.tolist()) == ((), [1.0, 2.5])
    # pandas makes whole numbers of a column with gaps floats
    whole = load_labelled_table([rows[0], {"text": "b", "label": 0.0}], Columns(labels=("0", "1")))
    assert whole.train.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="train, row 2: the score 'good' in column 'label' is not a finite number"):
        load_labelled_table([rows[0], {"text": "b", "label": "good"}], Columns(regression=True))
    with pytest.raises(ValueError, match="are names of classes, and regression has scores"):
        Columns(regression=True, labels=("a", "b"))


def test_rows_with_a_label_of_no_class_are_left_out_if_that_is_asked_for() -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "-"}, {"text": "c", "label": "y"}]
    message = r"train, row 2: unknown label '-' .* leave out all rows .*--config.data.drop_labels=\"\('-',\)\""
    with pytest.raises(ValueError, match=message):
        load_labelled_table(rows, Columns(labels=("x", "y")))
    table = load_labelled_table(rows, Columns(dropped=("-",)))
    assert (table.train.texts, table.labels) == (("a", "c"), ("x", "y"))
    with pytest.raises(ValueError, match=r"train: all rows have a label of config.data.drop_labels"):
        load_labelled_table(rows[1:2], Columns(dropped=("-",)))


SHAPES = [
    ({"instruction": " do ", "input": "x", "output": "y"}, "do\n\nx", "y", ()),
    ({"instruction": "do", "input": "", "output": "y"}, "do", "y", ()),
    ({"instruction": "do", "context": "x", "response": "y"}, "do\n\nx", "y", ()),
    ({"instruction": "do", "response": " y\n", "references": ["y"]}, "do", "y", ()),
    ({"prompt": "p", "completion": "c", "id": 7}, "p", "c", ()),
    ({"system": "s", "question": "q", "answer": "a"}, "q", "a", (Turn("system", "s"),)),
    (
        {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
        *("p", "c", ()),
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "p"},
                {"from": "gpt", "value": "c"},
            ]
        },
        *("p", "c", (Turn("system", "s"),)),
    ),
    (
        {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant") * 2
            ]
        },
        *("user", "assistant", (Turn("user", "user"), Turn("assistant", "assistant"))),
    ),
]


@pytest.mark.parametrize(("row", "source", "target", "history"), SHAPES)
def test_shapes_are_recognised(row: dict[str, Any], source: str, target: str, history: tuple[Turn, ...]) -> None:
    train = load_own_pairs([row]).train
    assert (train.sources, train.targets) == ((source,), (target,))
    assert train.histories == ((history,) if history else ())


def test_what_is_found_is_named_with_what_is_not_used() -> None:
    found = load_own_pairs([{"id": 1, "prompt": "p", "completion": "c", "source_url": "u"}])
    assert found.notes == ("text from text: 'prompt' -> 'completion'; not used: 'id', 'source_url'",)
    (note,) = load_own_pairs(CELLS["conversations"].rows).notes
    assert "conversations in 'messages', with loss on what the assistant says" in note
    (note,) = load_own_pairs(CELLS["own columns"].rows, Shape("question", "reply")).notes
    assert note == "text from text: 'question' -> 'reply'; not used: 'source'"


def test_a_response_that_equals_a_reference_but_for_a_space_is_one_example() -> None:
    rows = [{"instruction": "i", "response": "Two. ", "references": ["2", " Two.", "2 "]}]
    assert load_own_pairs(rows).train.targets == ("Two.", "2")
    evaluation = load_own_pairs({"train": rows, "test": [*rows, {"instruction": "i", "references": ["3"]}]})
    assert evaluation.evaluations["test"].references == (("Two.", "2", "3"),)


def test_a_test_set_may_come_without_answers_and_a_training_set_may_not() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    found = load_own_pairs({"train": rows, "test": [{"prompt": "c"}, {"prompt": "d"}]})
    assert not found.evaluations["test"].has_references
    for split in ("train", "test"):
        given = {"train": rows, split: [*rows, {"prompt": "c", "completion": " "}]}
        with pytest.raises(ValueError, match=f"{split}, row 2: there is no answer. Add a text in column 'completion'"):
            load_own_pairs(given)


def said(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"title": "a", "body": "b"}, r"the columns 'title', 'body' are of no shape that is known. Name the columns"),
        ({"prompt": " ", "completion": "b"}, "train, row 1: column 'prompt' is empty"),
        ({"prompt": {"a": 1}, "completion": "b"}, "row 1: column 'prompt' holds a dict, and not text"),
        ({"instruction": "a", "references": "b"}, "row 1: 'references' must be a list of texts, got a str"),
        ({"instruction": "a", "references": ["b", 1]}, "row 1: each of 'references' must be a text .* got 1"),
        ({"messages": "hello"}, "row 1, column 'messages': expected a list of messages, got 'hello'"),
        ({"messages": ["hello"]}, "row 1, column 'messages', message 1: expected an object with role and content"),
        (said("user", "tool", "assistant"), "message 2: the role 'tool' is not known, only system, user, human"),
        (said("assistant", "user"), "row 1: the turns must be .* they are assistant, user"),
        (said("user", "user", "assistant"), "they are user, user, assistant"),
        (said("user", "assistant", "system"), "they are user, assistant, system"),
        (said("user"), "row 1: there is no answer. Add the assistant's last turn"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: its content must be a text .* got None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]},
            "message 1: its content must be a text",
        ),
    ],
)
def test_what_is_wrong_with_a_shape_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_own_pairs([row])


def test_prompts_to_answer_are_texts_or_conversations() -> None:
    assert read_prompt("say", "prompt 1").source == "say"
    asked = read_prompt(said("system", "user", "assistant", "user")["messages"], "prompt 1")
    assert (asked.source, len(asked.history)) == ("x", 3)
    with pytest.raises(ValueError, match="prompt 2: the conversation ends with the assistant's turn"):
        read_prompt(said("user", "assistant")["messages"], "prompt 2")


def test_prompts_that_are_held_out_are_not_trained_on() -> None:
    rows = [{"prompt": f"p {n % 50}", "completion": f"c {n}"} for n in range(200)]
    found = load_own_pairs(rows, extras=Extras(dev_share=0.3), max_train_examples=100)
    assert len(found.train) == 100
    assert not set(found.train.sources) & set(found.evaluations["dev"].sources)
    assert all(len(texts) == 4 for texts in found.evaluations["dev"].references)


def test_texts_have_what_formats_disagree_about() -> None:
    assert all("," in text and '"' in text and not text.isascii() for text in TEXTS)
