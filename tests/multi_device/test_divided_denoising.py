"""Matrices divided among devices are denoised as on one, and none is lost where the devices do not divide them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def results(run_on_devices: Callable[..., dict[int, dict[str, np.ndarray]]]) -> dict[int, dict[str, np.ndarray]]:
    """By number of devices."""
    return run_on_devices("denoise_divided.py", 1, 4)


@pytest.mark.parametrize(
    ("kind", "where"), [("gram", ""), ("subspace", ""), ("moment", ""), ("subspace", "divided_leaves/")]
)
def test_four_devices_give_the_result_of_one(kind: str, where: str, results: dict[int, dict[str, np.ndarray]]) -> None:
    names = [name for name in results[1] if name.startswith(f"{kind}/")]
    assert {name.split("/")[1] for name in names} == {"0", "1", "2"}
    assert any("kept_rank" in name and results[1][name].any() for name in names)
    for name in names:
        # The same decompositions of the same matrices; the last bits depend on how many a LAPACK call gets.
        np.testing.assert_allclose(results[4][where + name], results[1][name], rtol=2e-3, atol=2e-4, err_msg=name)


def test_divided_leaves_are_exchanged_and_not_gathered(results: dict[int, dict[str, np.ndarray]]) -> None:
    """What is gathered are diagnostics and the starts of the search; copied leaves are, all of them."""
    leaves = sum(results[4][f"subspace/0/out/{name}/kernel"].nbytes for name in "ab")
    assert results[4]["gathered/subspace"] > leaves
    assert results[4]["divided_leaves/gathered/subspace"] < 0.3 * leaves
