"""One experiment, one folder, one process: a folder that another one writes to, or has written, is left alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from dp_rmt.files import close_to_others, write_atomically, write_private
from dp_rmt.finetuning.settings import Settings

CONFIG_FILE = "config.json"
NOT_THE_EXPERIMENT = ("mesh.", "checkpoints.")
"""What may differ between a run and its continuation: where it runs, and what it keeps."""
LAST_OF_THE_OLD_LAYOUT = "227de1b"
"""The last commit whose settings had groups `denoise` and `optimizer`."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers, such as a mounted bucket."""


def claim_workdir(workdir: Path, settings: Settings) -> None:
    """Makes the folder this experiment's, or makes sure that it already is.

    Settings that give the seeds of sampling or noise are written so that others cannot read them.

    Args:
      workdir: a new or empty folder, or one that equal settings have claimed before (the run is then resumed).
      settings: of the experiment.

    Raises:
      ValueError: it holds another experiment; the keys that differ are listed.
      FileExistsError: it holds something else.
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
    saved, now = _flatten(record), _flatten(as_json(settings))
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


@contextlib.contextmanager
def only_writer(workdir: Path) -> Iterator[None]:
    """Keeps a claimed folder to this process while it trains there.

    Two processes that resumed the same run would each cut off what the other has written, and, before the first
    checkpoint, each draw a noise key of its own. The lock is the kernel's, on the config's file: it ends with the
    process, however that ends.

    Args:
      workdir: claimed by `claim_workdir`.

    Raises:
      BlockingIOError: another process trains there.
    """
    with (workdir / CONFIG_FILE).open("a") as file:  # NFS locks only what is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process trains in {workdir}: wait for its end or stop it; the same command then resumes"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logging.warning("%s: its file system has no locks; never train there from two processes", workdir)
        yield


def as_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values (tuples become lists); `Settings.from_config` reads them."""
    return json.loads(json.dumps(settings.as_dict()))


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
