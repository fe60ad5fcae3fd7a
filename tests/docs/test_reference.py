"""The API reference has an entry for every public name: what packages list in `__all__`, and the rooms of theory."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import dp_rmt

PAGES = sorted((Path(__file__).parents[2] / "docs" / "api").glob("*.rst"))
DIRECTIVE = re.compile(r"^\.\. auto(module|class|function|data):: (\S+)\n((?:   .*\n?)*)", re.MULTILINE)
PUBLIC_ROOMS = ("baselines", "random_matrix")  # whose modules are public, name by name


def public_names() -> dict[str, object]:
    """Every public object by the dotted name under which a user imports it."""
    rooms = [importlib.import_module(found.name) for found in pkgutil.iter_modules(dp_rmt.__path__, "dp_rmt.")]
    names = {f"{room.__name__}.{name}": getattr(room, name) for room in [dp_rmt, *rooms] for name in _listed(room)}
    for room in PUBLIC_ROOMS:
        package = importlib.import_module(f"dp_rmt.{room}")
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            names |= {f"{found.name}.{name}": getattr(module, name) for name in defined_in(found.name)}
    return names


def _listed(module: ModuleType) -> list[str]:
    return getattr(module, "__all__", [])


def defined_in(module: str) -> list[str]:
    """Names of the public functions and classes that a module defines."""
    tree = ast.parse(Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def documented(pages: list[str]) -> set[int]:
    """Identities of the objects that the pages have an entry for."""
    found = set()
    for kind, name, options in (match for page in pages for match in DIRECTIVE.findall(page)):
        if kind != "module":
            found.add(id(pkgutil.resolve_name(name)))
            continue
        module = importlib.import_module(name)
        found.add(id(module))
        if ":members:" not in options:
            continue
        excluded = re.search(r":exclude-members: (.*)", options)
        names = set(getattr(module, "__all__", defined_in(name))) - set(
            re.split(r",\s*", excluded[1]) if excluded else ()
        )
        if ":imported-members:" not in options:
            names &= set(defined_in(name))
        found |= {id(getattr(module, member)) for member in names}
    return found


def missing(pages: list[str]) -> list[str]:
    there = documented(pages)
    return sorted(name for name, value in public_names().items() if id(value) not in there)


def test_every_public_name_has_an_entry() -> None:
    assert missing([page.read_text(encoding="utf-8") for page in PAGES]) == []


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("dp_rmt", "dp_rmt.DPSGD"),
        ("accounting", "dp_rmt.accounting.Step"),
        ("baselines", "dp_rmt.baselines.muon.private_muon"),
    ],
)
def test_a_page_that_is_left_out_is_missed(page: str, name: str) -> None:
    others = [path.read_text(encoding="utf-8") for path in PAGES if path.stem != page]
    assert name in missing(others)
