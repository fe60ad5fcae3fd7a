"""Digests of the files of a folder: what was damaged since is found."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DIGESTS = "sha256.json"
_CHANGES_LATER = "_CHECKPOINT_METADATA"
"""Orbax writes the time of the commit into it last; nothing is restored from it."""


def write_digests(folder: Path) -> None:
    """Writes ``sha256.json``: the SHA-256 of every other file of the folder, by relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in files if path.name not in (DIGESTS, _CHANGES_LATER)]
    (folder / DIGESTS).write_text(json.dumps(_digests(folder, names), indent=0))


def damage(folder: Path, pattern: str = "*") -> str | None:
    """What is wrong with the files of a folder.

    Args:
      folder: with ``sha256.json``, or without (saved before there were digests), and then taken to be intact.
      pattern: of the relative paths to look at.

    Returns:
      A file that is missing or not what it was; None if there is none. Further files are no damage.
    """
    if not (folder / DIGESTS).exists():
        return None
    try:
        saved = json.loads((folder / DIGESTS).read_text())
        names = [name for name in saved if fnmatch.fnmatch(name, pattern)]
        gone = [name for name in names if not (folder / name).is_file()]
        if gone:
            return f"{gone[0]} is missing"
        now = _digests(folder, names)
    except (OSError, ValueError) as error:
        return str(error)
    changed = [name for name in now if now[name] != saved[name]]
    return f"{changed[0]} is not what was written" if changed else None


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        return dict(zip(names, pool.map(digest, names), strict=True))
