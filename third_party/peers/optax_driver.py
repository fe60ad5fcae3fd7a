"""Drives `optax.contrib.differentially_private_aggregate` (optax 0.2, Google DeepMind, Apache 2.0), fed by vmap(grad).

It clips, sums, adds noise and divides by the batch in one. The noise has standard deviation zero here but is drawn all
the same, once for each microbatch: that is part of what it costs, and cannot be switched off. It has no microbatches of
its own; `optax.microbatching` gives it some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax


def make(
    per_example_losses: Callable[[Any, Any], Any], l2_clip_norm: float, microbatch_size: int | None
) -> Callable[[Any, Any], Any]:
    """See `third_party.peers`; each example reaches the losses as a batch of one."""
    aggregate = optax.contrib.differentially_private_aggregate(l2_clip_norm, noise_multiplier=0.0, key=0)

    def one_gradient(params: Any, example: Any) -> Any:
        batch_of_one = jax.tree.map(lambda x: x[None], example)
        return jax.grad(lambda p: per_example_losses(p, batch_of_one)[0])(params)

    def clipped_sum(params: Any, batch: Any) -> Any:
        gradients = jax.vmap(one_gradient, in_axes=(None, 0))(params, batch)
        mean, _ = aggregate.update(gradients, aggregate.init(params))
        return jax.tree.map(lambda g: g * len(jax.tree.leaves(batch)[0]), mean)

    if microbatch_size is None:
        return clipped_sum
    return optax.microbatching.microbatch(clipped_sum, argnums=1, microbatch_size=microbatch_size)
