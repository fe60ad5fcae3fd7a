"""The noise of a divided leaf, bit for bit that of a whole one, drawn where it is needed: nothing is sent."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.noise_addition import add_gaussian_noise, noise_key

pytestmark = pytest.mark.thorough


PROGRAM = Path(__file__).parent / "noise_divided.py"


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def divided(run_on_devices, request):
    return run_on_devices(PROGRAM.name, request.param)[request.param]


@pytest.fixture(scope="module")
def whole():
    shapes = runpy.run_path(str(PROGRAM))["SHAPES"]
    zeros, found = {name: jnp.zeros(shape) for name, shape in shapes.items()}, {}
    for generator in ("threefry2x32", "chacha20"):
        noise = add_gaussian_noise(1.0, noise_key(9, generator))
        found[generator] = jax.jit(noise.update)(zeros, noise.init(zeros))[0]
    return found


def test_noise_is_the_same_for_every_mesh_and_layout(divided, whole):
    layouts = {path.split("/")[0] for path in divided if "/" in path}
    assert len(layouts) == 16 + 4
    for layout in layouts:
        assert divided[f"{layout}/collectives"].tolist() == [], layout
        for name, expected in whole[layout.split()[0]].items():
            np.testing.assert_array_equal(divided[f"{layout}/{name}"], expected, err_msg=f"{layout} {name}")


def test_correlated_noise_is_the_same_too(divided):
    """But for rounding: the sums of a history can end in other bits in another program."""
    program = runpy.run_path(str(PROGRAM))
    expected = program["second_step"]({name: jnp.zeros(shape) for name, shape in program["SHAPES"].items()})
    layouts = {path.split("/")[0] for path in divided if "/correlated/" in path}
    assert len(layouts) == 4
    for layout in layouts:
        for name, whole in expected.items():
            found = divided[f"{layout}/correlated/{name}"]
            # A few sums of numbers below 4, each right to 2.4e-7; another key, step or history is off by 1.
            np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6, err_msg=f"{layout} {name}")
