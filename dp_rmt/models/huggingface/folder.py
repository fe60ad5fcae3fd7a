"""Finds a Hugging Face folder, on this machine or on the hub, and reads the small files in it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from dp_rmt.extras import extra
from dp_rmt.files import files_digest

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_TORCH_WEIGHTS_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin", "model.pt", "*.pth")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
_SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", TOKENIZER_CONFIG, *_SENTENCEPIECE_FILES)


def resolve_folder(folder_or_hub_name: str | os.PathLike[str]) -> Path:
    """Returns a local folder as it is, and downloads anything else from the Hugging Face hub.

    Args:
        folder_or_hub_name: a path, or a hub name such as "roberta-base" or "org/name".

    Returns:
        The local folder.

    Raises:
        FileNotFoundError: there is no such folder, and the hub has no such model or cannot be reached.
        NotADirectoryError: the path is a file.
    """
    name, path = os.fspath(folder_or_hub_name), Path(folder_or_hub_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if isinstance(folder_or_hub_name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no folder {path}; give an existing model folder or a hub name like 'roberta-base'")
    # The small files first, since they say which weights belong to the model: other copies of these, such as
    # consolidated.safetensors, lie in the same folder of the hub.
    folder = _download(name, allow_patterns=list(_SMALL_FILES), ignore_patterns=["*/*"])
    weights = _shards(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else [WEIGHTS_FILE]
    return _download(name, allow_patterns=weights, revision=folder.name)


def _download(name: str, **which: Any) -> Path:
    with extra("finetune"):
        import huggingface_hub  # here, not above: it takes a second to import and local folders do not need it

    try:
        return Path(huggingface_hub.snapshot_download(name, **which))
    except Exception as error:  # the hub client raises many unrelated types: HTTP, validation, offline, cache
        raise FileNotFoundError(
            f"there is no folder {name!r} here, and downloading it from the Hugging Face hub failed "
            f"({type(error).__name__}: {error}). Check the name; for a gated model log in with "
            "`hf auth login`; without network give the path of a folder downloaded before"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the folder's `config.json`, once it is clear that the weights beside it can be read, too.

    Args:
        folder: a local model folder.

    Returns:
        The parsed JSON object.

    Raises:
        FileNotFoundError: `config.json` or the weights are absent.
        ValueError: `config.json` is not a JSON object.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}; give a model folder in Hugging Face layout")
    weight_files(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not valid JSON ({error}); download the file again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_FILE} is not a JSON object; download the file again")
    return config


def weight_files(folder: Path) -> tuple[Path, list[Path]]:
    """Lists the safetensors files of a model folder.

    Args:
        folder: a local model folder.

    Returns:
        The path of `model.safetensors` or of the index of its shards, and all files that hold tensors.

    Raises:
        FileNotFoundError: there are none, or a shard is absent.
        ValueError: the index is not one, or names a shard outside the folder.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return single, [single]
    if not index.is_file():
        pickles = [path.name for pattern in _TORCH_WEIGHTS_FILES for path in sorted(folder.glob(pattern))]
        if pickles:
            raise FileNotFoundError(
                f"{folder} has its weights only as {pickles[0]}, a pickle, which can run code and is not read here; "
                "convert the model where torch is installed, with the class that config.json names in architectures: "
                "transformers.AutoModelForCausalLM (or ...ForMaskedLM, ...ForSequenceClassification)"
                ".from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_FILE}; download the model's safetensors files, and {INDEX_FILE} if there "
            "are several"
        )
    names = _shards(index)
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names the shard {name}, which is not there; download the model again")
    return index, [folder / name for name in names]


def _shards(index: Path) -> list[str]:
    """The names of the files in an index of shards; ValueError if it is not one, or a name leads out of its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()), key=str)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{index} is not an index of shards ({type(error).__name__}: {error}); download it again"
        ) from error
    for name in names:
        _check_is_inside(name, index)
    return names


def content_digest(folder: Path) -> str:
    """The SHA-256 of a model's `config.json` and weights, by which a copy of the folder is known to be the same.

    Args:
        folder: a local model folder.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError, ValueError: as `weight_files`.
    """
    index, shards = weight_files(folder)
    return files_digest(sorted({folder / CONFIG_FILE, index, *shards}))


def _check_is_inside(name: Any, named_in: Path) -> None:
    """Raises ValueError unless a name that stands in a file leads to a file below that file's folder.

    Names are judged by their letters, since the hub's cache links to files of its own.
    """
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or ":" in part or "\0" in part for part in parts):
        raise ValueError(
            f"{named_in} names the file {name!r}, which is no file of its folder; files lie beside the one that names "
            "them, so that a folder from elsewhere opens no other file of this machine. Download the model again, from "
            "a source you trust"
        )


def load_tokenizer(folder_or_hub_name: str | os.PathLike[str], *, vocab_size: int | None = None) -> Any:
    """Loads the tokenizer of a model folder by `transformers.AutoTokenizer`, which needs no torch.

    Args:
        folder_or_hub_name: a local folder, or a hub name.
        vocab_size: rows of the model's word embedding, which the tokenizer's ids must fit.

    Returns:
        A transformers tokenizer.

    Raises:
        FileNotFoundError: there is no such folder, or it has no tokenizer files.
        ModuleNotFoundError: the words are in a SentencePiece model alone, and sentencepiece is not installed.
        ValueError: transformers cannot read the files, or the tokenizer has no words, or more than the model.
    """
    folder = resolve_folder(folder_or_hub_name)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} has no tokenizer files ({', '.join(_TOKENIZER_FILES)}); copy them from the model that "
            "this one was trained from, or save with save_pretrained(..., tokenizer=tokenizer)"
        )
    _check_tokenizer_config(folder / TOKENIZER_CONFIG)
    _check_sentencepiece(folder)
    with extra("finetune"):
        import transformers  # here, not above: it takes seconds to import and models do not need it

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types for broken files
        raise ValueError(
            f"transformers could not read the tokenizer files in {folder} ({type(error).__name__}: {error}); "
            "copy a complete set from the model's own folder"
        ) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of absent files
        raise ValueError(
            f"the tokenizer in {folder} has no words, only {', '.join(tokenizer.get_vocab())}: its vocabulary is not "
            "there; copy all tokenizer files from the model's own folder"
        )
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has the token {token!r} with id {largest}, but the model's word embedding has "
            f"{vocab_size} rows; use the tokenizer of the model's own folder"
        )
    return tokenizer


def _check_sentencepiece(folder: Path) -> None:
    """Raises ModuleNotFoundError if transformers would need a package for the one file that has the words."""
    alone = [name for name in _SENTENCEPIECE_FILES if (folder / name).is_file()]
    if (folder / "tokenizer.json").is_file() or not alone or importlib.util.find_spec("sentencepiece") is not None:
        return
    raise ModuleNotFoundError(
        f"{folder} has its words in {alone[0]} alone, without tokenizer.json, and the package that reads it is not "
        "installed: pip install sentencepiece. The model that is saved has a tokenizer.json, and needs it no more"
    )


def _check_tokenizer_config(path: Path) -> None:
    """Raises ValueError if the list of files that transformers opens by name leads out of the folder."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # the file is absent or broken, and transformers will say so
    names = config.get("fast_tokenizer_files") if isinstance(config, dict) else None
    for name in names if isinstance(names, list) else []:
        _check_is_inside(name, path)
