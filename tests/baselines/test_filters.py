"""Filters over steps against the recursions of their papers, written out in NumPy, and against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.baselines.filters import kalman_filter, low_pass_filter, without_look_ahead

DEFAULT = ((1 / 11, 1 / 11), (1.0, -9 / 11))
FILTERS = [
    DEFAULT,
    ((0.15, -0.05), (1.0, -0.9)),
    ((0.05, 0.05), (1.0, -0.7, -0.2)),
    ((0.3,), (1.0, -0.5, 0.2)),
    ((0.5, 0.3, 0.2), (1.0,)),
]
STEPS = 12


def run(transform, inputs):
    """Outputs of a transformation for a tree whose leaves are sequences along their first axis."""

    def body(state, x):
        y, state = transform.update(x, state)
        return state, y

    state = transform.init(jax.tree.map(lambda x: x[0], inputs))
    return jax.lax.scan(body, state, inputs)[1]


def sequences(seed=0, steps=STEPS):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal((steps, 3)).astype(np.float32),
        "b": [rng.standard_normal((steps, 2, 2)).astype(np.float32)],
    }


def brute_force_low_pass(numerator, denominator, g):
    """DOPPLER's recursion as its paper has it: all values of the past kept, nothing before the first step."""
    m, c = [], []
    for t in range(len(g)):
        m.append(np.zeros_like(g[0], np.float64))
        c.append(0.0)
        for k, b in enumerate(numerator):
            if t >= k:
                m[t] = m[t] + b * g[t - k]
                c[t] += b
        for k, a in enumerate(denominator):
            if t >= k > 0:
                m[t] = m[t] - a * m[t - k]
                c[t] -= a * c[t - k]
    return np.stack([x / y for x, y in zip(m, c)])


@pytest.mark.parametrize(("numerator", "denominator"), FILTERS)
def test_low_pass_filter_is_the_recursion_with_bias_correction(numerator, denominator):
    inputs = sequences()
    outputs = run(low_pass_filter(numerator, denominator), inputs)
    expected = jax.tree.map(lambda g: brute_force_low_pass(numerator, denominator, g), inputs)
    jax.tree.map(lambda y, x: np.testing.assert_allclose(y, x, atol=3e-6), outputs, expected)


def test_an_exponential_average_is_the_special_case():
    inputs = sequences()
    outputs = run(low_pass_filter((0.1,), (1.0, -0.9)), inputs)
    expected = run(optax.ema(0.9, debias=True), inputs)
    jax.tree.map(lambda y, x: np.testing.assert_allclose(y, x, atol=2e-6), outputs, expected)


@pytest.mark.parametrize(("numerator", "denominator"), FILTERS)
def test_a_constant_passes_unchanged_at_every_step(numerator, denominator):
    outputs = run(low_pass_filter(numerator, denominator), jnp.full((40, 2), 3.0))
    np.testing.assert_allclose(outputs, 3.0, rtol=2e-6)


def test_the_filters_are_linear():
    x, y = sequences(1)["a"], sequences(2)["a"]
    for filtered in (low_pass_filter(), kalman_filter(optax.identity())):
        both = run(filtered, 2 * x - 3 * y)
        np.testing.assert_allclose(both, 2 * run(filtered, x) - 3 * run(filtered, y), atol=2e-5)


def test_white_noise_loses_what_theory_says():
    noise = np.random.default_rng(3).standard_normal((60, 20_000)).astype(np.float32)
    # 2 b^2 / (1 - p), the squared impulse response b, b (1 + p), b (1 + p) p ... summed, with b = 1 / 11, p = 9 / 11.
    left = run(low_pass_filter(), noise)[-1].var()
    np.testing.assert_allclose(left, 1 / 11, rtol=0.05)  # the standard deviation of this estimate is 1%
    np.testing.assert_allclose(estimates(noise, 0.7)[-1].var(), 0.7 / 1.3, rtol=0.05)


def test_the_default_blocks_the_highest_frequency_and_halves_the_cut_off():
    steps = np.arange(400)
    alternating = run(low_pass_filter(), (1 - 2 * (steps[:, None] % 2)).astype(np.float32))
    np.testing.assert_allclose(alternating[200:], 0.0, atol=1e-5)  # the zero of the numerator
    cut_off = 2 * np.arctan(0.1)
    waves = np.stack([np.cos(cut_off * steps), np.sin(cut_off * steps)], axis=1).astype(np.float32)
    power = np.sum(np.square(run(low_pass_filter(), waves)[200:]), axis=1)
    np.testing.assert_allclose(power, 0.5, rtol=1e-4)


def test_the_default_keeps_one_copy_in_float32():
    state = low_pass_filter().init(jnp.zeros(5, jnp.bfloat16))
    assert [(x.shape, x.dtype) for x in state.delays] == [((5,), jnp.float32)]
    assert low_pass_filter((1.0,), (1.0,)).init(jnp.zeros(5)).delays == ()


@pytest.mark.parametrize(
    ("numerator", "denominator", "complaint"),
    [
        ((1.0,), (1.0, -1.0), "unstable"),
        ((1.0,), (2.0, -1.0), "first being 1"),
        ((), (1.0,), "finite coefficients"),
        ((np.nan,), (1.0,), "finite coefficients"),
        ((0.0, 1.0), (1.0,), "at step 0"),
        ((1.0, -1.5), (1.0,), "at step 1"),
    ],
)
def test_low_pass_filter_refuses(numerator, denominator, complaint):
    with pytest.raises(ValueError, match=complaint):
        low_pass_filter(numerator, denominator)


def estimates(noisy, kappa):
    """What the Kalman filter hands to its optimizer, whatever the parameters do."""

    def body(state, r):
        _, state = filtered.update(r, state)
        return state, state.estimate

    filtered = kalman_filter(optax.identity(), kappa=kappa)
    return jax.lax.scan(body, filtered.init(noisy[0]), noisy)[1]


def curved_gradient(x):
    """Of a function that is not quadratic."""
    return jnp.sinh(x) + 0.3 * jnp.flip(x, -1)


def train(filtered, gradient, x, noise):
    """The loop's parameters and the iterates after every step."""

    def body(carry, w):
        params, state = carry
        updates, state = filtered.update(gradient(params) + w, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, without_look_ahead(state, params))

    return jax.lax.scan(body, (x, filtered.init(x)), noise)[1]


@pytest.mark.parametrize("kappa", [0.3, 0.7, 1.0])
def test_kalman_filter_is_the_papers_recursion_with_the_iterate_kept(kappa):
    rng = np.random.default_rng(4)
    x0, noise = rng.standard_normal(6), 0.3 * rng.standard_normal((STEPS, 6))
    rates, decay = np.linspace(0.2, 0.05, STEPS), 0.1
    gamma = (1 - kappa) / kappa
    x, d, g, expected, ahead = x0, np.zeros(6), None, [], []
    for t in range(STEPS):
        r = np.asarray(curved_gradient(x + gamma * d)) + noise[t]
        g = r if g is None else (1 - kappa) * g + kappa * r
        d = -rates[t] * (g + decay * x)  # weight decay at the iterate, not at the point ahead
        x = x + d
        expected.append(x)
        ahead.append(x + gamma * d)
    optimizer = optax.chain(
        optax.add_decayed_weights(decay), optax.scale_by_learning_rate(lambda t: jnp.asarray(rates)[t])
    )
    filtered = kalman_filter(optimizer, kappa=kappa)
    params, iterates = train(filtered, curved_gradient, jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32))
    np.testing.assert_allclose(iterates, np.stack(expected), atol=1e-5)
    np.testing.assert_allclose(params, np.stack(ahead), atol=1e-5)


def test_kalman_filter_predicts_a_quadratic_exactly():
    """Without noise its estimate is the gradient at the iterate, so the path is that of the optimizer alone."""
    rng = np.random.default_rng(5)
    root = rng.standard_normal((6, 6))
    hessian = jnp.asarray(root @ root.T / 6, jnp.float32)
    x, silence = jnp.asarray(rng.standard_normal(6), jnp.float32), jnp.zeros((STEPS, 6))
    _, iterates = train(kalman_filter(optax.adam(0.1), kappa=0.4), lambda y: hessian @ y, x, silence)
    plain, _ = train(kalman_filter(optax.adam(0.1), kappa=1.0), lambda y: hessian @ y, x, silence)
    np.testing.assert_allclose(iterates, plain, atol=2e-5)
    lagging, _ = train_plain(optax.chain(optax.ema(0.6), optax.adam(0.1)), lambda y: hessian @ y, x, silence)
    assert np.abs(np.asarray(lagging) - np.asarray(plain)).max() > 1e-2


def train_plain(optimizer, gradient, x, noise):
    def body(carry, w):
        params, state = carry
        updates, state = optimizer.update(gradient(params) + w, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, params)

    return jax.lax.scan(body, (x, optimizer.init(x)), noise)[1]


def test_with_a_gain_of_one_the_optimizer_is_alone():
    x = jnp.arange(1.0, 5.0)
    noise = jnp.asarray(np.random.default_rng(6).standard_normal((STEPS, 4)), jnp.float32)
    params, iterates = train(kalman_filter(optax.adam(0.1), kappa=1.0), curved_gradient, x, noise)
    expected, _ = train_plain(optax.adam(0.1), curved_gradient, x, noise)
    np.testing.assert_array_equal(params, iterates)
    np.testing.assert_allclose(params, expected, rtol=1e-6)


def test_without_the_point_ahead_it_is_an_exponential_average():
    noisy = sequences(7)["a"]
    expected = [noisy[0]]
    for r in noisy[1:]:
        expected.append(0.3 * expected[-1] + 0.7 * r)
    np.testing.assert_allclose(estimates(noisy, 0.7), np.stack(expected), atol=1e-6)


def test_kalman_filter_works_on_trees_and_keeps_float32():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": [jnp.ones((2, 2))]}
    filtered = kalman_filter(optax.sgd(0.1))
    updates, state = jax.jit(filtered.update)(params, filtered.init(params), params)
    assert [x.shape for x in updates["b"]] == [(2, 2)]
    assert {x.dtype for x in jax.tree.leaves((state.estimate, state.look_ahead))} == {jnp.dtype(jnp.float32)}
    assert without_look_ahead(state, params)["a"].dtype == jnp.bfloat16


def test_the_iterate_is_found_whatever_is_around_the_filter():
    params, gradient = {"a": jnp.ones(3)}, {"a": jnp.arange(3.0)}
    alone = kalman_filter(optax.sgd(0.1), kappa=0.5)
    inside = optax.chain(optax.snapshot("seen", lambda updates: updates), alone)
    updates, state = alone.update(gradient, alone.init(params), params)
    _, nested = inside.update(gradient, inside.init(params), params)
    ahead = optax.apply_updates(params, updates)
    expected = params["a"] - 0.1 * gradient["a"]
    np.testing.assert_allclose(without_look_ahead(state, ahead)["a"], expected, rtol=1e-6)
    np.testing.assert_array_equal(without_look_ahead(nested, ahead)["a"], without_look_ahead(state, ahead)["a"])
    assert without_look_ahead(optax.sgd(0.1).init(params), ahead) is ahead


@pytest.mark.parametrize("kappa", [0.0, -1.0, 1.1, float("nan")])
def test_kalman_filter_refuses(kappa):
    with pytest.raises(ValueError, match="kappa must be above 0"):
        kalman_filter(optax.sgd(0.1), kappa=kappa)
