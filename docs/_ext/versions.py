"""Keeps the sites of several versions beside each other.

    python docs/_ext/versions.py HTML FOLDER VERSION

copies a built site to FOLDER/VERSION, in the place of what was there, and leaves the other versions as they are. Every
page of every version then lists all of them, newest first, since it reads FOLDER/versions.js. FOLDER/index.html leads
to the newest release. Both can be opened without a server.
"""

import json
import shutil
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

INDEX = """<!doctype html>
<meta charset="utf-8">
<title>dp_rmt</title>
<meta http-equiv="refresh" content="0; url={version}/index.html">
<a href="{version}/index.html">dp_rmt {version}</a>
"""


def keep(html: Path, folder: Path, version: str) -> None:
    """Copies the site of a version and writes the list anew.

    Raises:
      ValueError: the site is not there, or the version is none.
    """
    if not (html / "index.html").is_file():
        raise ValueError(f"{html} has no index.html: build the site first, by make -C docs html")
    try:
        Version(version)
    except InvalidVersion as error:
        raise ValueError(f"{version!r} is no version: give one such as 0.2.0") from error
    shutil.rmtree(folder / version, ignore_errors=True)
    shutil.copytree(html, folder / version)
    versions = sorted(filter(None, map(_version, folder.iterdir())), reverse=True)
    released = [version for version in versions if not version.is_prerelease] or versions
    listed = json.dumps([str(version) for version in versions])
    (folder / "versions.js").write_text(f"const versions = {listed};\n", encoding="utf-8")
    (folder / "index.html").write_text(INDEX.format(version=released[0]), encoding="utf-8")


def _version(path: Path) -> Version | None:
    try:
        return Version(path.name) if path.is_dir() else None
    except InvalidVersion:
        return None  # something else that lies there


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        keep(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except ValueError as error:
        sys.exit(f"versions: {error}")
