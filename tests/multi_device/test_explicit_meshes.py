"""Leaves whose sharding is part of their type are transformed as any others, and come out divided as they went in."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.thorough


CASES = runpy.run_path(str(Path(__file__).parents[1] / "laws" / "transformations.py"))["CASES"]


@pytest.fixture(scope="module")
def found(run_on_devices: Callable[..., dict[int, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    return run_on_devices("explicit_meshes.py", 2)[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_explicit_meshes(name: str, found: dict[str, np.ndarray]) -> None:
    assert found[f"{name}/sharding_kept"]
    assert found[f"{name}/state_kept"]
    paths = [key.removeprefix(f"{name}/plain/") for key in found if key.startswith(f"{name}/plain/")]
    assert paths
    for path in paths:
        plain, explicit = found[f"{name}/plain/{path}"], found[f"{name}/explicit/{path}"]
        # The same decompositions in another program; the last bits depend on how many a LAPACK call gets.
        np.testing.assert_allclose(explicit, plain, rtol=2e-3, atol=2e-4, err_msg=path)
