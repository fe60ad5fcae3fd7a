"""Files and folders that are written whole or not at all, and digests by which damage is found."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging

from dp_rmt.extras import extra

with extra("finetune"):
    import safetensors
    import safetensors.numpy

_METADATA = {"format": "pt", "producer": "dp_rmt"}  # transformers insists on a known "format"


@contextlib.contextmanager
def whole_folder(folder: Path, weights_file: str) -> Iterator[Path]:
    """Makes a new folder that takes the place of `folder` at the end.

    A folder that was written by this function is replaced, and no other. If `folder` is a symbolic link, the folder
    that it leads to is replaced, and the link stays.

    Args:
        folder: an absolute path.
        weights_file: the file in the folder that `save_tensors` writes; it marks a folder as written by this function.

    Yields:
        The folder to write the files into.

    Raises:
        FileExistsError: `folder` holds something else.
    """
    folder = folder.resolve()
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
    """Writes a safetensors file with the usual permissions of a new file."""
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.numpy.save_file(tensors, path, metadata=_METADATA)  # makes it private to the user
    except safetensors.SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    os.chmod(path, mode)


def is_written_here(path: Path) -> bool:
    """Tells whether a safetensors file was written by `save_tensors`."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("producer") == _METADATA["producer"]
    except (OSError, safetensors.SafetensorError):
        return False


def _may_replace(folder: Path, weights_file: str) -> bool:
    """Whether the place is free, an empty folder, or a folder that was written here."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    return is_written_here(folder / weights_file)


_ADVICE = {
    errno.ENOSPC: "free space there, or give a folder on another disk; a run goes on from its last checkpoint",
    errno.EDQUOT: "free some of your quota, or give a folder on another disk; a run goes on from its last checkpoint",
    errno.ENOTDIR: "give a path whose parents are folders",
    errno.EEXIST: "give a path whose parents are folders",
    errno.EACCES: "give a folder in which you may write, or change the rights of this one",
    errno.EPERM: "give a folder in which you may write, or change the rights of this one",
    errno.EROFS: "give a folder on a file system that can be written",
    errno.ENAMETOOLONG: "give a shorter path",
}


def explained(error: OSError) -> str:
    """What an error of the file system says to a user: path, reason and advice.

    Args:
      error: the error. One whose message was written by this library is left as it is.

    >>> explained(OSError(errno.ENOSPC, "No space left on device", "runs/a"))
    'runs/a: no space left on device: free space there, or give a folder on another disk; a run goes on from its last checkpoint'
    """  # noqa: E501
    if error.errno not in _ADVICE or error.strerror is None:
        return str(error)
    where = os.fspath(error.filename2 or error.filename or "a file")
    reason = error.strerror[:1].lower() + error.strerror[1:]
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and (file := _file_on_the_way(Path(os.fsdecode(where)))):
        reason = f"{file} is a file, not a folder"
    return f"{os.fsdecode(where)}: {reason}: {_ADVICE[error.errno]}"


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Errors of the file system come out with the message that `explained` gives them."""
    try:
        yield
    except OSError as error:
        if (text := explained(error)) == str(error):
            raise
        clearer = type(error)(text)
        clearer.errno = error.errno
        raise clearer from error


def check_can_be_written(folder: Path) -> None:
    """Makes sure, without writing, that a folder is one or can be made, and that files can be made in it.

    Raises:
      NotADirectoryError, PermissionError: a file is in its way, or the user may not write there.
    """
    if (file := _file_on_the_way(folder)) is not None:
        raise NotADirectoryError(errno.ENOTDIR, f"{file} is a file, not a folder", str(folder))
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"you may not write into {there}", str(folder))


def _file_on_the_way(path: Path) -> Path | None:
    return next((each for each in (path, *path.parents) if each.is_file()), None)


DIGESTS = "sha256.json"


_CHANGES_LATER = "_CHECKPOINT_METADATA"
"""The file into which Orbax writes the time of the commit last. Nothing is restored from it."""


def write_digests(folder: Path) -> None:
    """Writes ``sha256.json``: the SHA-256 of every other file of the folder, by relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in files if path.name not in (DIGESTS, _CHANGES_LATER)]
    (folder / DIGESTS).write_text(json.dumps(_digests(folder, names), indent=0))


def damage(folder: Path, pattern: str = "*") -> str | None:
    """Says what is wrong with the files of a folder.

    Args:
      folder: the folder to check. One without ``sha256.json`` was saved before there were digests, and is taken to be
        intact.
      pattern: which relative paths to look at.

    Returns:
      A sentence about a file that is missing or changed; None if there is no such file. Additional files are no damage.
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


def files_digest(paths: Sequence[Path]) -> str:
    """The SHA-256 of the names and contents of some files, wherever they lie; the order counts."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_digest, paths))
    lines = [f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file as a whole: a reader, or a crash at any moment, finds the old text or the new one.

    Args:
      path: the file; its folder must exist. A symbolic link stays, and the file that it leads to is replaced.
      text: its new content, written as UTF-8.
    """
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_private_folder(folder: Path) -> None:
    """Makes a folder of mode 0700, whatever the umask; an existing folder is closed to others, and the log says so.

    Every process of a run may call it. What lies inside is out of reach of others, whatever its own mode.

    Args:
      folder: the folder to make; its parents are made with the usual mode.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    close_to_others(folder)


def close_to_others(path: Path) -> None:
    """Takes the rights of group and others from a file or folder; the log says so, or that it could not be done.

    It does nothing on systems without such rights, such as Windows.

    Args:
      path: a file or folder that exists.
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
            path,
            mode,
            reason,
        )
    else:
        logging.warning(
            "%s was open to others (mode %04o) and holds secrets: now it is %04o", path, mode, mode & ~_OTHERS
        )


def write_private(path: Path, text: str) -> None:
    """Writes a file of mode 0600, whole or not at all; others can read it at no moment.

    Args:
      path: the file. Its folder must exist; an existing file is replaced.
      text: the content, written as UTF-8.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600, exist_ok=False)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
