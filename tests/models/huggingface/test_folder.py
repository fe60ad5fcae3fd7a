"""Finding Hugging Face folders, here or on the hub: errors that say what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy

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
    pickles = r"has its weights only as {}, a pickle, which can run code .*; convert the model where torch"
    with pytest.raises(FileNotFoundError, match=pickles.format(r"pytorch_model\.bin")):
        load(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(FileNotFoundError, match=pickles.format("pytorch_model-00001-of-00002.bin")):
        load(folder)
    (folder / "pytorch_model-00001-of-00002.bin").rename(folder / "pytorch_model.bin.index.json")  # as from the hub
    with pytest.raises(FileNotFoundError, match=pickles.format("pytorch_model.bin.index.json")):
        load(folder)
    (folder / "pytorch_model.bin.index.json").unlink()
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


class Hub:
    """A folder of the hub: what is asked for appears, by the patterns of huggingface_hub."""

    def __init__(self, content: Path, here: Path) -> None:
        self.content, self.here = content, here

    def __call__(self, name: str, *, allow_patterns: Any, ignore_patterns: Any = None, revision: Any = None) -> str:
        assert name == "someone/tiny-bert"
        assert revision in (None, self.here.name)
        names = [str(path.relative_to(self.content)) for path in self.content.rglob("*") if path.is_file()]
        chosen = huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in chosen:
            (self.here / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.content / file, self.here / file)
        return str(self.here)


@pytest.mark.parametrize("shard", [None, "model-00001-of-00001.safetensors", "shards/weights.safetensors"])
def test_of_the_hub_s_files_those_are_downloaded_that_belong_to_the_model(
    shard: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = shutil.copytree(GOLDENS / "bert_classifier", tmp_path / "hub")
    (content / "tokenizer.model").write_text("")
    others = ["consolidated.safetensors", "onnx/model.safetensors", "onnx/config.json", "flax_model.msgpack"]
    others += [] if shard is None else ["model-00001-of-00002.safetensors"]
    for name in others:
        (content / name).parent.mkdir(exist_ok=True)
        (content / name).write_text("not for us")
    if shard is not None:
        (content / shard).parent.mkdir(exist_ok=True)
        weights = (content / "model.safetensors").rename(content / shard)
        weight_map = dict.fromkeys(safetensors.numpy.load_file(weights), shard)
        (content / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(content, tmp_path / "0a1b"))
    _, params = models.load_pretrained("someone/tiny-bert", num_labels=3, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, load(GOLDENS / "bert_classifier")[1])
    found = {str(path.relative_to(tmp_path / "0a1b")) for path in (tmp_path / "0a1b").rglob("*") if path.is_file()}
    assert found >= {"config.json", "tokenizer.model", shard or "model.safetensors"}
    assert not found & set(others)


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


@pytest.mark.parametrize("name", ["tokenizer.model", "sentencepiece.bpe.model", "spiece.model"])
def test_words_in_a_sentencepiece_model_alone_say_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"pieces")
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match=rf"its words in {name} alone, .*: pip install sentencepiece\."):
        models.load_tokenizer(tmp_path)


def test_a_sentencepiece_model_alone_becomes_a_tokenizer_that_needs_it_no_more(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "words.txt").write_text("the cat sat on the mat\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=20, model_type="bpe"
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = models.load_tokenizer(tmp_path, vocab_size=20)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer("the cat", add_special_tokens=False)["input_ids"] == pieces.encode("the cat")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers makes one of five special tokens, for which every word is unknown."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no words, only .*\[UNK\].*: its vocabulary is not there; copy all"):
        models.load_tokenizer(tmp_path)
