"""Clipping that fits any loss: by the rules of its layers where there are rules, else by one gradient per example."""

from __future__ import annotations

import dataclasses
import functools

import jax
from absl import logging

from dp_rmt.clipping.coordinates import Coordinates
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.leaf_uses import LeafWithoutRule
from dp_rmt.clipping.per_example import ClippedGradient, ClippingStyle, PerExample, clipped_grad
from dp_rmt.types import Batch, Params, PerExampleLosses, Unit


def auto_clipped_grad(
    per_example_losses: PerExampleLosses,
    *,
    l2_clip_norm: float,
    normalize_by: float = 1.0,
    clip: ClippingStyle = "flat",
    microbatch_size: int | None = None,
    coordinates: Coordinates | None = None,
    unit: Unit = "example",
) -> ClippedGradient:
    """`ghost_clipped_grad` of losses whose layers all have rules, and `clipped_grad` of all others.

    The choice is made when the losses are traced, once for each shape of the arguments. A loss without Flax layers has
    nothing that rules could help with. A model in which some leaf has no rule is clipped by `clipped_grad`, too, and a
    warning names the leaf, because each example's gradient then takes the memory of the model.

    Losses that mix examples are refused where the layers have rules, as `ghost_clipped_grad` refuses them. The other
    function sees one example at a time, so that nothing can be mixed there.

    Args:
      per_example_losses: ``(params, batch) -> (batch,)``.
      l2_clip_norm: as in `clipped_grad`, like the arguments that follow.
      normalize_by: divides the sum; the EXPECTED batch size.
      clip: "flat" or "automatic".
      microbatch_size: examples differentiated at once; None for all. Must divide the batch.
      coordinates: as in `clipped_grad`.
      unit: "example", or "user" for batches of users with several rows each.

    Returns:
      A `ClippedGradient`.

    Raises:
      ValueError: an argument is out of range; or, from the returned function, as `clipped_grad` does.

    >>> import jax.numpy as jnp
    >>> gradient, _ = auto_clipped_grad(lambda w, x: 0.5 * (x @ w) ** 2, l2_clip_norm=1.0)(
    ...     jnp.ones(2), jnp.eye(2) * 2, is_padding_example=None
    ... )
    >>> [round(float(x), 3) for x in gradient]
    [1.0, 1.0]
    """
    by_rules, by_example = (
        make(
            per_example_losses,
            l2_clip_norm=l2_clip_norm,
            normalize_by=normalize_by,
            clip=clip,
            microbatch_size=microbatch_size,
            coordinates=coordinates,
            unit=unit,
        )
        for make in (ghost_clipped_grad, clipped_grad)
    )

    @functools.partial(jax.jit, inline=True)  # else a loss without rules would be traced in vain at every call
    def function(params: Params, batch: Batch, is_padding: jax.Array) -> tuple[Params, PerExample]:
        try:
            return by_rules.function(params, batch, is_padding)
        except LeafWithoutRule as error:
            level = logging.WARNING if error.has_layers else logging.DEBUG
            logging.log(level, "each example's gradient is computed by itself (vmap): %s", error)
            return by_example.function(params, batch, is_padding)

    return dataclasses.replace(by_rules, function=function)
