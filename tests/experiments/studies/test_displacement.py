"""What a run has moved, split at the edge of its own noise, and the record of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.random_matrix import marchenko_pastur
from experiments.studies.displacement import study as displacement
from experiments.studies.spectra.gradient_stream import GradientStream

ROWS, COLS, STD = 48, 96, 0.02


def moved(strengths: list[float]) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """``(params, start, signal)``: matrices that moved by one component each, in units of the threshold, and noise."""
    rng = np.random.default_rng(0)
    threshold = marchenko_pastur.detection_threshold(rows=ROWS, cols=COLS, noise_std=STD)
    u, v = (rng.standard_normal((len(strengths), side)) for side in (ROWS, COLS))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    signal = np.array(strengths)[:, None, None] * threshold * u[:, :, None] * v[:, None, :]
    began = rng.standard_normal(signal.shape)
    kernel = began + signal + STD * rng.standard_normal(signal.shape)
    frozen = rng.standard_normal((ROWS, COLS))
    start = {"layers": {"kernel": jnp.asarray(began), "bias": jnp.zeros(3)}, "frozen": {"kernel": jnp.asarray(frozen)}}
    params = {"layers": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(3)}, "frozen": start["frozen"]}
    return params, start, signal


def test_the_part_above_is_the_signal_where_it_shows_and_the_parts_add_up() -> None:
    params, start, signal = moved([4.0, 0.3])
    split = displacement.split_displacement(params, start)
    kernel, began = params["layers"]["kernel"], start["layers"]["kernel"]
    above, below = (np.asarray(tree["layers"]["kernel"] - began) for tree in (split.above, split.below))
    np.testing.assert_allclose(above + below, kernel - began, atol=1e-6)
    cosine = np.vdot(above[0], signal[0]) / np.linalg.norm(above[0]) / np.linalg.norm(signal[0])
    assert cosine > 0.9
    assert not above[1].any()  # a signal below the threshold does not show
    assert list(split.kept_rank) == [1, 0]  # the frozen matrix is not counted
    assert split.top_over_edge[0] > 1.5
    assert split.top_over_edge[1] == pytest.approx(1, abs=0.1)
    for tree in (split.above, split.below):
        np.testing.assert_array_equal(tree["layers"]["bias"], params["layers"]["bias"])
        np.testing.assert_array_equal(tree["frozen"]["kernel"], params["frozen"]["kernel"])


@pytest.mark.slow
def test_a_run_is_scored_as_a_whole_and_in_parts(make_config: Callable[..., Any]) -> None:
    config = make_config({"denoise": (), "train.learning_rate": 1e-2})
    stream = GradientStream.build(config, arm="small", seed=0, num_steps=2)
    start = jax.tree.map(np.array, stream.run.published_params(stream.run.state))
    original, after = stream.steps, []

    def copying():
        for seen in original():
            after.append(jax.tree.map(np.array, seen.params))
            yield seen

    object.__setattr__(stream, "steps", copying)
    (row,) = displacement.record_run(stream, {2})
    assert row["step"] == 2
    split = displacement.split_displacement(after[1], start)
    (evaluate,) = stream.run.loop.evaluators.values()
    for part, params in (("whole", after[1]), ("above", split.above), ("below", split.below)):
        assert row[part]["dev/loss"] == pytest.approx(evaluate(params)["loss"], rel=1e-4)
    assert row["above"]["dev/loss"] != row["whole"]["dev/loss"]
