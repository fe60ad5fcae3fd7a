"""E2E, DART and JSONL in their original formats and from the hub, and every way in which a file can be wrong."""

import csv
import io
import json
import os
import pathlib
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_rmt.data import TextPairs, load_table_to_text
from dp_rmt.data.readers import dart as dart_module
from dp_rmt.data.readers.e2e import linearize_meaning

BLUE, EAGLE = "name[Blue Spice], eatType[pub], familyFriendly[no]", "name[The Eagle], priceRange[£20-25]"
BLUE_SOURCE, EAGLE_SOURCE = "name : Blue Spice | Type : pub | family friendly : no", "name : The Eagle | price : £20-25"
E2E_TEXT = f'mr,ref\n"{BLUE}","A pub, Blue Spice."\n"{EAGLE}",The Eagle.\n"{BLUE}",Blue Spice is a pub.\n'
MARS = [["Mars Hill College", "JOINED", "1973"], ["Mars Hill College", "LOCATION", "Mars Hill"]]
WOLVES_SOURCE = "Newberry : nickname : Wolves"
MARS_SOURCE = "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill"
WOLVES = [["Newberry", "NICKNAME", "Wolves"]]
DART = [
    {"tripleset": MARS, "subtree_was_extended": True, "annotations": [{"source": "s", "text": "It joined in 1973."}]},
    {"tripleset": WOLVES, "annotations": [{"text": " The Wolves. "}, {"text": "Newberry's nickname."}]},
    {"tripleset": MARS, "annotations": [{"text": "Joined in 1973."}]},
]


def write_e2e(folder):
    for name in ("trainset", "devset", "testset_w_refs"):
        (folder / f"{name}.csv").write_text(E2E_TEXT, encoding="utf-8")


def dart_xml(entries):
    """The layout of the published files."""
    lines = ["<?xml version='1.0' encoding='utf-8'?>", "<benchmark>", "  <entries>"]
    for number, entry in enumerate(entries, start=1):
        lines += [f'    <entry category="MISC" eid="Id{number}" size="1">', "      <modifiedtripleset>"]
        lines += [f"        <mtriple>{' | '.join(triple)}</mtriple>" for triple in entry["tripleset"]]
        lines += ["      </modifiedtripleset>"]
        lines += [f'      <lex comment="s" lid="Id1">{text["text"]}</lex>' for text in entry["annotations"]]
        lines += ["    </entry>"]
    return "\n".join([*lines, "  </entries>", "</benchmark>"])


def write_dart(folder, splits=("train", "dev", "test")):
    for split in splits:
        (folder / f"dart-v1.1.1-full-{split}.json").write_text(json.dumps(DART, indent=1), encoding="utf-8")


def test_e2e(tmp_path):
    write_e2e(tmp_path)
    data = load_table_to_text("e2e", path=tmp_path)
    texts = ("A pub, Blue Spice.", "The Eagle.", "Blue Spice is a pub.")
    # Each pair is an example, in the order of the file; an evaluation has each meaning once.
    assert data.train == TextPairs((BLUE_SOURCE, EAGLE_SOURCE, BLUE_SOURCE), texts)
    assert list(data.evaluations) == ["dev", "test"]
    test = data.evaluations["test"]
    assert test.sources == (BLUE_SOURCE, EAGLE_SOURCE)
    assert test.references == ((texts[0], texts[2]), (texts[1],))
    assert test.has_references
    assert (len(test.pairs()), test[1:].sources) == (3, (EAGLE_SOURCE,))


def test_e2e_test_set_without_references(tmp_path):
    """Its published file has the header "MR"."""
    write_e2e(tmp_path)
    (tmp_path / "testset_w_refs.csv").unlink()
    (tmp_path / "testset.csv").write_text(f'MR\n"{EAGLE}"\n"{BLUE}"\n')
    test = load_table_to_text("e2e", path=tmp_path).evaluations["test"]
    assert test.sources == (EAGLE_SOURCE, BLUE_SOURCE)
    assert (test.references, test.has_references) == (((), ()), False)
    (tmp_path / "trainset.csv").write_text(f'mr\n"{EAGLE}"\n')
    with pytest.raises(ValueError, match=r"trainset\.csv, line 2: there is no text to train on"):
        load_table_to_text("e2e", path=tmp_path)


values = st.text(st.characters(exclude_characters="[]|", exclude_categories=["C", "Z"]), min_size=1)


@given(st.dictionaries(st.sampled_from(["name", "food", "near", "customer rating"]), values, min_size=1))
def test_linearized_meanings_keep_every_value(attributes):
    meaning = ", ".join(f"{name}[{value}]" for name, value in attributes.items())
    assert dict(part.split(" : ", 1) for part in linearize_meaning(meaning).split(" | ")) == attributes


def test_dart_json_and_xml_are_the_same(tmp_path):
    write_dart(tmp_path)
    data = load_table_to_text("dart", path=tmp_path)
    assert data.train.sources == (MARS_SOURCE, WOLVES_SOURCE, WOLVES_SOURCE, MARS_SOURCE)
    assert data.train.targets == ("It joined in 1973.", "The Wolves.", "Newberry's nickname.", "Joined in 1973.")
    # Entries are test items, as in the official evaluation, although the first and third have the same triples.
    assert data.evaluations["test"].sources == (MARS_SOURCE, WOLVES_SOURCE, MARS_SOURCE)
    (tmp_path / "dart-v1.1.1-full-test.json").unlink()
    (tmp_path / "dart-v1.1.1-full-test.xml").write_text(dart_xml(DART), encoding="utf-8")
    assert load_table_to_text("dart", path=tmp_path).evaluations["test"] == data.evaluations["test"]


def test_dart_without_its_training_file(tmp_path, caplog):
    write_dart(tmp_path, ("dev", "test"))
    with pytest.raises(FileNotFoundError, match=r"train\.json does not exist: .* --config\.data\.train_split=dev"):
        load_table_to_text("dart", path=tmp_path)
    data = load_table_to_text("dart", path=tmp_path, train_split="dev", max_train_examples=3)
    assert (len(data.train), list(data.evaluations), data.train_split) == (3, ["test"], "dev")
    assert "training on the dev split; state it with the results" in caplog.text


def test_arguments(tmp_path):
    write_e2e(tmp_path)
    assert len(load_table_to_text("e2e", path=tmp_path, max_train_examples=2).train) == 2
    with pytest.raises(ValueError, match=r"max_train_examples must be at least 1 .* got 0"):
        load_table_to_text("e2e", path=tmp_path, max_train_examples=0)
    with pytest.raises(ValueError, match="'web': choose one of e2e, dart"):
        load_table_to_text("web", path=tmp_path)
    with pytest.raises(ValueError, match="got 'test'; test is never trained on"):
        load_table_to_text("e2e", path=tmp_path, train_split="test")
    (tmp_path / "devset.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"devset\.csv does not exist: the folder of E2E must hold"):
        load_table_to_text("e2e", path=tmp_path)


def entry(**changes):
    return json.dumps([DART[0], DART[0] | changes])


BAD_FILES = [
    ("e2e", "", r"trainset\.csv is empty \(0 bytes\)"),
    ("e2e", "mr,ref\n", r"trainset\.csv has a header but no rows"),
    ("e2e", "mr,text\na[b],c\n", r"trainset\.csv, line 1: the columns are \['mr', 'text'\], but E2E has 'mr,ref'"),
    ("e2e", "mr,ref\nname[A],x\nname[B],x, y\n", r"line 3: 3 fields .* double quotes\. Correct the file"),
    ("e2e", 'mr,ref\nname[A],"x\ny"\nname[B],\n', r"line 4: the text in column 'ref' is empty"),
    ("e2e", "mr,ref\nname A,x\n", r"line 2: the meaning representation 'name A' is malformed at 'name A'"),
    ("e2e", "mr,ref\nname[A] food[],x\n", r"malformed at 'name\[A\] food"),
    ("e2e", "mr,ref\n,x\n", r"line 2: the meaning representation is empty"),
    ("e2e", 'mr,ref\nname[A],x\nname[B],"x"y"\n', r"line 3: .*expected after"),
    ("e2e", 'mr,ref\nname[A],"x\nname[B],y\n', r"line 2: unexpected end of data"),
    ("dart", '[\n{"tripleset": [],\n]', r"train\.json, line 3, column 1: broken JSON"),
    ("dart", '{"a": 1}', r"train\.json holds a JSON dict, and not a list"),
    ("dart", "[]", "holds no entries"),
    ("dart", '["x"]', r"train\.json, entry 1: expected an object with the list \"tripleset\""),
    ("dart", entry(tripleset="x"), "entry 2: expected an object"),
    ("dart", entry(tripleset=[]), "entry 2: there are no triples"),
    ("dart", entry(tripleset=[["a", "b"]]), r"entry 2: \['a', 'b'\] is not a triple of three texts"),
    ("dart", entry(tripleset=[["a", "b", 3]]), "entry 2: .* is not a triple"),
    ("dart", entry(tripleset=["abc"]), "entry 2: 'abc' is not a triple"),
    ("dart", entry(annotations=None), 'entry 2: expected the list "annotations"'),
    ("dart", entry(annotations=[{"text": 7}]), 'entry 2: every annotation .* "text"'),
    ("dart", entry(annotations=["x"]), 'entry 2: every annotation .* "text"'),
    ("dart", entry(annotations=[{"text": " "}]), "entry 2: there is no text, or only empty ones"),
]


@pytest.mark.parametrize(("task", "text", "message"), BAD_FILES)
def test_malformed_files(task, text, message, tmp_path):
    name = {"e2e": "trainset.csv", "dart": "dart-v1.1.1-full-train.json"}[task]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_table_to_text(task, path=tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("task", ["e2e", "dart"])
def test_not_utf8(task, tmp_path):
    for name in ("trainset.csv", "dart-v1.1.1-full-train.json"):
        (tmp_path / name).write_bytes(b"mr,ref\nname[A],\xff\n")
    with pytest.raises(ValueError, match=r"train.* is not UTF-8 text"):
        load_table_to_text(task, path=tmp_path)


def test_malformed_xml(tmp_path, caplog):
    file = tmp_path / "dart-v1.1.1-full-train.xml"
    file.write_text("<benchmark>\n<entries>\n<entry>\n</entries>\n</benchmark>")
    with pytest.raises(ValueError, match=r"train\.xml, line 4, column \d+: broken XML: mismatched tag"):
        load_table_to_text("dart", path=tmp_path)
    file.write_text(dart_xml(DART).replace("JOINED | 1973", "1973"))
    with pytest.raises(ValueError, match=r"train\.xml, entry 1: \['Mars Hill College', '1973'\] is not a triple"):
        load_table_to_text("dart", path=tmp_path)
    # The published test set has one empty text beside another.
    file.write_text(dart_xml(DART).replace(" The Wolves. ", ""))
    write_dart(tmp_path, ("dev", "test"))
    assert len(load_table_to_text("dart", path=tmp_path).train) == 3
    assert "dropped 1 empty texts" in caplog.text


def fake_hub(monkeypatch, splits):
    def load_dataset(*args, **options):
        calls.append((*args, *options.values()))
        return splits

    calls = []
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_e2e_equals_csv(monkeypatch, tmp_path):
    write_e2e(tmp_path)
    local = load_table_to_text("e2e", path=tmp_path)
    split = {"meaning_representation": [BLUE, EAGLE, BLUE], "human_reference": list(local.train.targets)}
    calls = fake_hub(monkeypatch, {"train": split, "validation": split, "test": split})
    assert load_table_to_text("e2e") == local
    assert calls == [("tuetschek/e2e_nlg", "refs/convert/parquet")]
    split["human_reference"][1] = ""
    with pytest.raises(ValueError, match=r"e2e_nlg, train, row 2: the text .* is empty"):
        load_table_to_text("e2e")


def test_hub_dart_equals_json(monkeypatch, tmp_path):
    """With texts as a list of objects, and as an object of lists."""
    write_dart(tmp_path)
    local = load_table_to_text("dart", path=tmp_path)
    objects = [row["annotations"] for row in DART]
    lists = [{"source": [""] * len(rows), "text": [row["text"] for row in rows]} for rows in objects]
    for annotations in (objects, lists):
        split = {"tripleset": [row["tripleset"] for row in DART], "annotations": annotations}
        fake_hub(monkeypatch, {"train": split, "validation": split, "test": split})
        assert load_table_to_text("dart") == local


def test_hub_by_the_real_library(monkeypatch, tmp_path):
    """A folder in place of the hub's data set, read by `datasets` itself."""
    pytest.importorskip("datasets")
    (tmp_path / "json").mkdir()
    (tmp_path / "hub").mkdir()
    write_dart(tmp_path / "json")
    rows = [{"tripleset": r["tripleset"], "annotations": [{"text": a["text"]} for a in r["annotations"]]} for r in DART]
    for split in ("train", "validation", "test"):
        (tmp_path / "hub" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(dart_module, "HUB_DATASET", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert load_table_to_text("dart") == load_table_to_text("dart", path=tmp_path / "json")
    monkeypatch.setattr(dart_module, "HUB_DATASET", str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match=r"Could not load .*nowhere.* download its JSON files"):
        load_table_to_text("dart")


def shared_folder(name):
    shared = os.environ.get("DP_RMT_SHARED")
    folder = pathlib.Path(shared or "") / "data" / name
    if not shared or not folder.is_dir():
        pytest.skip(f"DP_RMT_SHARED does not name a folder that holds data/{name}")
    return folder


def test_the_real_e2e():
    data = load_table_to_text("e2e", path=shared_folder("e2e"))
    assert len(data.train) == 42_061
    assert {name: (len(rows), len(rows.pairs())) for name, rows in data.evaluations.items()} == {
        "dev": (547, 4_672),
        "test": (630, 4_693),
    }
    assert data.train.sources[0].startswith("name : The Vaults | Type : pub | price : more than £30 | ")


def test_the_real_dart():
    data = load_table_to_text("dart", path=shared_folder("dart"), train_split="dev")
    assert len(data.train) == 6_980
    assert len(data.evaluations["test"]) == 5_097
    assert len(data.evaluations["test"].pairs()) == 12_551  # and one empty text
    assert data.train.targets[1] == "Newberry College's nickname is the wolves."


def test_half_of_a_surrogate_pair_is_named_by_its_entry(tmp_path):
    file = tmp_path / "dart-v1.1.1-full-train.json"
    file.write_text(entry(annotations=[{"text": "a \ud83d b"}]))
    with pytest.raises(
        ValueError, match=r"train\.json, entry 2: .* half of a surrogate pair \(\\ud83d\) at character 2"
    ):
        load_table_to_text("dart", path=tmp_path)
    file.unlink()
    xml = tmp_path / "dart-v1.1.1-full-train.xml"
    xml.write_text(dart_xml(DART).replace("1973", "&#xD83D;", 1))
    with pytest.raises(
        ValueError, match=r"train\.xml, line \d+, column \d+: broken XML: reference to invalid character"
    ):
        load_table_to_text("dart", path=tmp_path)


def test_xml_whose_declaration_disagrees_with_its_bytes(tmp_path):
    write_dart(tmp_path, ("dev", "test"))
    file = tmp_path / "dart-v1.1.1-full-train.xml"
    plain = dart_xml(DART).partition("?>")[2] if dart_xml(DART).startswith("<?xml") else dart_xml(DART)
    for declared in ("ISO-8859-1", "utf-16"):
        said = f'<?xml version="1.0" encoding="{declared}"?>\n'
        file.write_text(said + plain.replace("1973", "1973 é"), encoding="utf-8")
        message = (
            rf'train\.xml, line 1: the declaration says encoding="{declared}", but the bytes of the file are UTF-8'
        )
        with pytest.raises(ValueError, match=message):
            load_table_to_text("dart", path=tmp_path)
    file.write_text('<?xml version="1.0" encoding="utf-8"?>' + plain.replace("1973", "1973 é"), encoding="utf-8")
    assert any("1973 é" in source for source in load_table_to_text("dart", path=tmp_path).train.sources)
    file.write_text('<?xml version="1.0" encoding="us-ascii"?>' + plain, encoding="utf-8")
    assert len(load_table_to_text("dart", path=tmp_path).train) > 0


def test_the_cleaned_e2e_has_further_columns_and_files_may_end_with_blank_lines(tmp_path):
    write_e2e(tmp_path)
    expected = load_table_to_text("e2e", path=tmp_path)
    for file in sorted(tmp_path.glob("*.csv")):
        header, *rows = csv.reader(io.StringIO(file.read_text(encoding="utf-8"), newline=""))
        cleaned = [[*header, "fixed", "orig_mr"], *([*row, "0", "name[X]"] for row in rows)]
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(cleaned)
            stream.write("\n\r\n")
    found = load_table_to_text("e2e", path=tmp_path)
    assert found == expected
