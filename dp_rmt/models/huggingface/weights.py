"""Reads the tensors of a Hugging Face folder, in one safetensors file or in shards, a piece at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from dp_rmt.extras import extra
from dp_rmt.models.huggingface.folder import weight_files

with extra("finetune"):
    import safetensors

_FLOATS = ("F64", "F32", "F16", "BF16")
_PIECE = 2**21
"""How many numbers are read at a time."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: its file, its name there, and its shape."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """All tensors of a folder.

    Every read opens the file anew. A file that stays open keeps the pages that were read in memory, and a model would
    be there twice.

    Attributes:
        path: the one file, or the index of the shards.
        tensors: maps the canonical name to where the tensor is.
    """

    path: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path, canonical: Callable[[str], str]) -> Weights:
        """Reads the names and shapes.

        Args:
            folder: a local model folder.
            canonical: maps the name in the file to the name that this package knows it by.

        Returns:
            The tensors.

        Raises:
            FileNotFoundError: there is no such file, or a shard is absent.
            ValueError: a file cannot be read, or holds a tensor twice.
        """
        tensors: dict[str, StoredTensor] = {}
        index, paths = weight_files(folder)
        for path in paths:
            try:
                with safetensors.safe_open(path, "numpy") as file:
                    for name in file.keys():  # noqa: SIM118  (not a dict)
                        part = file.get_slice(name)
                        found = StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
                        other = tensors.setdefault(canonical(name), found)
                        if other is not found:
                            raise ValueError(
                                f"{path} holds {canonical(name)} twice, as {other.name} and {name}; remove one of them"
                                if other.path == path
                                else f"{canonical(name)} is in {other.path} and in {path}; download the model again"
                            )
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is not a readable safetensors file ({error}); download it again") from error
        return cls(index, tensors)

    def preferring(self, copies: Mapping[str, str]) -> Weights:
        """The same tensors, with each original (a value of `copies`) taken from its copy if the file has one.

        transformers computes with the copies where nothing ties them, and then leaves the originals as they began.
        """
        tensors = dict(self.tensors)
        for copy, original in copies.items():
            if copy in tensors:
                tensors[original] = tensors.pop(copy)
        return dataclasses.replace(self, tensors=tensors)

    def pieces(self, name: str, *, whole: bool = False) -> Iterator[tuple[slice, np.ndarray]]:
        """Reads a tensor's rows in pieces of at most two million numbers, or as a whole.

        Args:
            name: canonical name.
            whole: read the tensor in one piece.

        Yields:
            The slice of the rows, and their values.

        Raises:
            ValueError: the tensor does not hold floating-point numbers.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{tensor.path}: tensor {tensor.name} holds {tensor.dtype} numbers, expected one of "
                f"{', '.join(_FLOATS)}; use a model that is not quantised"
            )
        rows = tensor.shape[0] if tensor.shape else 1
        step = max(1, rows if whole else _PIECE * rows // max(1, int(np.prod(tensor.shape))))
        for start in range(0, rows, step):
            some = slice(start, min(start + step, rows))
            with safetensors.safe_open(tensor.path, "numpy") as file:
                values = file.get_slice(tensor.name)[some] if tensor.shape else file.get_tensor(tensor.name)
            yield some, values

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor as a whole."""
        return next(values for _, values in self.pieces(name, whole=True))
