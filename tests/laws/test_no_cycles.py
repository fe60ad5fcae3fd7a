"""No module imports itself by way of others: where two know each other, the house has no floor between them."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Mapping
from pathlib import Path

import pytest

import dp_rmt

ROOT = Path(dp_rmt.__file__).parents[1]
PACKAGES = ("dp_rmt", "experiments", "configs")


def sources() -> dict[str, str]:
    """Module -> its text; a package is the module of its `__init__`."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def imports(source: str, module: str, modules: Mapping[str, str]) -> set[str]:
    """The modules among these that one names in an import, wherever in it, imports for types included.

    Of ``from a import b`` it is ``a.b`` if that is a module, else ``a``. That importing ``a.b`` runs ``a`` first does
    not count: every module of a package would then know all that its `__init__` offers.
    """
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports here give the whole name"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= {name if name in modules else str(node.module) for name in submodules}
    return named & modules.keys() - {module}


def cycle(modules: Mapping[str, str]) -> list[str]:
    """A cycle of imports, its first module repeated at its end; empty where there is none."""
    graph = {module: imports(source, module, modules) for module, source in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_there_is_no_cycle() -> None:
    modules = sources()
    assert {"dp_rmt.mechanism", "dp_rmt.clipping", "experiments.finetune", "configs.base"} <= modules.keys()
    assert cycle(modules) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"a.x": "from a import y", "a.y": "from a.x import f"},
        {"a.x": "import a.y", "a.y": "def f():\n    from a import x"},
        {"a.x": "if TYPE_CHECKING:\n    from a.y import T", "a.y": "import a.z", "a.z": "from a.x import f"},
        {"a": "from a.x import f", "a.x": "from a import f"},  # through the front door of its own package
    ],
)
def test_a_planted_cycle_is_found(changed: dict[str, str]) -> None:
    found = cycle({"a": "", "b": "import a"} | changed)
    assert len(found) >= 3
    assert found[0] == found[-1]


def test_a_door_that_offers_its_rooms_is_none() -> None:
    assert cycle({"a": "from a import x\nfrom a.y import f", "a.x": "from a import y", "a.y": ""}) == []
