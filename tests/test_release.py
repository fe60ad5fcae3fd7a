"""A release has one version, wherever it is written, and names all that it brings along."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import dp_rmt

ROOT = Path(dp_rmt.__file__).parents[1]
HEADING = re.compile(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def disagreements(changelog: str, citation: str, readme: str, comparison: str, version: str) -> list[str]:
    """What is not as RELEASING.md says."""
    headings = HEADING.findall(changelog)
    found = [] if headings[0] == ("Unreleased", "") else ["CHANGELOG.md does not begin with [Unreleased]"]
    (date,) = re.findall(r'^date-released: "(\S+)"$', citation, re.MULTILINE)
    if headings[1] != (version, date):
        found.append(f"CHANGELOG.md: the newest release is {headings[1]}, not {(version, date)}")
    if re.findall(r"^version: (\S+)$", citation, re.MULTILINE) != [version]:
        found.append("CITATION.cff has another version")
    entry = re.search(r"@software\{(.*?)\n\}", readme, re.DOTALL)
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry[1], re.MULTILINE)) if entry else {}
    if (fields.get("version"), fields.get("year")) != (version, date[:4]):
        found.append("the BibTeX of README.md has another version or year")
    if f"| dp_rmt | {version}, {date} |" not in comparison:
        found.append("docs/comparison.md has another version or date")
    if [day for _, day in headings[1:]] != sorted((day for _, day in headings[1:]), reverse=True):
        found.append("CHANGELOG.md: the newest release does not come first")
    return found


FILES = ("CHANGELOG.md", "CITATION.cff", "README.md", "docs/comparison.md")


def test_the_version_is_the_same_in_all_places() -> None:
    assert disagreements(*map(text, FILES), dp_rmt.__version__) == []


@pytest.mark.parametrize("name", FILES)
def test_another_version_in_one_place_is_found(name: str) -> None:
    files = {other: text(other) for other in FILES}
    files[name] = files[name].replace(dp_rmt.__version__, "9.9.9")
    assert disagreements(*files.values(), dp_rmt.__version__) != []
    assert len(disagreements(*map(text, FILES), "9.9.9")) == 4


def requirements() -> set[str]:
    """The names of all packages that setup.py and pyproject.toml ask for, in the core and in the extras."""
    named = re.findall(r'"([A-Za-z][\w.-]*)(?:\[\w,]+\])?[>=]=[\d.]+"', text("setup.py"))
    built_by = tomllib.loads(text("pyproject.toml"))["build-system"]["requires"]
    return {*named, *(re.split("[>=]", name)[0] for name in built_by)}


def test_the_licence_of_every_package_is_named() -> None:
    notice = re.sub(r"[-_]", "-", text("third_party/README.md").lower())
    names = requirements()
    assert {"jax", "flax", "opacus", "sphinx", "setuptools"} <= names
    assert sorted(name for name in names if not re.search(rf"\b{re.sub('[-_]', '-', name.lower())}\b", notice)) == []
