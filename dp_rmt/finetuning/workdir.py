"""One experiment, one folder: a folder that another experiment has written is left alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dp_rmt.files import close_to_others, write_atomically, write_private

CONFIG_FILE = "config.json"
NOT_THE_EXPERIMENT = ("mesh.", "checkpoints.")
"""What may differ between a run and its continuation: where it runs, and what it keeps."""


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes the folder this experiment's, or makes sure that it already is.

    A config that gives the seeds of sampling or noise is written so that others cannot read it.

    Args:
      workdir: a new or empty folder, or one that an equal config has claimed before (the run is then resumed).
      config: everything the run depends on, including the values resolved from data.

    Raises:
      ValueError: it holds another experiment; the keys that differ are listed.
      FileExistsError: it holds something else.
    """
    check_workdir(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG_FILE
    text = json.dumps(as_json(config), indent=2) + "\n"
    if not _gives_seeds(as_json(config)):
        if not path.exists():
            write_atomically(path, text)
    elif path.exists():
        close_to_others(path)
    else:
        write_private(path, text)


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """The checks of `claim_workdir`, without writing anything."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        foreign = sorted(entry.name for entry in workdir.iterdir()) if workdir.is_dir() else []
        if foreign or workdir.is_file():
            raise FileExistsError(
                f"{workdir} is not empty and holds no {CONFIG_FILE} (found {', '.join(foreign[:5]) or 'a file'}): "
                "give a new --workdir"
            )
        return
    try:
        saved, now = _flatten(json.loads(path.read_text())), _flatten(as_json(config))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give a new --workdir, or put the file back") from error
    differences = [
        f"  {key}: there {saved.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key) and not key.startswith(NOT_THE_EXPERIMENT)
    ]
    if differences:
        raise ValueError(
            f"{workdir} holds another experiment; its {CONFIG_FILE} differs:\n" + "\n".join(differences) + "\n"
            "Give a new --workdir, or repeat the settings of that one to resume it."
        )


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json_best_effort())


def is_secret(key: str) -> bool:
    """Whether a dotted key is that of a seed of sampling or noise, of a config or of one of its arms.

    >>> is_secret("arms.noisy.privacy.noise_seed"), is_secret("seed")
    (True, False)
    """
    return re.fullmatch(r"(?:.*\.)?privacy\.(?:sampling|noise)_seed", key) is not None


def _gives_seeds(config: Mapping[str, Any]) -> bool:
    return any(is_secret(key) and value is not None for key, value in _flatten(config).items())


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, sub in tree.items():
        flat |= _flatten(sub, f"{prefix}.{name}".strip("."))
    return flat
