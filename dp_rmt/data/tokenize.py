"""Text rows to arrays of one fixed shape, with any Hugging Face fast tokenizer; tokenised once and cached."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from dp_rmt.data.fingerprint import fingerprint
from dp_rmt.data.glue import Examples
from dp_rmt.data.glue_tasks import Infilling
from dp_rmt.data.infilling import infilling_rows

_CACHE_FORMAT = 1  # raise it when tokenisation changes, so that older cache files are not found


def tokenize_classification(
    examples: Examples, tokenizer: Any, *, max_length: int, infilling: Infilling | None = None
) -> dict[str, np.ndarray]:
    """Tokenises sentences, or pairs of them, and pads on the right to `max_length`.

    Longer rows are cut: of a pair, the longer text loses tokens first; of a prompt, only the texts are cut,
    never the prompt's own words or its mask. The fraction of cut rows is logged.

    Args:
        examples: N text rows.
        tokenizer: a fast tokenizer of `transformers`.
        max_length: L, tokens per row, special tokens included.
        infilling: writes each row into this prompt; None gives the tokenizer's own layout, [CLS] text [SEP].

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` (zeros where the tokenizer has none), each (N, L)
        int32; `label`, (N,) int32, or float32 for regression, if there are labels; with `infilling` also
        `mask_position`, (N,) int32.

    Raises:
        ValueError: no examples, a tokenizer without a pad (or mask) token, or `max_length` without room for
            text.
    """
    arrays, num_truncated = _tokenize(examples, tokenizer, max_length, infilling)
    _log_truncation(num_truncated, len(examples), max_length)
    return arrays


def tokenize_cached(
    examples: Examples,
    tokenizer: Any,
    *,
    max_length: int,
    cache_dir: str | os.PathLike[str],
    infilling: Infilling | None = None,
) -> dict[str, np.ndarray]:
    """`tokenize_classification`, kept in a file whose name is a SHA-256 of everything the result depends on.

    The file is written aside and renamed, so that concurrent runs see all of it or nothing; a damaged file is
    detected by its own fingerprint and rebuilt. It holds the examples: protect `cache_dir` like the data.

    Args:
        examples: as in `tokenize_classification`.
        tokenizer: likewise.
        max_length: likewise.
        cache_dir: folder of the cache files, made if needed.
        infilling: as in `tokenize_classification`.

    Returns:
        The arrays of `tokenize_classification`.

    Raises:
        ValueError: as `tokenize_classification`.
    """
    _check_tokenizer(tokenizer)
    key = _cache_key(examples, tokenizer, max_length, infilling)
    file = pathlib.Path(cache_dir) / f"tokens-{key}.npz"
    cached = _read_cache(file)
    if cached is None:
        start = time.perf_counter()
        cached = _tokenize(examples, tokenizer, max_length, infilling)
        logging.info("Tokenised %d examples in %.1f s.", len(examples), time.perf_counter() - start)
        _write_cache(file, *cached)
    arrays, num_truncated = cached
    _log_truncation(num_truncated, len(examples), max_length)
    return arrays


def _tokenize(
    examples: Examples, tokenizer: Any, max_length: int, infilling: Infilling | None
) -> tuple[dict[str, np.ndarray], int]:
    _check_tokenizer(tokenizer)
    if len(examples) == 0:
        raise ValueError("There are no examples to tokenise.")
    extra = {} if examples.labels is None else {"label": examples.labels}
    if infilling is None:
        ids, types, num_truncated = _classification_rows(examples, tokenizer, max_length)
    else:
        types = None
        ids, positions, num_truncated = infilling_rows(examples, tokenizer, infilling, max_length=max_length)
        extra["mask_position"] = np.asarray(positions, np.int32)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    attention_mask = np.arange(max_length) < lengths[:, None]
    arrays = {
        "input_ids": _pad(ids, attention_mask, tokenizer.pad_token_id),
        "attention_mask": attention_mask.astype(np.int32),
        "token_type_ids": np.zeros(attention_mask.shape, np.int32),
    }
    if types is not None:
        arrays["token_type_ids"] = _pad(types, attention_mask, 0)
    return arrays | extra, num_truncated


def _check_tokenizer(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer. Load it with transformers.AutoTokenizer"
            " from a folder that holds tokenizer.json."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no pad token, and rows of one shape need padding."
            " Set one, for example tokenizer.pad_token = tokenizer.eos_token: attention ignores it."
        )


def _classification_rows(
    examples: Examples, tokenizer: Any, max_length: int
) -> tuple[list[list[int]], list[list[int]] | None, int]:
    """Token ids and segment numbers of each row with special tokens, and how many rows were cut."""
    is_pair = examples.text_pairs is not None
    fixed = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if max_length < fixed + 1 + is_pair:
        raise ValueError(
            f"max_length={max_length} has no room for text: {fixed} of its tokens are special tokens. Raise"
            " it."
        )
    encoded = tokenizer(
        list(examples.texts),
        list(examples.text_pairs) if examples.text_pairs is not None else None,
        max_length=max_length,
        truncation="longest_first",
        padding=False,
        return_attention_mask=False,
    )
    num_truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    return encoded["input_ids"], encoded.get("token_type_ids"), num_truncated


def _pad(rows: Sequence[Sequence[int]], is_token: np.ndarray, fill: int) -> np.ndarray:
    padded = np.full(is_token.shape, fill, np.int32)
    padded[is_token] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return padded


def _log_truncation(num_truncated: int, num_examples: int, max_length: int) -> None:
    logging.info(
        "%d of %d examples (%.2f%%) are longer than max_length=%d and were cut.",
        num_truncated,
        num_examples,
        100 * num_truncated / num_examples,
        max_length,
    )


def _cache_key(examples: Examples, tokenizer: Any, max_length: int, infilling: Infilling | None) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The backend remembers how it was last called; that is set anew on each call.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    description = {
        "format": _CACHE_FORMAT,
        "backend": backend,
        "tokens": [tokenizer.pad_token_id, tokenizer.mask_token_id],
        "inputs": sorted(tokenizer.model_input_names),
        "max_length": max_length,
        "template": None if infilling is None else infilling.template,
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for texts in (examples.texts, examples.text_pairs):
        digest.update(json.dumps(texts).encode())
    if examples.labels is not None:
        digest.update(fingerprint({"label": examples.labels}).encode())
    return digest.hexdigest()


def _read_cache(file: pathlib.Path) -> tuple[dict[str, np.ndarray], int] | None:
    """The content of a cache file; None if there is none, or if it is not what was written."""
    try:
        # Opened here, because np.load leaves a damaged archive open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        expected = str(arrays.pop("fingerprint"))
        if fingerprint(arrays) == expected:
            return arrays, int(arrays.pop("num_truncated"))
        problem: object = "its content does not match its fingerprint"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        problem = error
    logging.warning("The cache file %s is damaged (%s): tokenising again.", file, problem)
    return None


def _write_cache(file: pathlib.Path, arrays: dict[str, np.ndarray], num_truncated: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = arrays | {"num_truncated": np.asarray(num_truncated)}
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, fingerprint=np.asarray(fingerprint(stored)), **stored)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
