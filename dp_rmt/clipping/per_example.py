"""Per-example clipped gradients by `jax.vmap`: the reference that every faster method is checked against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from dp_accounting import NeighboringRelation

from dp_rmt.clipping.batch_leaves import num_examples, padding_mask, row_weights, users_and_rows
from dp_rmt.clipping.coordinates import Coordinates
from dp_rmt.types import Batch, Params, PerExampleLosses, Unit, check_leaves_are_real

ClippingStyle = Literal["flat", "automatic"]

AUTOMATIC_CLIPPING_STABILITY = 0.01
"""The gamma of automatic clipping (Bu et al. 2023, section 4), which keeps small gradients from being blown up."""

SMALLEST_CLIP_NORM = 1e-6
"""Squares of entries below 1e-19 vanish in float32. What that takes from a norm is below 1e-9, a thousandth of this
number. This holds here for up to 10^19 entries, and in fast clipping as `dp_rmt.clipping.leaf_rules` says."""

LARGEST_AUTOMATIC_CLIP_NORM = 1e30
"""Automatic clipping multiplies a gradient by up to 100 C, which must be a float32."""


class PerExample(NamedTuple):
    """Raw values of each example, shape (batch,). They are NOT private: report them as ``nonprivate/`` or not at all.

    With ``unit="user"`` there is one entry for each user.

    Attributes:
      loss: the loss, or the mean loss of a user's rows; zero for padding.
      grad_norm: the l2 norm before clipping; zero for padding. It is NaN or infinite where the gradient or the loss
        was; such an example contributed zero.
    """

    loss: jax.Array
    grad_norm: jax.Array


@dataclasses.dataclass(frozen=True)
class ClippedGradient:
    """A clipped gradient that knows its own sensitivity. Call it as ``(params, batch, *, is_padding_example)``.

    Attributes:
      function: computes ``(gradient, PerExample)`` of parameters, batch and mask, which `__call__` has checked.
      l2_norm_bound: the largest l2 norm that one example (or user) can add to the gradient (see the function of this
        name).
      unit: what a line of the batch is. With "user" each leaf of a batch is (users, rows, ...).
    """

    function: Callable[[Params, Batch, jax.Array], tuple[Params, PerExample]]
    l2_norm_bound: float
    unit: Unit = "example"

    def __call__(
        self, params: Params, batch: Batch, *, is_padding_example: jax.Array | None
    ) -> tuple[Params, PerExample]:
        """Computes the clipped gradient of a batch.

        Args:
          params: a pytree of arrays.
          batch: a pytree of arrays, each with the examples as its first axis.
          is_padding_example: boolean (batch,), True for rows that are not examples. For the indices of
            `PoissonSampling` it is ``indices < 0``: there -1 is padding, and would otherwise count the last example of
            the data set once for every free row. None says that no row can be padding. With ``unit="user"`` it is
            (users, rows), as for the indices of `UserSampling`.

        Returns:
          The sum of clipped gradients over ``normalize_by``, in the structure of ``params``, which is zero for a batch
          of no rows; and a `PerExample`, which is not private.

        Raises:
          ValueError: a leaf of the batch has another leading axis or none, or the mask is not boolean or does not fit.
            It is raised before the loss is traced.
        """
        shape = (num_examples(batch),) if self.unit == "example" else users_and_rows(batch)
        is_padding = padding_mask(is_padding_example, *shape)
        if 0 in shape:
            zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.promote_types(p.dtype, jnp.float32)), params)
            return zeros, PerExample(jnp.zeros(shape[0]), jnp.zeros(shape[0]))
        return self.function(params, batch, is_padding)

    def sensitivity(self, neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE) -> float:
        """The largest l2 distance between the gradients of two neighbouring batches.

        Args:
          neighboring_relation: what neighbouring means. Adding, removing or zeroing out one example (or all rows of one
            user) moves the sum by one clipped gradient; replacing one moves it by two.

        Returns:
          ``l2_norm_bound``, or twice that for ``REPLACE_ONE``.
        """
        return self.l2_norm_bound * (2 if neighboring_relation is NeighboringRelation.REPLACE_ONE else 1)


def clipped_grad(
    per_example_losses: PerExampleLosses,
    *,
    l2_clip_norm: float,
    normalize_by: float = 1.0,
    clip: ClippingStyle = "flat",
    microbatch_size: int | None = None,
    coordinates: Coordinates | None = None,
    unit: Unit = "example",
) -> ClippedGradient:
    """Makes a function for the sum of clipped per-example gradients, divided by a constant.

    ``gradient = (1 / normalize_by) sum_i c_i g_i`` with ``c_i = min(1, C / ||g_i||)`` (flat; Abadi et al. 2016) or
    ``c_i = C / (||g_i|| + 0.01)`` (automatic; Bu et al. 2023). The norm is over all leaves of ``params`` together.

    Formal guarantee: for every pair of batches that differ by one added or removed example, the gradients differ by at
    most ``.sensitivity()`` in l2 norm, up to float32 rounding, provided that no example influences the loss of another.
    Norms and sums are float32 (float64 for float64 parameters) whatever the model's dtype. Squares below 1e-38 vanish
    from a norm, which takes less than a thousandth of `SMALLEST_CLIP_NORM` from it; squares above 3e38 make it
    infinite.

    ================================  ==============================================
    an example that ...               contributes
    ================================  ==============================================
    is padding                        exactly zero
    has a NaN or infinite gradient    exactly zero; its ``grad_norm`` is not finite
    has a NaN or infinite loss        exactly zero; its ``grad_norm`` is not finite
    has a norm above 1.8e19           exactly zero; its ``grad_norm`` is not finite
    has a zero gradient               zero
    ================================  ==============================================

    With ``unit="user"``, g_i is the mean of the gradients of user i's rows, ``(1 / n_i) sum_j g_ij`` over the n_i rows
    that are not padding, and everything above holds of users (Charles et al. 2024). A user of whose rows one has a
    gradient or a loss that is not finite contributes exactly zero.

    Random numbers of the loss must be each example's own. For dropout, give each example a key as a leaf of the batch
    and use `dp_rmt.models.PerExampleDropout`. With one key for all and `flax.linen.Dropout`, all examples have the same
    mask here, and in `dp_rmt.ghost_clipped_grad` a mask belongs to the row of the batch.

    A loss that is not finite is taken as one without a gradient, whatever its derivative is. For example, the
    cross-entropy of a label that is not a class (-100, or 2 of 2) is NaN, while its derivative is finite and wrong.

    Args:
      per_example_losses: ``(params, batch) -> (batch,)``.
      l2_clip_norm: C, in the units of the gradient. ``inf`` turns flat clipping off, and the guarantee with it.
      normalize_by: the EXPECTED batch size, a public constant, which divides the sum. Dividing by the observed batch
        size would leak it and void the accounting.
      clip: "flat" or "automatic".
      microbatch_size: how many examples are differentiated at once (memory is proportional to it); None for all. It
        must divide the batch.
      coordinates: public maps of some leaves; None for the parameters as they are. Each example's gradient is mapped
        before its norm is taken, and the sum is that of mapped gradients (`dp_rmt.clipping.coordinates`). The
        coordinates must not depend on private data.
      unit: "user" for batches of users with several rows each.

    Returns:
      A `ClippedGradient`; its gradient has the structure of ``params``. The loss is compiled with it, once for each
      shape of its arguments, so it must be a pure function.

    Raises:
      ValueError: an argument is out of range. The returned function raises it if a leaf of ``params`` is complex, an
        integer or a float of 8 bits.

    >>> losses = lambda w, batch: 0.5 * (batch @ w) ** 2
    >>> gradient, per_example = clipped_grad(losses, l2_clip_norm=1.0)(
    ...     jnp.ones(2), jnp.eye(2) * 2, is_padding_example=None
    ... )
    >>> [round(float(x), 3) for x in gradient], [round(float(x), 3) for x in per_example.grad_norm]
    ([1.0, 1.0], [4.0, 4.0])
    """
    check_arguments(l2_clip_norm, normalize_by, clip, microbatch_size)

    def one_example(params: Params, example: Batch) -> tuple[jax.Array, Params]:
        batch_of_one = jax.tree.map(lambda x: x[None], example)
        return jax.value_and_grad(lambda p: _one_loss(per_example_losses(p, batch_of_one)))(params)

    def one_user(params: Params, rows: Batch, weights: jax.Array) -> tuple[jax.Array, Params]:
        """The mean loss and gradient of a user's rows, one row at a time; a row of weight zero is not looked at."""

        def add(total: Any, row: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            example, weight = row
            of_row = _wide(one_example(params, example))
            return jax.tree.map(
                lambda t, x: jnp.where(weight > 0, t + weight.astype(x.dtype) * x, t), total, of_row
            ), None

        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(lambda: _wide(one_example(params, jax.tree.map(lambda x: x[0], rows)))),
        )
        mean: tuple[jax.Array, Params] = jax.lax.scan(add, nothing, (rows, weights))[0]
        return mean

    def clipped_sum(params: Params, batch: Batch, is_padding: jax.Array) -> tuple[Params, PerExample]:
        if unit == "example":
            losses, grads = jax.vmap(one_example, in_axes=(None, 0))(params, batch)
            grads = _wide(grads)
        else:
            losses, grads = jax.vmap(one_user, in_axes=(None, 0, 0))(params, batch, row_weights(is_padding))
            is_padding = jnp.all(is_padding, axis=1)
        mapped = grads if coordinates is None else jax.vmap(coordinates)(grads)
        norms = jnp.sqrt(sum(jnp.sum(jnp.square(g), axis=range(1, g.ndim)) for g in jax.tree.leaves(mapped)))
        norms = jnp.where(jnp.isfinite(losses), norms, jnp.nan)
        contributes = jnp.isfinite(norms) & ~is_padding
        factors = jnp.where(contributes, clip_factors(norms, l2_clip_norm=l2_clip_norm, clip=clip), 0.0)
        total = jax.tree.map(lambda g: _weighted_sum(g, factors, contributes), grads)
        return total, PerExample(jnp.where(is_padding, 0.0, losses), jnp.where(is_padding, 0.0, norms))

    return summed_over_microbatches(
        clipped_sum,
        l2_clip_norm=l2_clip_norm,
        normalize_by=normalize_by,
        microbatch_size=microbatch_size,
        coordinates=coordinates,
        unit=unit,
    )


def summed_over_microbatches(
    clipped_sum: Callable[[Params, Batch, jax.Array], tuple[Params, PerExample]],
    *,
    l2_clip_norm: float,
    normalize_by: float,
    microbatch_size: int | None,
    coordinates: Coordinates | None,
    unit: Unit = "example",
) -> ClippedGradient:
    """Makes a `ClippedGradient` of a function that clips and sums one microbatch.

    Microbatches follow `optax.microbatching`: number j of M holds the examples j, j + M, j + 2M, ..., so that each is
    spread evenly over the devices of a sharded batch. Trailing microbatches that hold padding alone are skipped
    (`dp_rmt.batch_selection.microbatch_order` lays a batch out so that its padding ends up there).

    Args:
      clipped_sum: ``(params, batch, is_padding) -> (sum of clipped gradients, PerExample)``.
      l2_clip_norm: a bound on what one example adds to the sum.
      normalize_by: the number that divides the sum.
      microbatch_size: None for the whole batch at once.
      coordinates: map the sum, once it is complete; its clip factors are of mapped gradients.
      unit: what a line of a batch is; a microbatch has so many of them.

    Returns:
      The `ClippedGradient`.
    """

    def function(params: Params, batch: Batch, is_padding: jax.Array) -> tuple[Params, PerExample]:
        check_leaves_are_real(params, "params")
        sum_ = clipped_sum
        if microbatch_size is not None:
            _check_divides(microbatch_size, len(is_padding))
            kind = optax.microbatching.AccumulationType
            is_empty = is_padding if unit == "example" else jnp.all(is_padding, axis=1)
            has_examples = jnp.any(~is_empty.reshape((-1, microbatch_size), order="F"), axis=1)
            sum_ = optax.microbatching.microbatch(
                clipped_sum,
                argnums=(1, 2),
                microbatch_size=microbatch_size,
                accumulator=(kind.SUM, kind.CONCAT),
                num_real_microbatches=jnp.max(jnp.where(has_examples, 1 + jnp.arange(len(has_examples)), 0)),
            )
        total, per_example = sum_(params, batch, is_padding)
        mapped = total if coordinates is None else coordinates(total)
        return jax.tree.map(lambda g: g / normalize_by, mapped), per_example

    # The function is jitted: op by op, loops and the layers of ghost clipping would be compiled at every call and kept.
    return ClippedGradient(
        jax.jit(function, inline=True), l2_norm_bound(l2_clip_norm=l2_clip_norm, normalize_by=normalize_by), unit
    )


def l2_norm_bound(*, l2_clip_norm: float, normalize_by: float) -> float:
    """The largest l2 norm that one example can add to a clipped gradient, ``C / normalize_by``, for either clip style.

    Adding or removing one example can change the gradient by so much, so it is the unit of the noise.

    >>> l2_norm_bound(l2_clip_norm=0.5, normalize_by=100)
    0.005
    """
    return l2_clip_norm / normalize_by


def clip_factors(norms: jax.Array, *, l2_clip_norm: float, clip: ClippingStyle) -> jax.Array:
    """The factor (batch,) of each per-example gradient; see `clipped_grad` for the equations."""
    if clip == "automatic":
        return l2_clip_norm / (norms + AUTOMATIC_CLIPPING_STABILITY)
    return jnp.minimum(1.0, l2_clip_norm / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))


def _weighted_sum(grads: jax.Array, factors: jax.Array, contributes: jax.Array) -> jax.Array:
    # A factor of zero does not remove a NaN (0 * NaN = NaN), hence the selection before the product.
    mask = contributes.reshape((-1,) + (1,) * (grads.ndim - 1))
    return jnp.einsum("b,b...->...", factors.astype(grads.dtype), jnp.where(mask, grads, 0.0), precision="highest")


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _one_loss(losses: jax.Array) -> jax.Array:
    if losses.shape != (1,):
        raise ValueError(
            f"per_example_losses must return one loss per example, shape (batch,): for a batch of one it returned "
            f"shape {losses.shape}; do not average over the batch, and sum the loss over tokens, not over examples"
        )
    return losses[0]


def _check_divides(microbatch_size: int, batch_size: int) -> None:
    if batch_size % microbatch_size:
        raise ValueError(
            f"a batch of {batch_size} examples cannot be cut into microbatches of {microbatch_size}: pad it to a "
            f"multiple of {microbatch_size} (is_padding_example=True) or choose a microbatch_size that divides it"
        )


def check_arguments(l2_clip_norm: float, normalize_by: float, clip: str, microbatch_size: int | None) -> None:
    """Raises ValueError if an argument of `clipped_grad` is out of range, and says what to give instead."""
    if not l2_clip_norm >= SMALLEST_CLIP_NORM:
        raise ValueError(
            f"l2_clip_norm must be at least {SMALLEST_CLIP_NORM}, got {l2_clip_norm}: squares of gradients so small "
            "underflow in float32, and their norm with them; scale the loss up instead"
        )
    if not (normalize_by > 0 and math.isfinite(normalize_by)):
        raise ValueError(f"normalize_by must be positive and finite, got {normalize_by}: give the expected batch size")
    if clip not in ("flat", "automatic"):
        raise ValueError(f"clip must be 'flat' or 'automatic', got {clip!r}")
    if clip == "automatic" and l2_clip_norm > LARGEST_AUTOMATIC_CLIP_NORM:
        raise ValueError(
            "automatic clipping scales every gradient to l2_clip_norm, which must therefore be finite, and at most "
            f"{LARGEST_AUTOMATIC_CLIP_NORM:g}, got {l2_clip_norm}"
        )
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size must be at least 1 or None, got {microbatch_size}")
