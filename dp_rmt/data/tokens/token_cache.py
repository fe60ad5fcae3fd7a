"""Keeps tokenised arrays in files whose names are a SHA-256 of everything that the arrays depend on."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from dp_rmt.data.fingerprint import fingerprint

Tokenized = tuple[dict[str, np.ndarray], int]
"""The arrays by name, and how many of their rows were cut."""

_CACHE_FORMAT = 1  # raise it when tokenisation changes, so that older cache files are not found


def cache_key(
    tokenizer: Any,
    settings: Mapping[str, Any],
    *,
    texts: Sequence[Sequence[Any] | None],
    arrays: Mapping[str, np.ndarray],
) -> str:
    """Computes the SHA-256 of everything that tokenised rows depend on.

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        settings: lengths, token numbers and prompts, as JSON can hold them.
        texts: columns of text, or of what JSON can hold; None for one that is absent.
        arrays: columns that are passed through, such as labels.

    Returns:
        64 hexadecimal digits.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The backend remembers how it was last called, but this is set anew on each call.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    description = {"format": _CACHE_FORMAT, "backend": backend, **settings}
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for column in texts:
        digest.update(json.dumps(column).encode())
    if arrays:
        digest.update(fingerprint(arrays).encode())
    return digest.hexdigest()


def read_or_build(
    key: str, build: Callable[[], Tokenized], *, cache_dir: str | os.PathLike[str], num_examples: int
) -> Tokenized:
    """Returns the content of the cache file of `key`; if there is none, builds and keeps it.

    The file is written aside and renamed, so that concurrent runs see all of it or nothing. A damaged file is detected
    by its own fingerprint and rebuilt. The file holds the examples, so protect `cache_dir` like the data.

    Args:
        key: from `cache_key`.
        build: the function that tokenises.
        cache_dir: folder of the cache files, made if needed.
        num_examples: the number of examples, for the log.

    Returns:
        What `build` returns.
    """
    file = pathlib.Path(cache_dir) / f"tokens-{key}.npz"
    cached = _read_cache(file)
    if cached is None:
        start = time.perf_counter()
        cached = build()
        logging.info("Tokenised %d examples in %.1f s.", num_examples, time.perf_counter() - start)
        _write_cache(file, *cached)
    return cached


def _read_cache(file: pathlib.Path) -> Tokenized | None:
    """Reads a cache file; returns None if there is none, or if it is not what was written."""
    try:
        # The file is opened here, because np.load leaves a damaged archive open.
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
