"""Files and folders that hold secrets, such as the key of the noise: only their owner may look into them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from absl import logging

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_private_folder(folder: Path) -> None:
    """Makes a folder of mode 0700, whatever the umask; one that is there is closed to others, with a line in the log.

    Every process of a run may call it. What lies inside is out of reach, whatever its own mode.

    Args:
      folder: to be made; its parents are made with the usual mode.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    close_to_others(folder)


def close_to_others(path: Path) -> None:
    """Takes the rights of group and others from a file or folder; the log says so, and where it cannot be done.

    Does nothing where there are no such rights, as on Windows.

    Args:
      path: of a file or folder that exists.
    """
    if os.name != "posix" or not (mode := stat.S_IMODE(path.stat().st_mode)) & _OTHERS:
        return
    reason = "its file system keeps the mode as it is"
    try:
        path.chmod(mode & ~_OTHERS)
    except OSError as error:  # another owner, or a file system without modes
        reason = str(error)
    if stat.S_IMODE(path.stat().st_mode) & _OTHERS:
        logging.warning(
            "%s holds secrets (whoever has them can subtract the noise), and others may look into it: its mode is "
            "%04o, and could not be changed (%s); put it where only you can read",
            path, mode, reason,
        )  # fmt: skip
    else:
        logging.warning("%s was open to others (mode %04o) and holds secrets: now it is %04o",
                        path, mode, mode & ~_OTHERS)  # fmt: skip


def write_private(path: Path, text: str) -> None:
    """Writes a file of mode 0600, whole or not at all: at no moment could others read it.

    Args:
      path: its folder must exist; a file there is replaced.
      text: its content, written as UTF-8.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600, exist_ok=False)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
