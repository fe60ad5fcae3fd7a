"""The noise of a divided leaf, bit for bit that of a whole one, drawn where it is needed: nothing is sent."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.thorough

LEAVES = ("matrix", "stack", "odd")


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def divided(run_on_devices, request):
    """As XLA compiles without the flags that make other tests quick: with them, an explicit mesh rounds otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        return run_on_devices("noise_divided.py", request.param)[request.param]


def test_noise_is_the_same_for_every_mesh_and_layout(divided):
    layouts = {path.split("/")[0] for path in divided if path.endswith("/collectives")}
    assert len(layouts) == 16 + 4
    for layout in layouts:
        assert divided[f"{layout}/collectives"].tolist() == [], layout
        for name in LEAVES:
            whole, found = divided[f"whole {layout.split()[0]}/{name}"], divided[f"{layout}/{name}"]
            np.testing.assert_array_equal(found, whole, err_msg=f"{layout} {name}")


def test_correlated_noise_is_the_same_too(divided):
    layouts = {path.split("/")[0] for path in divided if "/correlated/" in path}
    assert len(layouts) == 4
    for layout in layouts:
        for name in LEAVES:
            whole, found = divided[f"whole correlated/{name}"], divided[f"{layout}/correlated/{name}"]
            np.testing.assert_array_equal(found, whole, err_msg=f"{layout} {name}")
