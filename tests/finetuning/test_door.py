"""`dp_rmt.finetune`: a file of labelled text in, a model that predicts, its scores and its statement out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import dp_rmt
from dp_rmt.data import generate_reviews
from dp_rmt.finetuning.door import load_finetuned
from dp_rmt.finetuning.shorthand import settings_from
from dp_rmt.models import load_pretrained

SMALL: dict[str, Any] = {
    "num_steps": 3,
    "max_length": 24,
    "length_groups": (),
    "expected_batch_size": 24,
    "microbatch_size": 8,
    "labels": ("bad", "good"),
    "trainable": "^(?!encoder/embeddings)",
    "accountant": "rdp",
    "delta": 1e-3,
    "denoise": (),
}


def write_reviews(folder: Path) -> Path:
    folder.mkdir()
    for split, count, seed in (("train", 120, 1), ("dev", 30, 2)):
        rows = generate_reviews(count, seed, domain="private")
        lines = (f'"{text}",{("bad", "good")[label]}\n' for text, label in rows)
        (folder / f"{split}.csv").write_text("text,label\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews") / "csv")


@pytest.fixture(scope="module")
def call(reviews: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("door")
    return {
        "model": str(model),
        "train": reviews,
        "epsilon": 4.0,
        "workdir": folder / "run",
        "cache_dir": str(folder / "cache"),
        **SMALL,
    }


@pytest.fixture(scope="module")
def finetuned(call: dict[str, Any]) -> dp_rmt.Finetuned:
    return dp_rmt.finetune(**call)


@pytest.mark.thorough
def test_the_run_is_private_scored_and_has_its_report(finetuned: dp_rmt.Finetuned) -> None:
    assert finetuned.privacy["is_private"]
    assert finetuned.privacy["epsilon"] == pytest.approx(4.0, rel=1e-3)
    assert finetuned.privacy["epsilon"] <= 4.0
    assert finetuned.privacy["num_examples"] == 120
    assert set(finetuned.scores) == {"dev/accuracy", "dev/loss"}
    names = {path.name for path in finetuned.workdir.iterdir()}
    assert {"config.json", "metrics.jsonl", "privacy.json", "privacy.md", "report.html", "model"} <= names


@pytest.mark.thorough
def test_it_predicts_what_it_was_scored_by(finetuned: dp_rmt.Finetuned, reviews: Path) -> None:
    rows = [line.rsplit(",", 1) for line in (reviews / "dev.csv").read_text().splitlines()[1:]]
    texts, labels = [text.strip('"') for text, _ in rows], [label for _, label in rows]
    predicted = finetuned.predict(texts)
    assert np.mean([a == b for a, b in zip(predicted, labels, strict=True)]) == finetuned.scores["dev/accuracy"]
    assert finetuned.predict_rows([[text] for text in texts]) == predicted
    with pytest.raises(ValueError, match="row 2 has 2 texts and not 1"):
        finetuned.predict_rows([["a"], ["b", "c"]])
    logits = finetuned.logits(texts)
    assert logits.shape == (30, 2)
    assert predicted == [("bad", "good")[number] for number in logits.argmax(axis=1)]
    diverged = dataclasses.replace(finetuned, params=jax.tree.map(lambda leaf: leaf * np.nan, finetuned.params))
    with pytest.raises(ValueError, match=rf"the logits of {len(texts)} of {len(texts)} texts are NaN, the first at"):
        diverged.predict(texts)
    with pytest.raises(ValueError, match="'classification' writes no text; use predict"):
        finetuned.generate(["a"])


@pytest.mark.thorough
def test_what_is_saved_is_the_model_and_its_statement_and_no_secret(
    finetuned: dp_rmt.Finetuned, tmp_path: Path
) -> None:
    finetuned.save(tmp_path / "released")
    names = {path.name for path in (tmp_path / "released").iterdir()}
    assert {"config.json", "model.safetensors", "privacy.json", "privacy.md"} <= names
    assert not names & {"checkpoints", "ledger.jsonl", "metrics.jsonl"}
    assert finetuned.privacy["about"]["command"]
    for path in (tmp_path / "released").iterdir():
        for trace in (finetuned.workdir, finetuned.settings.model.path, finetuned.settings.data.path):
            assert str(trace).encode() not in path.read_bytes(), path
    assert '"command": null' in (tmp_path / "released" / "privacy.json").read_text()
    _, params = load_pretrained(tmp_path / "released", head="classification", num_labels=2, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, dict(finetuned.params))
    with pytest.raises(FileExistsError):
        finetuned.save(tmp_path / "released")


@pytest.mark.slow
def test_the_same_call_and_the_folder_give_the_same_again(finetuned: dp_rmt.Finetuned, call: dict[str, Any]) -> None:
    for again in (dp_rmt.finetune(**call), load_finetuned(call["workdir"])):
        jax.tree.map(np.testing.assert_array_equal, again.params, finetuned.params)
        assert again.scores == finetuned.scores
        assert again.privacy == finetuned.privacy
    with pytest.raises(ValueError, match=r"holds another experiment; .*\n  train.num_steps: there 3, now 4"):
        dp_rmt.finetune(**{**call, "num_steps": 4})
    with pytest.raises(ValueError, match="has the arms base: name one"):
        load_finetuned(call["workdir"], "noisy")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": "reviews.csv"}, FileNotFoundError, "train='reviews.csv': there is no such file or folder"),
        ({"num_step": 3}, ValueError, "config.num_step: there is no such key"),
        ({"path": "x"}, ValueError, "path: which of data.path, model.path is meant"),
        ({"arms": {"a": {}, "b": {}}}, ValueError, "call once for each arm"),
        ({"epsilon": 0.0}, ValueError, "config.privacy.epsilon must be above 0, got 0.0"),
        ({"labels": ("bad", "fair")}, ValueError, "train.csv, line 2: unknown label|line 3: unknown label"),
    ],
)
def test_mistakes_are_named(
    changes: dict[str, Any], error: type[Exception], message: str, call: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        dp_rmt.finetune(**{**call, "workdir": tmp_path / "run", **changes})
    assert not (tmp_path / "run").exists()


def test_a_few_words_become_settings(tmp_path: Path) -> None:
    settings = settings_from("m", "sst2", 3)
    assert (settings.model.path, settings.data.task, settings.privacy.epsilon) == ("m", "sst2", 3.0)
    assert (settings.train.epochs, settings.train.num_steps) == (None, None)  # which is 3 epochs
    assert settings_from("m", "sst2", 3, {"epochs": 1}).train.epochs == 1.0
    assert settings_from("m", "e2e", math.inf).model.head == "causal_lm"
    own = settings_from("m", tmp_path, 3, {"data": {"task": "dart"}, "lora": {"rank": 4}, "tuning": "lora"})
    assert (own.data.task, own.data.path, own.model.head) == ("dart", str(tmp_path), "causal_lm")
    assert (own.model.tuning, own.model.lora.rank) == ("lora", 4)
