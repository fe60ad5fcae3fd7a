"""The house has floors: a module imports only from its own floor and from those before it in FLOORS."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dp_rmt

FLOORS = [
    "environment",
    "extras",
    "types",
    "arguments",
    "trees",
    "files",
    "random_matrix",
    "scoring",
    "threefry",
    "random_bits",
    "noise_addition",
    "correlated_noise",
    "accounting",
    "batch_selection",
    "clipping",
    "denoising",
    "geometry",
    "baselines",
    "mechanism",
    "models",
    "data",
    "generation",
    "reporting",
    "training",
    "auditing",
    "finetuning",
]
# What no module may import: configs and flags stay at the door, torch is an oracle of tests.
FORBIDDEN = ("ml_collections", "absl.flags", "absl.app", "configs", "experiments", "tests", "torch")
# Ghost clipping replaces how the layers of a Flax model are differentiated
# (docs/design/0003-clipping-at-the-cost-of-a-gradient.md).
MAY_IMPORT_FLAX = {"models", "clipping"}
# The door that is installed, the console script; the others are in experiments/.
DOORS = {"dp_rmt.finetuning.console", "dp_rmt.finetuning.command_line"}
FLAGS = ("absl.flags", "absl.app")
PACKAGE = Path(dp_rmt.__file__).parent


def imported_names(source: str, module: str) -> set[str]:
    """Full dotted names of all that a module imports, wherever in it, relative imports resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parent, node.module] if node.module else parent)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, module: str) -> list[str]:
    """What `module` (dotted, `dp_rmt.floor...`) imports against the rules."""

    def within(name: str, package: str) -> bool:
        return name == package or name.startswith(package + ".")

    own = module.split(".")[1]
    found = []
    for name in sorted(imported_names(source, module)):
        if any(within(name, package) for package in FORBIDDEN if not (module in DOORS and package in FLAGS)):
            found.append(f"{module} imports {name}")
        elif within(name, "flax") and module.split(".")[1] not in MAY_IMPORT_FLAX:
            found.append(f"{module} imports {name}: only {sorted(MAY_IMPORT_FLAX)} may import flax")
        elif within(name, "dp_rmt"):
            floor = [*name.split("."), ""][1]
            if floor not in FLOORS:
                found.append(f"{module} imports {name}, which is on no floor")
            elif FLOORS.index(floor) > FLOORS.index(own):
                found.append(f"{module} imports {name} from a later floor")
            elif own == "random_matrix" and floor != own:
                found.append(f"{module} imports {name}: random_matrix stands alone")
    return found


def modules() -> dict[str, Path]:
    paths = {path.relative_to(PACKAGE.parent).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    # The package's own __init__ is the door to all floors; that of a floor counts as a module of it.
    return {".".join(name.parts): path for name, path in paths.items() if path != PACKAGE / "__init__.py"}


def test_every_module_is_on_a_floor():
    present = {name.split(".")[1] for name in modules()}
    assert present == set(FLOORS)
    assert {"clipping", "mechanism", "random_matrix"} <= present  # it looks at the right folder


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_come_from_earlier_floors(module):
    assert violations(modules()[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dp_rmt.clipping.per_example", "from dp_rmt import mechanism"),
        ("dp_rmt.clipping.per_example", "from dp_rmt.mechanism import DPSGD"),
        ("dp_rmt.clipping.per_example", "import dp_rmt.training.train"),
        ("dp_rmt.mechanism", "from . import training"),
        ("dp_rmt.mechanism", "from .models import SequenceClassifier"),
        ("dp_rmt.clipping.per_example", "from dp_rmt import clipped_grad"),  # through the front door
        ("dp_rmt.clipping.per_example", "import dp_rmt"),
        ("dp_rmt.models.layers", "from ..training import train"),
        ("dp_rmt.models.__init__", "from ..data import glue"),
        ("dp_rmt.random_matrix.shrinkage", "from dp_rmt.types import Params"),
        ("dp_rmt.training.train", "import flax.linen as nn"),
        ("dp_rmt.training.train", "from flax import struct"),
        ("dp_rmt.training.train", "def main():\n    import ml_collections"),
        ("dp_rmt.training.train", "from absl import flags"),
        ("dp_rmt.training.train", "from absl import app"),
        ("dp_rmt.finetuning.arms", "from absl import flags"),
        ("dp_rmt.finetuning.console", "from ml_collections import ConfigDict"),
        ("dp_rmt.training.train", "import configs.sst2"),
        ("dp_rmt.training.train", "from experiments import finetune"),
        ("dp_rmt.models.huggingface.folder", "import torch"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dp_rmt.mechanism", "from dp_rmt import clipping, denoising\nfrom dp_rmt.types import Params"),
        ("dp_rmt.models.layers", "import flax.linen as nn\nfrom . import heads\nfrom .heads import Head"),
        ("dp_rmt.training.train", "from absl import logging\nimport jax\nimport torchlike"),
        ("dp_rmt.random_matrix.shrinkage", "from dp_rmt.random_matrix import marchenko_pastur"),
        ("dp_rmt.finetuning.console", "from absl import app, flags"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations(source, module) == []


TESTS = Path(__file__).parents[1]


def of_tests(source: str) -> list[str]:
    """What is imported from a package `tests`: other distributions install one, and it may come first."""
    return sorted(name for name in imported_names(source, "module") if name.split(".")[0] == "tests")


def test_no_test_imports_from_a_package_called_tests():
    """What tests share they run from its path (`runpy.run_path`), as programs in processes of their own do."""
    paths = sorted(TESTS.rglob("*.py"))
    assert Path(__file__) in paths
    assert {str(path): found for path in paths if (found := of_tests(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source", ["import tests", "from tests import laws", "def test():\n    from tests.laws.transformations import run"]
)
def test_an_import_from_tests_is_found(source):
    assert len(of_tests(source)) == 1
