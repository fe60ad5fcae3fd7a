"""Finds the Java archives of the official E2E script, if the package `pycocoevalcap` and Java are installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import shutil


@dataclasses.dataclass(frozen=True)
class CaptionJars:
    """The paths of the archives that `pycocoevalcap` brings along.

    Attributes:
        tokenizer: Stanford CoreNLP 3.4.1, for its Penn Treebank tokenizer.
        meteor: METEOR 1.5; its data lie beside it.
    """

    tokenizer: pathlib.Path
    meteor: pathlib.Path


def find_caption_jars() -> CaptionJars | None:
    """Returns the archives, or None if Java or `pycocoevalcap` is missing."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if shutil.which("java") is None or spec is None or not spec.submodule_search_locations:
        return None
    folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
    jars = CaptionJars(folder / "tokenizer" / "stanford-corenlp-3.4.1.jar", folder / "meteor" / "meteor-1.5.jar")
    return jars if jars.tokenizer.is_file() and jars.meteor.is_file() else None
