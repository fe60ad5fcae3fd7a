"""The archive of a bundle: installer, hashes of all files, and one tar file that is the same for the same files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from pathlib import Path

FOLDER = "dp_rmt-bundle"
HASHES = "SHA256SUMS"
_MODES = {".tar.xz": "w:xz", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar": "w:"}


def compression(output: Path) -> str:
    """The mode in which `tarfile` opens this archive.

    Raises:
      ValueError: the suffix is not known.
    """
    for suffix, mode in _MODES.items():
        if output.name.endswith(suffix):
            return mode
    raise ValueError(f"--output={output.name}: the name must end in one of {', '.join(_MODES)}")


def add_installer(folder: Path, python: str, requirements: list[str]) -> None:
    """Adds install.sh, what it installs, and the hashes of all files."""
    shutil.copy2(Path(__file__).with_name("install.sh"), folder / "install.sh")
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
    (folder / "python-version.txt").write_text(f"{python}\n", encoding="utf-8")
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    (folder / HASHES).write_text("".join(lines), encoding="utf-8")


def write(folder: Path, output: Path) -> None:
    """Writes the archive, whole or not at all. It may hold private data, so that only its owner can read it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        partial.touch(mode=0o600)
        with tarfile.open(partial, compression(output)) as tar:  # type: ignore[call-overload]
            for path in _files(folder):
                tar.add(path, f"{FOLDER}/{path.relative_to(folder).as_posix()}", filter=_anonymous)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def summary(folder: Path, output: Path) -> str:
    """Sizes of the archive and of its parts, in MB, and its hash."""
    lines = [f"{output.name}: {output.stat().st_size / 1e6:.1f} MB, SHA-256 {_sha256(output)}"]
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        inside = sorted(part.iterdir()) if part.name != "project" else [part]
        for path in inside:
            size = sum(file.stat().st_size for file in _files(path)) if path.is_dir() else path.stat().st_size
            lines.append(f"{size / 1e6:8.1f} MB  {path.relative_to(folder).as_posix()}")
    return "\n".join(lines)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what would tell who packed it, and when."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
