"""Gaussian noise as an optax transformation. The noise is float32 and a pure function of (key, step, leaf)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_rmt.arguments import integer, one_of
from dp_rmt.random_bits import NoiseGenerator, generator_of, key_of_seed, key_of_words, words_of_entries
from dp_rmt.types import Params

NOISE_SUPPORT = 9.155
"""The noise ends at this many standard deviations on either side, rounded down: ``Phi_c(9.15529) = 2^-65``.

A draw is ``Phi^-1((v + 1/2) / 2^64)`` of a 64-bit integer v, so that the outermost draw has ``Phi_c(z) = 2^-65``. The
probability that a Gaussian has beyond it is part of delta (`dp_rmt.accounting`)."""

NOISE_LAWS: dict[str, str] = {
    "threefry2x32": "64 bits of Threefry an entry, through the inverse of the normal distribution",
    "chacha20": "64 bits of ChaCha20 an entry, through the inverse of the normal distribution",
}
"""How a key and a step become noise, by the generator. A step that is repeated must repeat its noise. Therefore
checkpoints hold this sentence, and a checkpoint that holds another one, of an earlier version, is not resumed. Change
the sentence when the noise changes, and at no other time."""

# Wichura 1988, algorithm AS 241, routine PPND16: numerators and denominators, lowest power first. Relative error 1e-16.
_CENTRE = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_TAIL = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_FAR_TAIL = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)


class GaussianNoiseState(NamedTuple):
    """State of `add_gaussian_noise`. Whoever holds it can subtract the noise, so it is as secret as the data.

    Attributes:
      step: number of updates so far, int32 scalar.
      key: data of the key that all noise derives from, uint32; here, so that a checkpoint carries it.
    """

    step: jax.Array
    key: jax.Array


def noise_key(seed: int, generator: NoiseGenerator = "threefry2x32") -> jax.Array:
    """Makes the key of a run's noise from a seed in [0, 2^128); two seeds give unrelated keys.

    `jax.random.key` keeps 32 bits of a seed, which can be searched. A key of "threefry2x32" has 64 bits, and Threefry
    was made for statistics: nobody proves that who knows a part of its bits cannot find others. A key of "chacha20" has
    256 bits, made from all 128 of the seed, and its bits are those of a cipher (RFC 8439).

    >>> bool((jax.random.key_data(noise_key(7)) != jax.random.key_data(noise_key(7 + 2**32))).any())
    True
    >>> jax.random.key_data(noise_key(7, "chacha20")).shape
    (8,)
    """
    # A longer seed could be the same words as a seed and a step of `PoissonSampling`.
    wanted = "be in [0, 2^128), an integer; see batch_selection.fresh_seed()"
    one_of("generator", generator, get_args(NoiseGenerator))
    return key_of_seed(integer("seed", seed, wanted, lambda n: 0 <= n < 2**128), generator)


def add_gaussian_noise(noise_std: float | optax.Schedule, key: jax.Array) -> optax.GradientTransformation:
    """Adds independent N(0, noise_std^2) to every entry of the updates: the Gaussian mechanism (Dwork & Roth 2014).

    The noise of leaf number j at step t is drawn from ``fold_in(fold_in(key, t), j)``. It is a pure function of (key,
    t, j), so it is identical for any number of devices and never the same for two steps or two leaves. It is drawn and
    added in float32 (float64 for float64 updates), whatever dtype comes in, because bfloat16 noise has 128 distinct
    values a binade and no tails. It reaches `NOISE_SUPPORT` standard deviations on both sides (`standard_normal`).

    For a ``ClippedGradient g``, the guarantee of noise multiplier z holds with ``noise_std = z * g.sensitivity()``.
    Place the noise once in a chain, after every accumulation over microbatches and devices.

    Args:
      noise_std: standard deviation of one entry, or a schedule of it by step. It may be traced
        (`optax.inject_hyperparams`). A traced or scheduled value is not checked.
      key: a typed key of Threefry or ChaCha20. For private data it is ``noise_key(fresh_seed())``, new for every
        training run.

    Returns:
      An `optax.GradientTransformation` with a `GaussianNoiseState`.

    Raises:
      ValueError: noise_std is negative, not finite or not a scalar; the key is of another kind; an update has a leaf
        that is not real and floating.

    >>> import jax
    >>> noise = add_gaussian_noise(1.0, jax.random.key(0))
    >>> noisy, state = noise.update(jnp.zeros(3), noise.init(jnp.zeros(3)))
    >>> noisy.shape, int(state.step)
    ((3,), 1)
    """
    if not callable(noise_std):
        _check_noise_std(noise_std)
    generator = generator_of(key)

    def init(params: Params) -> GaussianNoiseState:
        del params
        # A copy: a state that shares its buffer with the caller's key would take the key along when it is donated.
        return GaussianNoiseState(jnp.zeros([], jnp.int32), jnp.array(jax.random.key_data(key), copy=True))

    @jax.named_scope("noise")  # for profiles
    def update(updates: Params, state: GaussianNoiseState, params: Params | None = None):
        del params
        std = noise_std(state.step) if callable(noise_std) else noise_std
        step_key = jax.random.fold_in(key_of_words(state.key, generator), state.step)
        leaves, structure = jax.tree.flatten_with_path(updates)
        keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(jnp.arange(len(leaves)))
        noisy = [_add_noise(path, leaf, std, keys[j]) for j, (path, leaf) in enumerate(leaves)]
        return jax.tree.unflatten(structure, noisy), GaussianNoiseState(state.step + 1, state.key)

    return optax.GradientTransformation(init, update)


def _add_noise(path: jax.tree_util.KeyPath, leaf: jax.Array, std: float | jax.Array, key: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(
            f"add_gaussian_noise: the updates' leaf {name!r} has dtype {leaf.dtype}, but only real floating-point "
            "leaves can get noise: take integers out of what is trained, and train a complex parameter as two real "
            "ones, its real and its imaginary part"
        )
    dtype = leaf.dtype if leaf.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    leaf = leaf.astype(dtype)
    noisy = leaf + jnp.asarray(std, dtype) * standard_normal(key, leaf.shape, dtype)
    # Divided by ones, of which XLA cannot know that they are: it repeats no division in each reader of the result, such
    # as the two moments of Adam, where it would otherwise draw most of the noise anew (tests/laws/test_threefry.py).
    return noisy / (1 + jnp.minimum(0, jnp.square(leaf)))


def _check_noise_std(noise_std: Any) -> None:
    if isinstance(noise_std, jax.core.Tracer):
        is_right = noise_std.shape == ()
    else:
        number = np.asarray(noise_std)
        is_real = jnp.issubdtype(number.dtype, jnp.floating) or jnp.issubdtype(number.dtype, jnp.integer)
        is_right = number.ndim == 0 and is_real and bool(0 <= number < math.inf)
    if not is_right:
        raise ValueError(
            f"noise_std must be non-negative and finite, one number or a schedule of it, got {noise_std!r}; it is the "
            "standard deviation of every entry, noise_multiplier * sensitivity"
        )


def standard_normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Draws independent N(0, 1) numbers with a Gaussian's tails, up to `NOISE_SUPPORT` deviations on both sides.

    Entry i is ``Phi^-1((v_i + 1/2) / 2^64)``. The 64-bit integer is ``v_i = Threefry_key(i)`` (Salmon et al. 2011), or
    for ChaCha20 an eighth of a block, which eight neighbours share (`dp_rmt.random_bits`). `jax.random.normal` inverts
    the same distribution function from 23 bits only, so it never exceeds 5.2201.

    Args:
      key: a typed key of Threefry or ChaCha20.
      shape: the shape of the result.
      dtype: float32 or float64. Both give the same draws, but for rounding.

    Returns:
      An array of that shape and dtype. Entry i depends on the key, the shape and its position alone, not on how the
      array is divided among devices.

    Raises:
      ValueError: the key or the dtype is of another kind, or an axis of the shape has more than 2^32 entries.

    >>> z = standard_normal(jax.random.key(0), (1000,))
    >>> print(f"{z.std():.1f}")
    1.0
    """
    generator_of(key)
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise ValueError(f"standard_normal: dtype must be float32 or float64, got {dtype}: fewer digits have no tails")
    high, low = words_of_entries(key, tuple(shape))
    return normal_of_words(high, low, dtype)


@functools.partial(jax.jit, static_argnames="dtype")  # compiled as one piece, so that it rounds alike in every program
def normal_of_words(high: jax.Array, low: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """``Phi^-1((v + 1/2) / 2^64)`` for ``v = 2^32 high + low``.

    The result z increases with v, is never 0, and satisfies ``z(2^64 - 1 - v) = -z(v)`` exactly. Neither the tails nor
    the centre lose digits, because both the smaller tail's probability p and ``1/2 - p`` are computed from the
    integers, each to full relative accuracy.

    Args:
      high: the upper 32 bits of v, uint32.
      low: the lower 32 bits of v, uint32, of the same shape.
      dtype: float32 or float64, the dtype in which everything is computed.

    Returns:
      Numbers of magnitude 7e-20 to 9.1553.
    """
    is_upper = high >> 31 == 1
    high, low = jnp.where(is_upper, ~high, high), jnp.where(is_upper, ~low, low)  # the lower half, mirrored
    tail = _fraction(high, low, dtype)
    from_middle = _fraction(jnp.uint32(0x7FFFFFFF) - high, ~low, dtype)
    r = jnp.sqrt(-jnp.log(tail))
    magnitude = jnp.where(
        from_middle <= 0.425,
        from_middle * _ratio(_CENTRE, 0.180625 - from_middle * from_middle),
        jnp.where(r <= 5, _ratio(_TAIL, r - 1.6), _ratio(_FAR_TAIL, r - 5)),
    )
    return jnp.where(is_upper, magnitude, -magnitude)


def _fraction(high: jax.Array, low: jax.Array, dtype: Any) -> jax.Array:
    """``(2^32 high + low + 1/2) / 2^64``. The least value is 2^-65, which is a normal number of float32."""
    return high.astype(dtype) * 2.0**-32 + (low.astype(dtype) + 0.5) * 2.0**-64


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: jax.Array) -> jax.Array:
    numerator, denominator = (jnp.polyval(np.array(c[::-1], x.dtype), x, unroll=16) for c in coefficients)
    return numerator / denominator
