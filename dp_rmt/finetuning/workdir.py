"""Each experiment has its own folder: a folder that another experiment has written is left alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_rmt.files import check_can_be_written, close_to_others, write_atomically, write_private
from dp_rmt.finetuning.settings import Settings

CONFIG_FILE = "config.json"
NOT_THE_EXPERIMENT = ("mesh.", "checkpoints.", "writers.")
"""Groups that may differ between a run and its continuation: where it runs, which checkpoints it keeps, and who
else gets its metrics."""
LAST_OF_THE_OLD_LAYOUT = "227de1b"
"""The last commit whose settings had groups `denoise` and `optimizer`."""


def claim_workdir(workdir: Path, settings: Settings) -> None:
    """Makes the folder this experiment's, or makes sure that it already is.

    Settings that give the seeds of sampling or noise are written so that others cannot read them.

    Args:
      workdir: a new or empty folder, or one that equal settings have claimed before (the run is then resumed).
      settings: settings of the experiment.

    Raises:
      ValueError: the folder holds another experiment; the keys that differ are listed.
      FileExistsError: the folder holds something else.
    """
    check_workdir(workdir, settings)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG_FILE
    record = as_json(settings)
    text = json.dumps(record, indent=2) + "\n"
    if not _gives_seeds(record):
        if not path.exists():
            write_atomically(path, text)
    elif path.exists():
        close_to_others(path)
    else:
        write_private(path, text)


def check_workdir(workdir: Path, settings: Settings) -> None:
    """The checks of `claim_workdir`, without writing anything."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        foreign = sorted(entry.name for entry in workdir.iterdir()) if workdir.is_dir() else []
        if foreign or workdir.is_file():
            raise FileExistsError(
                f"{workdir} is not empty and holds no {CONFIG_FILE} (found {', '.join(foreign[:5]) or 'a file'}): "
                "give a new --workdir"
            )
        check_can_be_written(workdir)  # before the model is loaded
        return
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give a new --workdir, or put the file back") from error
    if isinstance(record.get("optimizer"), dict):
        raise ValueError(
            f"{workdir} holds a run of an earlier dp_rmt, whose settings were laid out otherwise: commit "
            f"{LAST_OF_THE_OLD_LAYOUT} of dp_rmt finishes it; here give a new --workdir"
        )
    saved, now = flattened(record), flattened(as_json(settings))
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


def as_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values (tuples become lists); `Settings.from_config` reads them."""
    return json.loads(json.dumps(settings.as_dict()))


def is_secret(key: str) -> bool:
    """Whether a dotted key names a seed of sampling or noise, of a config or of one of its arms.

    >>> is_secret("arms.noisy.privacy.noise_seed"), is_secret("seed")
    (True, False)
    """
    return re.fullmatch(r"(?:.*\.)?privacy\.(?:sampling|noise)_seed", key) is not None


def _gives_seeds(config: Mapping[str, Any]) -> bool:
    return any(is_secret(key) and value is not None for key, value in flattened(config).items())


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key; an empty mapping is a value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, sub in tree.items():
        flat |= flattened(sub, f"{prefix}.{name}".strip("."))
    return flat
