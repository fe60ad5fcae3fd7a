"""The licences of what a bundle carries, for whoever passes it on."""

from __future__ import annotations

import email
import zipfile
from email.message import Message
from pathlib import Path

FILE = "LICENCES.md"
_TEXT = """# Licences of what this bundle carries

The wheels are unchanged, as the package index has them, and each carries its own licence. The table says what the
metadata of each says; the files are in the wheel. Whoever passes the bundle on has to keep to all of them.

| package | version | licence, by its metadata | files in the wheel |
|---|---|---|---|
{rows}

`project/` is dp_rmt (`project/LICENSE`). What it owes to others is in `project/third_party/README.md`.
"""
_OTHERS = "\n{folder} has {names}: under the licences of their sources, which no file here tells.\n"


def add_licences(folder: Path) -> None:
    """Writes the table of the licences of a bundle's wheels, and names its models and data."""
    rows = "\n".join(_row(wheel) for wheel in sorted((folder / "wheels").glob("*.whl")))
    text = _TEXT.format(rows=rows)
    for part in ("models", "data"):
        if names := sorted(path.name for path in (folder / part).glob("*")):
            text += _OTHERS.format(folder=f"`{part}/`", names=", ".join(f"`{name}`" for name in names))
    (folder / FILE).write_text(text, encoding="utf-8")


def _row(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA") and name.count("/") == 1)
        metadata = email.message_from_bytes(archive.read(path))
    inside = path.removesuffix("METADATA")
    files = sorted(
        name.removeprefix(inside)
        for name in names
        if name.startswith(inside) and any(word in name.upper() for word in ("LICEN", "COPYING", "NOTICE", "AUTHORS"))
    )
    return f"| {metadata['Name']} | {metadata['Version']} | {_licence(metadata)} | {', '.join(files) or 'none'} |"


def _licence(metadata: Message) -> str:
    """The expression; else the classifiers; else the first line of the free text, which can be a whole licence."""
    if expression := metadata["License-Expression"]:
        return str(expression)
    classifiers = [line for line in metadata.get_all("Classifier", []) if line.startswith("License ::")]
    if classifiers:
        return ", ".join(line.rpartition(":: ")[2] for line in classifiers)
    free = (metadata["License"] or "").strip().splitlines()
    return free[0].replace("|", "/") if free else "not said"
