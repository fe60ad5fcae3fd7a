"""Write a folder so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

_METADATA = {"format": "pt", "producer": "dp_rmt"}  # transformers insists on a known "format"


@contextlib.contextmanager
def whole_folder(folder: Path, weights_file: str) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place at the end; a folder that was written so is replaced.

    Args:
        folder: an absolute path.
        weights_file: the file in it, written by `save_tensors`, by which a folder is known to have been written so.

    Yields:
        Where to write the files.

    Raises:
        FileExistsError: if the place holds something else.
    """
    if not _may_replace(folder, weights_file):
        raise FileExistsError(
            f"{folder} holds files that were not written by dp_rmt, or no {weights_file}; give a new folder, or remove "
            "that one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file that everyone may read who may read files that are written here."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(tensors, path, metadata=_METADATA)  # makes it private to the user
    os.chmod(path, mode)


def _may_replace(folder: Path, weights_file: str) -> bool:
    """Whether the place is free, an empty folder, or a folder that was written here."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        with safetensors.safe_open(folder / weights_file, "numpy") as file:
            return (file.metadata() or {}).get("producer") == _METADATA["producer"]
    except (OSError, safetensors.SafetensorError):
        return False
