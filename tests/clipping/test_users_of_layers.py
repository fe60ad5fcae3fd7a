"""Every kind of rule takes a user's rows as one more axis: sums and norms against gradients of each user."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad

USERS, ROWS, TOKENS, WIDTH = 3, 3, 5, 8


class Layers(nn.Module):
    """A tied table, learned positions, a convolution, a normalisation, and stacked layers."""

    @nn.compact
    def __call__(self, ids_BxT):
        table = nn.Embed(7, WIDTH)
        positions = self.param("positions", nn.initializers.normal(1.0), (1, TOKENS, WIDTH))
        x = nn.Conv(WIDTH, (3,))(table(ids_BxT) + positions)
        x = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)[0]
        return table.attend(nn.LayerNorm()(x))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        heads = nn.DenseGeneral((2, WIDTH // 2))(x)
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1))(nn.tanh(heads)), None


def losses(params, batch):
    logits = Layers().apply(params, batch["ids"])
    return -jnp.sum(jax.nn.log_softmax(logits)[..., 0], axis=1)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_fast_clipping_of_users_is_that_by_vmap(method):
    """Norms are rounded upwards by up to 1e-5; the clip norm is that of the middle user, so that one is not clipped."""
    batch = {"ids": np.random.default_rng(0).integers(0, 7, (USERS, ROWS, TOKENS))}
    is_padding = np.array([[0, 0, 0], [0, 1, 1], [0, 0, 1]], bool)
    params = Layers().init(jax.random.key(0), batch["ids"][0])
    norms = clipped_grad(losses, l2_clip_norm=1.0, unit="user")(params, batch, is_padding_example=is_padding)[1]
    options = {"l2_clip_norm": float(np.median(norms.grad_norm)), "unit": "user"}
    expected, reference = clipped_grad(losses, **options)(params, batch, is_padding_example=is_padding)
    found, per_user = ghost_clipped_grad(losses, method=method, **options)(params, batch, is_padding_example=is_padding)
    np.testing.assert_allclose(per_user.grad_norm, reference.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(per_user.loss, reference.loss, rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), found, expected)
