"""Second moments of what layers see, against activations and gradients taken one by one."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.geometry import layer_moments, top_shares


class Stack(nn.Module):
    """Two scanned layers, then attention's reshaped matrices and a head that sees one token."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda module, h, _: (jnp.tanh(module(h)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        h, _ = layers(nn.Dense(4, name="layers"), x, None)
        h = nn.DenseGeneral((2, 3), name="heads")(h)
        h = nn.DenseGeneral(4, axis=(-2, -1), name="joined")(h)
        return nn.Dense(1, name="head")(h[:, 0])[:, 0]


@pytest.fixture(scope="module")
def seen():
    """Parameters and rows, and by hand what each layer saw and the gradient of its output."""
    model, x = Stack(), jax.random.normal(jax.random.key(0), (3, 5, 4))
    params = model.init(jax.random.key(1), x)["params"]
    kernels, biases = params["layers"]["kernel"], params["layers"]["bias"]

    def by_hand(added):
        inputs, h = [], x
        for i in range(2):
            inputs.append(h)
            h = jnp.tanh(h @ kernels[i] + biases[i] + added[i])
        inputs.append(h)
        heads = jnp.einsum("btd,dhk->bthk", h, params["heads"]["kernel"]) + params["heads"]["bias"] + added[2]
        inputs.append(heads)
        joined = jnp.einsum("bthk,hkd->btd", heads, params["joined"]["kernel"]) + params["joined"]["bias"] + added[3]
        inputs.append(joined[:, 0])
        out = joined[:, 0] @ params["head"]["kernel"] + params["head"]["bias"] + added[4]
        return jnp.sum(out[:, 0] ** 2), inputs

    shapes = [(3, 5, 4), (3, 5, 4), (3, 5, 2, 3), (3, 5, 4), (3, 1)]
    (_, inputs), grads = jax.value_and_grad(by_hand, has_aux=True)([jnp.zeros(s) for s in shapes])
    losses = lambda params, x: model.apply({"params": params}, x) ** 2  # noqa: E731
    return losses, params, x, inputs, grads


def flat(a, tokens):
    return np.asarray(a, np.float64).reshape(int(np.prod(a.shape[:tokens])), -1)


def with_one(rows):
    """The bias is the weight of an input that is 1."""
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


def test_moments_are_those_of_inputs_and_output_gradients(seen):
    losses, params, x, inputs, grads = seen
    moments = layer_moments(losses, params, [x], outputs=True)
    tokens = {"heads": 2, "joined": 2, "head": 1}
    for number, name in enumerate(("heads", "joined", "head"), start=2):
        a, g = with_one(flat(inputs[number], tokens[name])), flat(grads[number], tokens[name])
        np.testing.assert_allclose(moments[f"{name}/kernel"].inputs, a.T @ a, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(moments[f"{name}/kernel"].outputs, g.T @ g, rtol=2e-5, atol=1e-6)
    moment = moments["layers/kernel"]
    assert moment.bias == "layers/bias"
    for layer in range(2):
        a, g = with_one(flat(inputs[layer], 2)), flat(grads[layer], 2)
        np.testing.assert_allclose(moment.inputs[layer], a.T @ a, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(moment.outputs[layer], g.T @ g, rtol=2e-5, atol=1e-6)


def test_axes_are_those_of_inputs_and_outputs(seen):
    losses, params, x, _, _ = seen
    moments = layer_moments(losses, params, [x])
    assert (moments["joined/kernel"].row_axes, moments["joined/kernel"].col_axes) == ((-3, -2), (-1,))
    assert (moments["heads/kernel"].row_axes, moments["heads/kernel"].col_axes) == ((-3,), (-2, -1))
    assert moments["heads/kernel"].outputs is None


def test_batches_add_up_whatever_their_shapes(seen):
    losses, params, x, _, _ = seen
    whole = layer_moments(losses, params, [x, x[:, :3]])
    parts = [layer_moments(losses, params, [part]) for part in (x, x[:, :3])]
    for path, moment in whole.items():
        np.testing.assert_allclose(moment.inputs, sum(part[path].inputs for part in parts), rtol=1e-6)


def test_the_top_share_is_one_where_all_inputs_are_the_same():
    model = nn.Dense(2, use_bias=False)
    losses = lambda params, x: model.apply(params, x).sum(-1)  # noqa: E731
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    same = layer_moments(losses, params, [jnp.ones((4, 3))])
    assert top_shares(same)["params/kernel"] == pytest.approx(1)
    spread = layer_moments(losses, params, [jnp.eye(3)])
    assert top_shares(spread)["params/kernel"] == pytest.approx(1 / 3)


def test_no_batches_no_matrices_and_broken_values_are_refused(seen):
    losses, params, x, _, _ = seen
    with pytest.raises(ValueError, match="at least one batch"):
        layer_moments(losses, params, [])
    with pytest.raises(ValueError, match="some layer's matrix has a rule"):
        layer_moments(lambda w, x: (x @ w)[:, 0], jnp.ones((4, 1)), [x[:, 0]])
    with pytest.raises(ValueError, match="not finite"):
        layer_moments(losses, params, [x.at[0].set(jnp.inf)])


def test_frozen_parameters_are_no_constants_of_the_program(seen):
    """JAX warns of constants, and warnings are errors here."""
    losses, params, x, _, _ = seen
    frozen, trained = {"layers": params["layers"]}, {name: params[name] for name in ("heads", "joined", "head")}
    whole = layer_moments(losses, params, [x])
    jax.config.update("jax_captured_constants_warn_bytes", 64)
    try:
        found = layer_moments(losses, trained, [x], frozen=frozen)
        with pytest.warns(UserWarning, match="constants were captured"):
            layer_moments(lambda params, x: losses(params | frozen, x), trained, [x])
    finally:
        jax.config.update("jax_captured_constants_warn_bytes", 2_000_000_000)
    assert sorted(found) == [path for path in sorted(whole) if not path.startswith("layers")]
    for path, moments in found.items():
        np.testing.assert_array_equal(moments.inputs, whole[path].inputs)
