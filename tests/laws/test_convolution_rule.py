"""Laws of the rule of convolutions: it equals explicit gradients, in every setting and in the corners of float32."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.clipping.convolution import Convolution
from dp_rmt.clipping.layer_rules import LAYER_RULES

SHAPE = (3, 7, 6, 4)
# Of a window over two axes of 7 and 6, and 4 features. Few features let the gradients be kept; many do not.
SETTINGS = {
    "same": {"features": 5, "kernel_size": (3, 2)},
    "valid": {"features": 5, "kernel_size": (3, 2), "padding": "VALID"},
    "even strides": {"features": 3, "kernel_size": (2, 2), "strides": 2},
    "uneven strides": {"features": 3, "kernel_size": (2, 3), "strides": (3, 2), "padding": "SAME"},
    "one patch": {"features": 6, "kernel_size": (7, 6), "padding": "VALID"},
    "pairs of patches": {"features": 90, "kernel_size": (6, 6), "padding": "VALID"},
    "numbers": {"features": 2, "kernel_size": (2, 2), "padding": (1, (0, 2))},
    "cut": {"features": 2, "kernel_size": (2, 2), "padding": ((-1, 0), (2, -1))},
    "dilated": {"features": 2, "kernel_size": (3, 2), "kernel_dilation": (2, 3)},
    "dilated input": {
        "features": 2,
        "kernel_size": (3, 2),
        "input_dilation": (2, 1),
        "strides": (1, 2),
        "padding": ((1, 2), 0),
    },
    "groups": {"features": 6, "kernel_size": (2, 2), "feature_group_count": 2},
    "depthwise": {"features": 4, "kernel_size": (3, 3), "feature_group_count": 4},
    "around": {"features": 2, "kernel_size": (3, 2), "padding": "CIRCULAR", "kernel_dilation": (1, 2)},
    "reflected": {"features": 2, "kernel_size": (3, 4), "padding": "REFLECT"},
    "causal": {"features": 5, "kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2},
    "one axis of two": {"features": 5, "kernel_size": 3},
}


def rule_of_kernel(module, x):
    return LAYER_RULES[nn.Conv, "__call__"].leaves(module, x)["kernel"]


def explicit_gradients(module, x, g):
    """The gradient of each example with respect to the kernel, by JAX's own derivative of its own convolution."""
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    kernel = jnp.zeros(params["kernel"].shape, x.dtype)

    def of_one(x, g):
        _, pull_back = jax.vjp(lambda kernel: module.apply({"params": {"kernel": kernel}}, x[None])[0], kernel)
        return pull_back(g)[0]

    return jax.vmap(of_one)(x, g)


@pytest.mark.parametrize("name", SETTINGS)
def test_rule_equals_explicit_gradients(name):
    module = nn.Conv(**SETTINGS[name], use_bias=False, param_dtype="float64", dtype="float64")
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal(SHAPE))
        shape = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x)[0], x).shape
        g, weights = jnp.asarray(rng.standard_normal(shape)), jnp.asarray([0.5, 0.0, -2.0])
        rule = rule_of_kernel(module, x)

        @jax.jit
        def both(x, g):
            explicit = explicit_gradients(module, x, g)
            return rule.squared_norm(x, g), rule.weighted_sum(x, g, weights), explicit

        norms, total, explicit = both(x, g)
        assert total.shape == explicit.shape[1:]
        # float64: some hundred products of size about 1, each rounded to 1e-16.
        np.testing.assert_allclose(norms, np.square(explicit).reshape(3, -1).sum(1), rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(total, np.einsum("b,b...->...", weights, explicit), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["same", "pairs of patches", "depthwise"])
def test_rule_in_the_corners_of_float32(name):
    """Inputs times 2^e, output gradients times 2^-e: the same gradients, to the last bits."""
    module = nn.Conv(**SETTINGS[name], use_bias=False)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(SHAPE)
    shape = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x)[0], x).shape
    g, weights = rng.standard_normal(shape), jnp.asarray([0.5, 0.0, -2.0])
    rule = rule_of_kernel(module, x)
    run = jax.jit(lambda x, g: (rule.squared_norm(x, g), rule.weighted_sum(x, g, weights)))
    norms, total = run(jnp.float32(x), jnp.float32(g))
    for exponent in (-110, -64, 61, 110):
        scaled = run(jnp.float32(x * 2.0**exponent), jnp.float32(g * 2.0**-exponent))
        np.testing.assert_allclose(scaled[0], norms, rtol=1e-4)
        np.testing.assert_allclose(scaled[1], total, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(total))))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["same", "pairs of patches"])
def test_an_example_that_is_not_finite_has_no_norm_and_adds_nothing(name, bad):
    module = nn.Conv(**SETTINGS[name], use_bias=False)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32).at[1, 3, 3, 0].set(bad)
    shape = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x)[0], x).shape
    g, rule = jnp.asarray(rng.standard_normal(shape), jnp.float32), rule_of_kernel(module, x)
    assert not np.isfinite(rule.squared_norm(x, g)[1])
    with_it = rule.weighted_sum(x, g, jnp.asarray([1.0, 0.0, 1.0]))
    without = rule.weighted_sum(x.at[1].set(0), g, jnp.asarray([1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(with_it, without)


def test_patches_are_copies():
    """Nothing is multiplied, so that a NaN stays where it is, and no accelerator cuts numbers to fewer bits."""
    rule = Convolution(
        windows=rule_of_kernel(nn.Conv(1, (2,), padding="VALID"), jnp.zeros((1, 4, 1))).windows,
    )
    patches = rule.patches(jnp.asarray([[[1e30], [np.nan], [3.0], [1e-40]]], jnp.float32))
    expected = np.float32([[1e30, np.nan], [np.nan, 3.0], [3.0, 1e-40]])
    np.testing.assert_array_equal(patches.reshape(3, 2), expected)
