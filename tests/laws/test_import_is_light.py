"""`import dp_rmt` loads no JAX and changes no environment; every public name is there all the same."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dp_rmt

PACKAGE = Path(dp_rmt.__file__).parent
HEAVY = {"jax", "jaxlib", "flax", "optax", "numpy", "scipy", "transformers", "matplotlib", "dp_accounting", "absl"}


def in_a_new_process(program: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *filter(None, sys.path)])}
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_import_loads_no_library():
    program = "import sys, json, dp_rmt; dir(dp_rmt), dp_rmt.__version__; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.partition(".")[0] for name in json.loads(in_a_new_process(program))}
    assert "dp_rmt" in loaded
    assert loaded & HEAVY == set()


EVERY_MODULE = """
import importlib, json, os, pkgutil
import jax, matplotlib, orbax.checkpoint, transformers  # what they set is theirs
before = dict(os.environ)
import dp_rmt
for module in pkgutil.walk_packages(dp_rmt.__path__, "dp_rmt."):
    importlib.import_module(module.name)
print(json.dumps({name: value for name, value in os.environ.items() if before.get(name) != value}))
"""


def test_no_import_sets_an_environment_variable():
    assert json.loads(in_a_new_process(EVERY_MODULE)) == {}


def test_the_three_lists_of_public_names_agree():
    """What is exported, what a type checker sees, and what is loaded when it is used."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (alias.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    rooms = {name for name, module in seen if module == "dp_rmt"}
    loaded = {(name, module) for module, names in dp_rmt._NAMES_OF_MODULE.items() for name in names}
    assert seen == loaded | {(room, "dp_rmt") for room in rooms}
    assert {name for name, _ in seen} == set(dp_rmt.__all__)


@pytest.mark.parametrize("name", dp_rmt.__all__)
def test_every_public_name_can_be_used(name):
    value = getattr(dp_rmt, name)
    assert value is vars(dp_rmt)[name]  # kept: the second use costs nothing
    assert name in dir(dp_rmt)
    assert getattr(value, "__name__", name).rpartition(".")[2] == name


def test_rooms_are_found_without_an_import_of_their_own():
    program = "import dp_rmt; print(dp_rmt.noise_addition.__name__, dp_rmt.random_matrix.shrinkage.__name__)"
    assert in_a_new_process(program).split() == ["dp_rmt.noise_addition", "dp_rmt.random_matrix.shrinkage"]


@pytest.mark.parametrize("name", ["clip_gradient", "_private", "__wrapped__"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'dp_rmt' has no attribute '{name}'"):
        getattr(dp_rmt, name)


def test_every_folder_of_modules_is_a_package():
    """A folder without __init__.py imports from a checkout, and is left out of the wheel."""
    assert {path.parent for path in PACKAGE.rglob("*.py")} == {path.parent for path in PACKAGE.rglob("__init__.py")}
