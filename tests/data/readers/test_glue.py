"""Every task's TSV layout, the hub's layout, and every way in which a file can be wrong."""

import os
import pathlib
import sys
import types

import numpy as np
import pytest

from dp_rmt.data import GLUE_TASKS, get_task, glue_scores, load_glue, read_tsv

# Headers as in the published files, one row per class, and the hub's column names and class numbers.
MNLI_META = "index promptID pairID genre"
MNLI_PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
LAYOUTS = {
    "sst2": ("sentence label", [("a fine film ", "1"), ("bad", "0")], [1, 0]),
    "qnli": (
        "index question sentence label",
        [("0", "who ?", "he", "entailment"), ("1", "why ?", "no", "not_entailment")],
        [0, 1],
    ),
    "qqp": (
        "id qid1 qid2 question1 question2 is_duplicate",
        [("0", "1", "2", "who ?", "he ?", "1"), ("1", "3", "4", "why ?", "no ?", "0")],
        [1, 0],
    ),
    "mnli": (
        f"{MNLI_META} {MNLI_PARSES} sentence1 sentence2 label1 gold_label",
        [(*"01234567", "a", "b", "neutral", name) for name in ("contradiction", "entailment", "neutral")],
        [2, 0, 1],
    ),
    "rte": (
        "index sentence1 sentence2 label",
        [("0", "a", "b", "not_entailment"), ("1", "c", "d", "entailment")],
        [1, 0],
    ),
    "mrpc": (
        "Quality|#1 ID|#2 ID|#1 String|#2 String",
        [("1", "10", "11", "a", "b"), ("0", "12", "13", "c", "d")],
        [1, 0],
    ),
    "cola": (None, [("gj04", "1", "", "We sat."), ("gj04", "0", "*", "Sat we the.")], [1, 0]),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        [(*"0123456", "a", "b", "3.8"), (*"0123456", "c", "d", "5.000")],
        [3.8, 5.0],
    ),
}


def tsv_text(task):
    header, rows, _ = LAYOUTS[task]
    names = [] if header is None else [header.split("|") if "|" in header else header.split()]
    return "".join("\t".join(fields) + "\n" for fields in [*names, *rows])


def write_folder(folder, task):
    for name in ("train", *get_task(task).evaluation_names):
        (folder / f"{name}.tsv").write_text(tsv_text(task), encoding="utf-8")


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_reads_every_task(task, tmp_path):
    write_folder(tmp_path, task)
    data = load_glue(task, path=tmp_path)
    spec, (_, rows, labels) = data.task, LAYOUTS[task]
    assert set(data.evaluations) == ({"dev_matched", "dev_mismatched"} if task == "mnli" else {"dev"})
    for part in (data.train, *data.evaluations.values()):
        assert len(part) == len(rows)
        assert (part.text_pairs is None) == (task in ("sst2", "cola"))
        assert part.labels.dtype == (np.float32 if task == "stsb" else np.int32)
        np.testing.assert_array_equal(part.labels, np.asarray(labels, part.labels.dtype))
    expected = {
        "sst2": ("a fine film", None),
        "qnli": ("who ?", "he"),
        "qqp": ("who ?", "he ?"),
        "mnli": ("a", "b"),
        "rte": ("a", "b"),
        "mrpc": ("a", "b"),
        "cola": ("We sat.", None),
        "stsb": ("a", "b"),
    }
    pairs = data.train.text_pairs
    assert (data.train.texts[0], None if pairs is None else pairs[0]) == expected[task]
    assert spec.num_labels == {"mnli": 3, "stsb": 1}.get(task, 2)


@pytest.mark.parametrize("task", GLUE_TASKS.values(), ids=GLUE_TASKS)
def test_table_is_consistent(task):
    assert len(task.tsv_labels) == len(task.label_names)
    assert len(task.hub_text_columns) == len(task.text_columns)
    assert (task.infilling is None) == task.is_regression
    if task.infilling is not None:
        assert len(task.infilling.label_words) == task.num_labels
        wanted = ["<S>"] if len(task.text_columns) == 1 else ["<S1>", "<S2>"]
        assert all(task.infilling.template.count(name) == 1 for name in [*wanted, "<mask>"])
    assert set(glue_scores(task.metrics, np.array([0, 1]), np.array([0, 1])).values()) == {1.0}


def test_label_words_belong_to_their_classes():
    """A swapped pair of words would still train, and would be below chance before training."""
    words = {
        name: dict(zip(task.label_names, task.infilling.label_words, strict=True))
        for name, task in GLUE_TASKS.items()
        if task.infilling
    }
    assert words["sst2"] == {"negative": "terrible", "positive": "great"}
    assert words["mnli"] == {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}
    assert words["qnli"] == words["rte"] == {"entailment": "Yes", "not_entailment": "No"}
    assert words["qqp"] == {"not_duplicate": "No", "duplicate": "Yes"}
    assert words["mrpc"] == {"not_equivalent": "No", "equivalent": "Yes"}
    assert words["cola"] == {"unacceptable": "incorrect", "acceptable": "correct"}


def test_details_of_tsv_files(tmp_path):
    """Quotes are text, a byte-order mark and CRLF are not; a lone carriage return does not end a row."""
    file = tmp_path / "train.tsv"
    file.write_bytes('\ufeffsentence\tlabel\r\n"half a quote\t1\r\na\rb é\t0'.encode())
    examples = read_tsv(get_task("sst2"), file)
    assert examples.texts == ('"half a quote', "a\rb é")
    assert examples.labels.tolist() == [1, 0]


def test_max_train_examples_keeps_the_evaluations_whole(tmp_path):
    write_folder(tmp_path, "mnli")
    data = load_glue("mnli", path=tmp_path, max_train_examples=2)
    assert (len(data.train), len(data.train.text_pairs), data.train.labels.tolist()) == (2, 2, [2, 0])
    assert len(data.evaluations["dev_mismatched"]) == 3
    with pytest.raises(ValueError, match=r"max_train_examples must be at least 1 .* got 0"):
        load_glue("mnli", path=tmp_path, max_train_examples=0)


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("sst2", "", r"train\.tsv is empty \(0 bytes\)"),
        ("sst2", "sentence\tlabel\n", r"train\.tsv has a header but no examples"),
        ("sst2", "sentence\tlbl\nx\t1\n", r"line 1: no column 'label' in .* needs 'sentence', 'label'"),
        ("sst2", "sentence\tlabel\nx\t1\na\tb\t1\n", r"line 3: 3 tab-separated .* has 2 \(sentence, label\)"),
        ("sst2", "sentence\tlabel\nx\t1\ny\n", r"train\.tsv, line 3: 1 tab-separated fields"),
        ("sst2", "sentence\tlabel\nx\tpositive\n", r"line 2: unknown label 'positive' .* has '0', '1'"),
        ("sst2", "sentence\tlabel\nx\t-1\n", r"line 2: unknown label '-1'"),
        ("sst2", "sentence\tlabel\n \t1\n", r"train\.tsv, line 2: the text .* 'sentence' is empty"),
        ("rte", tsv_text("rte").replace("\tb\t", "\t\t"), r"line 2: .* column 'sentence2' is empty"),
        ("cola", "gj04\t1\tWe sat.\n", r"train\.tsv, line 1: 3 tab-separated fields .* has 4"),
        ("stsb", tsv_text("stsb").replace("5.000", "five"), r"line 3: the score 'five' .* not a finite"),
        ("stsb", tsv_text("stsb").replace("5.000", "nan"), r"line 3: the score 'nan'"),
    ],
)
def test_malformed_files(task, text, message, tmp_path):
    (tmp_path / "train.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_glue(task, path=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_not_utf8(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\nx\xff\t1\n")
    with pytest.raises(ValueError, match=r"train\.tsv is not UTF-8"):
        load_glue("sst2", path=tmp_path)


def test_missing_files_and_tasks(tmp_path):
    write_folder(tmp_path, "mnli")
    (tmp_path / "dev_mismatched.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev_mismatched\.tsv does not exist.* --config\.data\.path"):
        load_glue("mnli", path=tmp_path)
    with pytest.raises(ValueError, match="Unknown GLUE task 'sst-2': choose one of sst2, qnli"):
        load_glue("sst-2", path=tmp_path)


def test_qqp_drops_a_few_malformed_rows_but_not_many(tmp_path):
    """The published QQP has a few broken lines."""
    write_folder(tmp_path, "qqp")
    with (tmp_path / "train.tsv").open("a") as stream:
        stream.write("half a question\n")
    assert len(load_glue("qqp", path=tmp_path).train) == 2
    with (tmp_path / "train.tsv").open("a") as stream:
        stream.write("half a question\n")
    with pytest.raises(ValueError, match=r"2 of 4 rows are malformed"):
        load_glue("qqp", path=tmp_path)


def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_hub_equals_tsv(monkeypatch, tmp_path):
    write_folder(tmp_path, "mnli")
    split = {"premise": ["a", "a ", "a"], "hypothesis": ["b", "b", "b"], "label": [2, 0, 1], "idx": [0, 1, 2]}
    calls = []

    def load_dataset(*args):
        calls.append(args)
        return {"train": split, "validation_matched": split, "validation_mismatched": split}

    fake_hub(monkeypatch, load_dataset)
    hub, local = load_glue("mnli"), load_glue("mnli", path=tmp_path)
    assert calls == [("nyu-mll/glue", "mnli")]
    assert hub.train.texts == local.train.texts
    assert hub.train.text_pairs == local.train.text_pairs
    assert set(hub.evaluations) == set(local.evaluations)
    np.testing.assert_array_equal(hub.train.labels, local.train.labels)


def test_hub_errors_say_what_to_do(monkeypatch):
    def load_dataset(*_):
        raise ConnectionError("no route to the hub")

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(RuntimeError, match=r"'nyu-mll/glue' \('sst2'\).* no route .*--config\.data\.path"):
        load_glue("sst2")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"pip install 'dp_rmt\[finetune\]'.*--config\.data\.path"):
        load_glue("sst2")


def test_the_real_sst2():
    shared = os.environ.get("DP_RMT_SHARED")
    folder = pathlib.Path(shared or "") / "data" / "sst2"
    if not shared or not folder.is_dir():
        pytest.skip("DP_RMT_SHARED does not name a folder that holds data/sst2")
    data = load_glue("sst2", path=folder)
    assert (len(data.train), len(data.evaluations["dev"])) == (67_349, 872)
    assert data.train.texts[0] == "hide new secretions from the parental units"
    assert int(data.train.labels.sum()) == 37_569
    assert int(data.evaluations["dev"].labels.sum()) == 444
    with pytest.raises(ValueError, match=r"test\.tsv, line 1: no column 'label'"):
        read_tsv(data.task, folder / "test.tsv")


def test_blank_lines_at_the_end_and_labels_to_drop(tmp_path):
    header = "sentence1\tsentence2\tgold_label\n"
    for name in ("train", "dev_matched", "dev_mismatched"):
        (tmp_path / f"{name}.tsv").write_text(header + "a\tb\tneutral\nc\td\t-\ne\tf\tentailment\n\n\r\n")
    with pytest.raises(
        ValueError, match=r"train\.tsv, line 3: unknown label '-' .*--config.data.drop_labels=\"\('-',\)\""
    ):
        load_glue("mnli", path=tmp_path)
    found = load_glue("mnli", path=tmp_path, dropped=("-",))
    for rows in (found.train, *found.evaluations.values()):
        assert rows.texts == ("a", "e")
        assert rows.labels.tolist() == [1, 0]
