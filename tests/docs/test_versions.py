"""The sites of several versions lie beside each other, and each lists all."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

EXTENSIONS = Path(__file__).parents[2] / "docs" / "_ext"
keep = runpy.run_path(str(EXTENSIONS / "versions.py"))["keep"]


@pytest.fixture
def html(tmp_path: Path) -> Path:
    folder = tmp_path / "html"
    folder.mkdir()
    (folder / "index.html").write_text("a site")
    return folder


def listed(folder: Path) -> list[str]:
    text = (folder / "versions.js").read_text()
    return json.loads(text.removeprefix("const versions = ").removesuffix(";\n"))


def test_versions_are_listed_newest_first_and_the_newest_release_is_shown(html: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    for version in ("0.9.0", "0.10.0", "0.11.0.dev1", "0.2.0"):
        keep(html, site, version)
    (site / "images").mkdir()
    keep(html, site, "0.2.0")
    assert listed(site) == ["0.11.0.dev1", "0.10.0", "0.9.0", "0.2.0"]
    assert 'url=0.10.0/index.html"' in (site / "index.html").read_text()


def test_a_version_is_replaced_as_a_whole_and_the_others_are_left(html: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    keep(html, site, "0.1.0")
    (html / "old.html").write_text("gone in the next build")
    keep(html, site, "0.2.0")
    (html / "old.html").unlink()
    (html / "index.html").write_text("a better site")
    keep(html, site, "0.2.0")
    assert not (site / "0.2.0" / "old.html").exists()
    assert (site / "0.2.0" / "index.html").read_text() == "a better site"
    assert (site / "0.1.0" / "index.html").read_text() == "a site"


def test_without_a_release_the_newest_of_all_is_shown(html: Path, tmp_path: Path) -> None:
    keep(html, tmp_path / "site", "0.3.0.dev0")
    assert "0.3.0.dev0/index.html" in (tmp_path / "site" / "index.html").read_text()


@pytest.mark.parametrize(("version", "message"), [("newest", "'newest' is no version"), ("..", "'..' is no version")])
def test_what_is_no_version_is_refused(version: str, message: str, html: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        keep(html, tmp_path / "site", version)
    assert not (tmp_path / "site").exists()


def test_a_site_that_was_not_built_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build the site first"):
        keep(tmp_path, tmp_path / "site", "0.1.0")
