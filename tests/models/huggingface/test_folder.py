"""Finding Hugging Face folders, here or on the hub: errors that say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest

from dp_rmt import models

GOLDENS = Path(__file__).parents[1] / "goldens"


def load(folder: Path, **options: Any) -> Any:
    return models.load_pretrained(folder, **{"num_labels": 3, **options}, key=jax.random.key(0))


def test_bad_folders_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*; give an existing model folder or a hub name"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; give a model folder"):
        load(tmp_path)
    folder = shutil.copytree(GOLDENS / "bert_classifier", tmp_path / "model")
    with pytest.raises(NotADirectoryError, match="is a file; give the folder"):
        load(folder / "config.json")
    (folder / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file .* download it again"):
        load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has only pytorch_model\.bin, .*; convert it where torch"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; download"):
        load(folder)
    shutil.copy(GOLDENS / "bert_classifier" / "model.safetensors", folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"config\.json: the Hugging Face config lacks vocab_size, hidden_size"):
        load(folder)


def test_bad_arguments_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head 'regression' is not known; choose one of classification, masked_lm"):
        load(tmp_path, head="regression")
    with pytest.raises(ValueError, match="num_labels is 0; a classifier needs 1"):
        load(tmp_path, num_labels=0)


def test_hub_names_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **patterns: Any) -> str:
        asked.append((name, patterns))
        return str(GOLDENS / "bert_classifier")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, params = models.load_pretrained("someone/tiny-bert", num_labels=3, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, load(GOLDENS / "bert_classifier")[1])
    [(name, patterns)] = asked
    assert name == "someone/tiny-bert"
    assert patterns["allow_patterns"] == ["*.json", "*.safetensors", "*.txt", "*.model"]


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **patterns: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = r"no folder 'runs/model' here, .* \(ConnectionError: no route\)\. Check the name; .* without network"
    with pytest.raises(FileNotFoundError, match=message):
        models.load_pretrained("runs/model", key=jax.random.key(0))


def test_a_tokenizer_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    """transformers opens the newest of these names that it knows the version of, wherever it leads."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    for name in ("../tokenizer.4.0.json", str(tmp_path / "tokenizer.4.0.json")):
        (folder / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": ["tokenizer.json", name]}))
        with pytest.raises(ValueError, match=r"tokenizer_config\.json names the file .* no file of its folder"):
            models.load_tokenizer(folder)


def test_a_tokenizer_of_foreign_code_is_refused_without_a_question(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "foreign.py").write_text("raise SystemExit('it ran')")
    config = {"auto_map": {"AutoTokenizer": ["foreign.Tokenizer", None]}, "tokenizer_class": "Foreign"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"trust_remote_code|could not read the tokenizer files"):
        models.load_tokenizer(tmp_path)


def test_tokenizer_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer files \(tokenizer\.json, .*; copy them from"):
        models.load_tokenizer(GOLDENS / "bert_classifier")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"transformers could not read the tokenizer files in .*; copy a complete set"):
        models.load_tokenizer(tmp_path)
