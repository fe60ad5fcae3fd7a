"""hub:NAME by `datasets` itself, without a network: a folder in the hub's layout, and its cache on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest

from dp_rmt.data import Columns, load_labelled_table, read_tables

CARD = """---
configs:
- config_name: de
  default: true
  data_files:
  - {split: train, path: de/train.jsonl}
  - {split: validation, path: de/more.jsonl}
- config_name: en
  data_files:
  - {split: train, path: en/train.jsonl}
dataset_info:
- config_name: de
  features:
  - {name: text, dtype: string}
  - name: label
    dtype: {class_label: {names: {"0": bad, "1": good}}}
- config_name: en
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: string}
---
"""
ROWS = {
    "de/train": [{"text": "fein", "label": 1}, {"text": "öde", "label": 0}],
    "de/more": [{"text": "gut", "label": 1}, {"text": "fad", "label": -1}],
    "en/train": [{"text": "fine", "label": "good"}],
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set with two configurations, as a folder of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "reviews"
    for name, rows in ROWS.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(CARD)
    return folder


def test_splits_classes_and_configurations(repository: Path) -> None:
    tables = read_tables(f"hub:{repository}")
    assert {split: [row.fields["text"] for row in table.rows] for split, table in tables.items()} == {
        "train": ["fein", "öde"],
        "dev": ["gut", "fad"],
    }
    assert [row.fields["label"] for row in tables["train"].rows] == ["good", "bad"]
    assert [row.fields["label"] for row in tables["dev"].rows] == ["good", None]
    assert tables["dev"].rows[1].where == f"{repository}, validation, row 2"
    (table,) = read_tables(f"hub:{repository}:en").values()
    assert [row.fields for row in table.rows] == ROWS["en/train"]


def test_a_row_without_a_label_is_named(repository: Path) -> None:
    with pytest.raises(ValueError, match=r"reviews, validation, row 2: column 'label' is empty"):
        load_labelled_table(f"hub:{repository}", Columns())


def test_the_cache_of_an_earlier_download_is_read_without_a_network(repository: Path, tmp_path: Path) -> None:
    datasets.load_dataset(str(repository))
    (cached,) = (tmp_path / "cache" / "reviews").iterdir()
    shutil.move(cached, tmp_path / "cache" / "someone___reviews" / "de")  # where a data set of the hub lies
    rows = read_tables("hub:someone/reviews")["train"].rows
    assert [row.fields for row in rows] == [{"text": "fein", "label": "good"}, {"text": "öde", "label": "bad"}]
    assert rows[0].where == "someone/reviews, train, row 1"


def test_a_data_set_that_cannot_be_had_says_what_to_do(repository: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Could not load 'someone/nothing' .* download its files yourself and give"):
        read_tables("hub:someone/nothing")
    with pytest.raises(RuntimeError, match=rf"Could not load '{repository}' \('fr'\) .*'de', 'en'"):
        read_tables(f"hub:{repository}:fr")
