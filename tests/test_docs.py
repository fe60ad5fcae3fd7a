"""What the documents name exists: modules, attributes, commands, files, links and choices of configs."""

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "experiments/**/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it names what there was
)
FOLDERS = "dp_rmt|experiments|configs|tests|docs|scripts|third_party"


def test_there_are_documents():
    assert {"README.md", "CONTRIBUTING.md", "math.md"} <= {path.name for path in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document):
    text = without_former_commands(document.read_text(encoding="utf-8"))
    assert not [name for name in dotted_names(text) if not is_name(name)]
    assert not [path for path in paths(text) if not is_path(ROOT, path)]
    assert not [link for link in links(text) if not is_path(document.parent, link)]
    for module, choice in choices(text):
        importlib.import_module(module).get_config(choice)


def without_former_commands(text: str) -> str:
    """The document without the commands of studies whose code has gone, for which it names the last commit."""
    return re.sub(r"Commit \w+ is\s+the last in which this runs.*?```sh.*?```", "", text, flags=re.DOTALL)


def dotted_names(text: str) -> Iterator[str]:
    """Names of this project's modules and of what is in them, also those after ``python -m``."""
    for name in re.findall(r"(?<![\w/.-])(?:dp_rmt|experiments)(?:\.[A-Za-z_]\w*)+", text):
        if not re.search(r"\.(py|md|sh|json|toml|log|NAME)$", name):
            yield name


def paths(text: str) -> Iterator[str]:
    """Paths below the root that have no placeholder in them."""
    for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*-]+", text):
        if not re.search(r"[A-Z]{3,}(?!\.md)", path.replace("README", "")):
            yield path.rstrip(".")


def links(text: str) -> Iterator[str]:
    """Where links and pictures of this project lead; a section of the same document is not looked at."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link and not link.startswith("#"):
            yield link.partition("#")[0]


def choices(text: str) -> Iterator[tuple[str, str]]:
    """The modules of configs and what is chosen behind their colons, such as ``configs/glue.py:sst2,base``."""
    for name, choice in re.findall(r"configs/(\w+)\.py:([a-z0-9_,]+)", text):
        yield f"configs.{name}", choice


def is_path(folder: Path, path: str) -> bool:
    """Whether a file, a folder, a module without its ending, or something that fits a pattern is there."""
    return any(folder.glob(path)) or any(folder.glob(f"{path}.py"))


def is_name(name: str) -> bool:
    parts = name.split(".")
    module = next(
        candidate
        for candidate in (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        if is_module(candidate)
    )
    attributes = parts[module.count(".") + 1 :]
    if not attributes:
        return True
    thing = importlib.import_module(module)
    for attribute in attributes:
        if not hasattr(thing, attribute):
            # A field of a dataclass without a default is an annotation alone.
            return attribute in getattr(thing, "__annotations__", {})
        thing = getattr(thing, attribute)
    return True


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module and no package, or there is none
        return False


@pytest.mark.parametrize(
    ("text", "finder", "exists"),
    [
        ("see `dp_rmt.clipping.nowhere`", dotted_names, False),
        ("see `dp_rmt.denoise_matricess`", dotted_names, False),
        ("run python -m experiments.finetunes --config=x", dotted_names, False),
        ("see `dp_rmt.mechanism.DPSGD.noise_std`", dotted_names, True),
        ("see dp_rmt/clipping/ghosts.py", paths, False),
        ("see `configs/NAME.py` and tests/laws/test_import_floors.py.", paths, True),
    ],
)
def test_a_wrong_name_is_found(text, finder, exists):
    (found,) = finder(text)
    assert (is_name(found) if finder is dotted_names else is_path(ROOT, found)) == exists
