"""Published data, which nobody here shaped, by the readers of one's own: the tokens of the special readers."""

from __future__ import annotations

import csv
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import transformers

from dp_rmt.data import (
    Columns,
    Extras,
    Shape,
    fingerprint,
    load_documents,
    load_glue,
    load_labelled_table,
    load_own_pairs,
    load_table_to_text,
    tokenize_classification,
    tokenize_completions,
    tokenize_documents,
)
from dp_rmt.data.readers.e2e import linearize_meaning

ROWS = 2000
"""As many rows are tokenised; the texts of all are compared."""


@pytest.fixture(scope="module")
def shared() -> Path:
    folder = Path(os.environ.get("DP_RMT_SHARED", ""))
    if not os.environ.get("DP_RMT_SHARED") or not (folder / "data").is_dir():
        pytest.skip("DP_RMT_SHARED does not name a folder that holds data/ and models/")
    return folder


@pytest.fixture(scope="module")
def llama(shared: Path) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(shared / "models" / "stories260K" / "hf")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_sst2_is_a_table(shared: Path, llama: Any) -> None:
    folder = shared / "data" / "sst2"
    special = load_glue("sst2", path=folder)
    table = load_labelled_table(
        folder / "train.tsv",
        Columns(("sentence",), "label", ("0", "1")),
        extras=Extras(dev_path=str(folder / "dev.tsv")),
    )
    for rows, expected in ((table.train, special.train), (table.evaluations["dev"], special.evaluations["dev"])):
        assert rows.texts == expected.texts
        assert rows.labels is not None
        assert (rows.labels == expected.labels).all()
    both = (table.train[:ROWS], special.train[:ROWS])
    tokens = [fingerprint(tokenize_classification(rows, llama, max_length=64)) for rows in both]
    assert tokens[0] == tokens[1]


def test_e2e_is_prompts_and_completions(shared: Path, llama: Any, tmp_path: Path) -> None:
    file = shared / "data" / "e2e" / "trainset.csv"
    special = load_table_to_text("e2e", path=file.parent).train
    own = load_own_pairs(file, Shape("mr", "ref")).train  # as it was published
    assert own.targets == special.targets
    assert tuple(map(linearize_meaning, own.sources)) == special.sources
    with (tmp_path / "train.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = zip(special.sources, special.targets, strict=True)
        csv.writer(stream).writerows([("prompt", "completion"), *rows])
    written = load_own_pairs(tmp_path / "train.csv").train
    assert (written.sources, written.targets) == (special.sources, special.targets)
    tokens = [fingerprint(tokenize_completions(rows[:ROWS], llama, max_length=256)) for rows in (written, special)]
    assert tokens[0] == tokens[1]


def test_customersim_is_documents(shared: Path, llama: Any, tmp_path: Path) -> None:
    """As the archive unpacks, a file for each dialogue; and as JSON Lines."""
    folder = shared / "data" / "customersim"
    special = load_documents("customersim", path=folder, sensitive=())
    few = re.compile(r".*/(train|valid|test)/(canary|dial)-\d{1,2}\.txt")  # 230 files, as 12,000 take a minute
    with tarfile.open(folder / "simdial.tar.gz") as archive:
        chosen = [member for member in archive if few.fullmatch(f"/{member.name}")]
        archive.extractall(tmp_path / "unpacked", chosen, filter="data")
    unpacked = next((tmp_path / "unpacked").rglob("train")).parent
    own = load_documents("documents", path=unpacked, sensitive=())
    found = {"train": own.train, **own.evaluations}
    for split, rows in {"train": special.train, **special.evaluations}.items():
        same = [row for row in rows if few.fullmatch("/" + row.where.split(", ")[1])]
        assert len(same) >= 100
        assert sorted(row.text for row in found[split]) == sorted(row.text for row in same)
    lines = (json.dumps({"text": row.text, "canary": row.is_canary}) + "\n" for row in special.train[-ROWS:])
    (tmp_path / "train.jsonl").write_text("".join(lines))
    written = load_documents("documents", path=tmp_path / "train.jsonl", sensitive=()).train
    tokens = [fingerprint(tokenize_documents(rows, llama, max_length=128)) for rows in (written, special.train[-ROWS:])]
    assert tokens[0] == tokens[1]
