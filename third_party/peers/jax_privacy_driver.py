"""Drives `jax_privacy.clipping.clipped_grad` of jax-privacy 2.0.0 (Google DeepMind, Apache 2.0) with its defaults."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from jax_privacy.clipping import clipped_grad


def make(
    per_example_losses: Callable[[Any, Any], Any], l2_clip_norm: float, microbatch_size: int | None
) -> Callable[[Any, Any], Any]:
    """See `third_party.peers`; each example reaches the losses as a batch of one."""
    function = clipped_grad(
        lambda params, batch_of_one: per_example_losses(params, batch_of_one)[0],
        l2_clip_norm=l2_clip_norm,
        microbatch_size=microbatch_size,
    )

    def clipped_sum(params: Any, batch: Any) -> Any:
        with warnings.catch_warnings():  # it calls a function of optax by its old name
            warnings.filterwarnings("ignore", "optax.global_norm is deprecated", DeprecationWarning)
            return function(params, batch)

    return clipped_sum
