"""Dropout for per-example gradients. The mask of an example depends on that example's key and on nothing else."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dp_rmt.random_bits import words_of_entries


def example_keys(key: jax.Array, examples: jax.typing.ArrayLike) -> jax.Array:
    """Makes a key for each example of a batch, to be a leaf of the batch.

    The keys are ``keys_i = fold_in(key, examples_i)``. An example's key is the same wherever it stands in the batch.
    The presence of another example therefore moves its place alone, and not its mask.

    Args:
      key: the key of one step, such as ``jax.random.fold_in(key, step)``. It may be public, since the clip norm bounds
        what an example adds for every choice of masks.
      examples: (batch,) integers, the examples' numbers in the data set, such as those of `PoissonSampling.indices`.

    Returns:
      Typed keys, (batch,).

    >>> example_keys(jax.random.key(0), jnp.array([7, 2, -1])).shape
    (3,)
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(examples))


class PerExampleDropout(nn.Module):
    """`flax.linen.Dropout` with a mask for each example, the same in `clipped_grad` and `ghost_clipped_grad`.

    ``y_i = x_i * keep_i / (1 - rate)`` (Srivastava et al. 2014) with ``keep_i ~ Bernoulli(1 - rate)``, to 2^-32, drawn
    from ``fold_in(keys_i, place)``, where ``place`` tells apart the dropouts of a model. Like the key of `nn.Dropout`,
    the place comes from flax's random numbers for "dropout". Give ``rngs={"dropout": key}`` with any key, the same for
    all examples. Under `nn.scan`, split it (``split_rngs={"dropout": True}``), so that each layer has its own masks.

    Attributes:
      rate: the probability that an entry becomes zero, in [0, 1).

    >>> x, keys = jnp.ones((4, 6)), example_keys(jax.random.key(0), jnp.arange(4))
    >>> drop = lambda x, keys: PerExampleDropout(0.5).apply({}, x, keys, rngs={"dropout": jax.random.key(0)})
    >>> bool((drop(x, keys)[2:3] == drop(x[2:3], keys[2:3])).all())
    True
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Drops entries of x.

        Args:
          x: (batch, ...).
          keys: typed threefry keys (batch,), a leaf of the batch (see `example_keys`). None drops nothing, as in
            evaluation.

        Returns:
          An array of the shape of x.

        Raises:
          ValueError: the rate is out of range, or there is not one threefry key for each example.
        """
        if not 0 <= self.rate < 1:
            raise ValueError(f"the rate of PerExampleDropout must be in [0, 1), got {self.rate}")
        if keys is None or self.rate == 0:
            return x
        _check_keys(keys, x)
        place = jax.random.bits(self.make_rng("dropout"))
        kept = jnp.uint32(min(round((1 - self.rate) * 2**32), 2**32 - 1))

        def keep(key: jax.Array) -> jax.Array:
            word, _ = words_of_entries(jax.random.fold_in(key, place), x.shape[1:])
            return word < kept

        return jnp.where(jax.vmap(keep)(keys), x / (1 - self.rate), 0)


def _check_keys(keys: jax.Array, x: jax.Array) -> None:
    is_key = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not is_key or keys.shape != x.shape[:1]:
        raise ValueError(
            f"PerExampleDropout needs a typed key for each of the {x.shape[:1]} examples, got {keys.dtype} of shape "
            f"{keys.shape}: make `keys` a leaf of the batch, by dp_rmt.models.example_keys(key, indices)"
        )
    generator = str(jax.random.key_impl(keys))
    if generator != "threefry2x32":
        raise ValueError(
            f"PerExampleDropout needs threefry keys, got {generator}: under jax.vmap that generator draws all masks "
            "from the first key, so that one example decides what is dropped of others. Make the key by "
            "jax.random.key(seed, impl='threefry2x32')"
        )
