"""The root of `experiments/` has doors alone, which read flags; what they compute stands in a room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import experiments

DOORS = sorted(Path(experiments.__file__).parent.glob("[!_]*.py"))
LONGEST = 60


def test_all_doors_are_looked_at() -> None:
    assert {path.stem for path in DOORS} == {
        "finetune",
        "sweep",
        "audit",
        "learning_rates",
        "spent",
        "units",
        "noise_bands",
    }


@pytest.mark.parametrize("path", DOORS, ids=lambda path: path.stem)
def test_a_door_is_short_and_defines_no_more_than_its_main(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST
    defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert defined <= {"main"}
