"""The gates: what they keep, what they promise to whoever looks for components, what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.denoising.gates import Kappa, TracyWidom
from dp_rmt.random_matrix import marchenko_pastur, shrinkage, tracy_widom

SHAPE = {"rows": 40, "cols": 90, "noise_std": 0.5}
EDGE = marchenko_pastur.bulk_edge(**SHAPE)
GATES = [
    Kappa(0.0),
    Kappa(0.7, per="component"),
    Kappa(1.0),
    Kappa(1.3),
    Kappa(1.3, per="component"),
    TracyWidom(),
    TracyWidom(0.1, per="component"),
    TracyWidom(1e-9, per="component"),
]


def test_kappa_compares_with_a_multiple_of_the_edge():
    values = jnp.array([[2.1, 1.9, 0.5], [1.9, 1.9, 0.5]]) * EDGE
    assert Kappa(2.0).threshold(**SHAPE) == pytest.approx(2 * EDGE, rel=1e-12)
    np.testing.assert_array_equal(Kappa(2.0).passes(values, **SHAPE), [[True] * 3, [False] * 3])
    np.testing.assert_array_equal(
        Kappa(2.0, per="component").passes(values, **SHAPE), [[True, False, False], [False] * 3]
    )


def test_tracy_widom_compares_with_the_quantile_of_pure_noise():
    expected = tracy_widom.largest_singular_value_quantile(0.98, **SHAPE)
    gate = TracyWidom(0.02, per="component")
    assert gate.threshold(**SHAPE) == expected
    assert EDGE < expected < 1.2 * EDGE
    values = jnp.array([[1.001, 0.999]]) * expected
    np.testing.assert_array_equal(gate.passes(values, **SHAPE), [[True, False]])
    np.testing.assert_array_equal(TracyWidom(0.02).passes(values, **SHAPE), [[True, True]])


def test_fewer_false_alarms_need_a_higher_threshold():
    thresholds = [TracyWidom(rate).threshold(**SHAPE) for rate in (0.1, 0.05, 0.01, 1e-3, 1e-6, 1e-9)]
    assert np.all(np.diff(thresholds) > 0)


@settings(max_examples=40, deadline=None)
@given(
    gate=st.sampled_from(GATES),
    shrinker=st.sampled_from([shrinkage.frobenius, shrinkage.operator, shrinkage.nuclear, shrinkage.hard_threshold]),
    ratios=st.lists(st.floats(0.0, 3.0, width=32), min_size=12, max_size=12),
)
def test_nothing_is_kept_at_or_below_the_cut(gate, shrinker, ratios):
    values = jnp.sort(jnp.array([ratios]), descending=True) * EDGE
    kept = gate.passes(values, **SHAPE) & (shrinker(values, **SHAPE) > 0)
    cut = gate.cut(**SHAPE)
    # A cut that rounds to the next float32 below a kept value is still one for float32 values.
    assert not np.any(kept & (values <= np.float32(cut)))


@pytest.mark.parametrize("gate", GATES)
def test_what_stands_just_above_the_cut_is_kept(gate):
    # Beside a value that opens every gate per layer. A higher cut would miss this one.
    cut = gate.cut(**SHAPE)
    values = jnp.array([[5 * EDGE, 1.0001 * cut]])
    kept = gate.passes(values, **SHAPE) & (shrinkage.frobenius(values, **SHAPE) > 0)
    np.testing.assert_array_equal(kept, [[True, True]])


@pytest.mark.parametrize("gate", GATES)
def test_the_leading_values_suffice_and_the_noise_level_may_be_traced(gate):
    values = jnp.linspace(3.0, 0.1, 40)[None] * EDGE
    whole = gate.passes(values, **SHAPE)

    @jax.jit
    def traced(std):
        shape = SHAPE | {"noise_std": std}
        return gate.passes(values[:, :7], **shape), gate.cut(**shape), gate.threshold(**shape)

    leading, cut, threshold = traced(jnp.float32(SHAPE["noise_std"]))
    np.testing.assert_array_equal(leading, whole[:, :7])
    assert float(cut) == pytest.approx(gate.cut(**SHAPE), rel=1e-6)
    assert float(threshold) == pytest.approx(gate.threshold(**SHAPE), rel=1e-6)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1e-10, 0.11, 0.17, 1.0, float("nan")])
def test_a_rate_that_would_not_be_what_it_says_is_refused(rate):
    with pytest.raises(ValueError, match="false_alarm must be from"):
        TracyWidom(rate)


@pytest.mark.parametrize("shape", [(8, 8), (8, 4096), (64, 64), (768, 768)])
def test_the_highest_rate_is_reached_above_the_edge(shape):
    # The reason for the limit of 0.1: below the edge the threshold would have no effect. 8 x 8 just fails to reach it.
    rows, cols = shape
    edge = marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=1.0)
    assert TracyWidom(0.1).threshold(rows=rows, cols=cols, noise_std=1.0) > 0.999 * edge


@pytest.mark.parametrize("gate", [Kappa, TracyWidom])
def test_wrong_options_are_refused(gate):
    with pytest.raises(ValueError, match="per 'layer' or per 'component'"):
        gate(per="matrix")
    with pytest.raises(ValueError, match=r"must be (at least 0|from 1e-09)"):
        gate(-0.1)


def test_gates_are_values():
    assert TracyWidom(0.01) == TracyWidom() != TracyWidom(0.02)
    assert {Kappa(1.0): 1}[Kappa()] == 1
