"""A clipped gradient that nobody jits is compiled once for each shape, and leaves nothing behind at each call."""

from __future__ import annotations

import gc
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad

MODEL = nn.Sequential([nn.Dense(8), nn.relu, nn.LayerNorm(), nn.Dense(3)])
X = np.random.default_rng(0).standard_normal((6, 4)).astype("float32")
MAPS = Path("/proc/self/maps")


def num_maps():
    return MAPS.read_text().count("\n")


@pytest.mark.skipif(not MAPS.exists(), reason="memory maps are listed by Linux alone")
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("way", [clipped_grad, ghost_clipped_grad])
def test_calls_leave_no_memory_maps_behind(way, microbatch_size):
    """A compiled program takes some; twenty calls took 2,000, of the 65,530 that Linux lets a process have."""
    traces = 0

    def losses(params, x):
        nonlocal traces
        traces += 1
        return jax.nn.logsumexp(MODEL.apply(params, x), axis=-1)

    params = MODEL.init(jax.random.key(0), X)
    function = way(losses, l2_clip_norm=1.0, microbatch_size=microbatch_size)
    first = jax.block_until_ready(function(params, X, is_padding_example=None))
    maps, traced = num_maps(), traces
    for _ in range(20):
        again = jax.block_until_ready(function(params, X, is_padding_example=None))
    assert num_maps() - maps < 10
    assert traces == traced
    jax.tree.map(np.testing.assert_array_equal, first, again)
    function(params, X[:4], is_padding_example=None)  # another shape is traced and compiled again
    assert traces > traced


@pytest.mark.slow
@pytest.mark.skipif(not MAPS.exists(), reason="memory maps are listed by Linux alone")
def test_functions_take_their_programs_with_them():
    """A new clipped gradient at every step, which compiles at every step, holds no more than one."""
    params = MODEL.init(jax.random.key(0), X)

    def call():
        function = ghost_clipped_grad(lambda p, x: MODEL.apply(p, x).sum(-1), l2_clip_norm=1.0)
        jax.block_until_ready(function(params, X, is_padding_example=None))
        del function
        gc.collect()
        return num_maps()

    maps = [call() for _ in range(5)]
    assert maps[-1] - maps[0] < 10
