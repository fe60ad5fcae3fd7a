"""Rows divided among devices are continued as on one, each device on its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(run_on_devices: Callable[..., dict[int, dict[str, np.ndarray]]]) -> dict[int, dict[str, np.ndarray]]:
    """By number of devices."""
    return run_on_devices("generate_divided.py", 1, 2)


@pytest.mark.parametrize("kind", ["greedy", "beam", "sampling"])
def test_two_devices_give_the_result_of_one(kind: str, results: dict[int, dict[str, np.ndarray]]) -> None:
    names = [name for name in results[1] if name.startswith(f"{kind}/")]
    assert len(names) == 4
    for name in names:
        # Products of other sizes may sum in another order: float32 rounding of sums of about ten.
        np.testing.assert_allclose(results[2][name], results[1][name], rtol=1e-5, atol=1e-5, err_msg=name)
    lengths = results[2][f"{kind}/lengths_B"]
    assert lengths[3] == 0 < lengths[:3].min()


def test_devices_do_not_wait_for_each_other(results: dict[int, dict[str, np.ndarray]]) -> None:
    assert results[2]["collectives"].tolist() == [0, 0, 0]


def test_rows_that_the_devices_do_not_divide_are_refused(results: dict[int, dict[str, np.ndarray]]) -> None:
    assert str(results[2]["refusal"]).startswith("3 rows on 2 devices; give a multiple")
    assert "refusal" not in results[1]
