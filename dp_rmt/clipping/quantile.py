"""A clip norm that follows a quantile of the gradients' norms, privately (Andrew et al. 2021, arXiv 1905.03871)."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dp_rmt.arguments import real
from dp_rmt.clipping.per_example import PerExample
from dp_rmt.noise_addition import GaussianNoiseState, add_gaussian_noise
from dp_rmt.types import Params, PerExampleLosses

SMALLEST, LARGEST = 1e-6, 1e6
"""Public bounds of the clip norm, far from the ends of float32."""


@dataclasses.dataclass(frozen=True)
class QuantileClipping:
    """How the clip norm C moves: ``C_(t+1) = C_t exp(-learning_rate (b_t - quantile))`` (arXiv 1905.03871, section 2).

    ``b_t`` is the noisy share of the sample whose gradients have a norm of at most C_t.

    Attributes:
      quantile: the share of gradients that shall stay unclipped, in (0, 1).
      share: the part of the budget that the count gets, in (0, 1): the count has ``share / z^2`` of the squared
        sensitivity ``1 / z^2`` of a step of noise multiplier z.
      learning_rate: above 0; the paper's is 0.2.

    Raises:
      ValueError: a value is out of range.

    >>> [round(std, 9) for std in QuantileClipping(share=0.36).noise_multipliers(1.2)]
    [1.5, 1.0]
    """

    quantile: float = 0.5
    share: float = 0.01
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        for name in ("quantile", "share"):
            value = real(f"clip_quantile: {name}", getattr(self, name), "be in (0, 1)", lambda x: 0 < x < 1)
            object.__setattr__(self, name, value)
        rate = real(
            "clip_quantile: learning_rate", self.learning_rate, "be above 0 and finite", lambda x: 0 < x < math.inf
        )
        object.__setattr__(self, "learning_rate", rate)

    def noise_multipliers(self, noise_multiplier: float) -> tuple[float, float]:
        """The std of the noise in the sum, in units of the clip norm, and that in the count ``sum_i (b_i - 1/2)``.

        ``1 / sum^2 + 1 / (2 count)^2 = 1 / z^2``, since one example moves the sum by 1 and the count by 1/2.

        Args:
          noise_multiplier: z, of the step as the accountants see it.
        """
        return noise_multiplier / math.sqrt(1 - self.share), noise_multiplier / (2 * math.sqrt(self.share))


class QuantileClippingState(NamedTuple):
    """State of `follow_quantile`.

    Attributes:
      noise: state of the noise (secret).
      l2_clip_norm: the clip norm of the next step, float32 scalar; computed from noisy counts alone.
    """

    noise: GaussianNoiseState
    l2_clip_norm: jax.Array


class Counted(NamedTuple):
    """What a step releases, before its noise.

    Attributes:
      gradient: sum of gradients over ``normalize_by``, in units of the clip norm: each is clipped to 1.
      num_below: ``sum_i (b_i - 1/2)`` over ``normalize_by``, where ``b_i`` says that gradient i was not longer than the
        clip norm; padding counts nothing. Where the unit is a user, i counts users: one user, with all rows, has one
        mean gradient, one norm and one ``b_i``.
    """

    gradient: Params
    num_below: jax.Array


def in_units_of(losses: PerExampleLosses, l2_clip_norm: jax.Array) -> PerExampleLosses:
    """The losses over the clip norm, so that gradients are in its units."""
    return lambda params, batch: losses(params, batch) / l2_clip_norm


def centred_count(per_example: PerExample, is_padding_example: jax.Array, normalize_by: float) -> jax.Array:
    """``sum_i (b_i - 1/2) / normalize_by`` of gradients in units of the clip norm; one of them moves the sum by 1/2.

    A gradient that is not finite counts as one that is too long.
    """
    is_below = per_example.grad_norm <= 1  # false for NaN
    return jnp.sum(jnp.where(is_padding_example, 0.0, jnp.where(is_below, 0.5, -0.5))) / normalize_by


def follow_quantile(
    clipping: QuantileClipping, *, noise_multiplier: float, l2_clip_norm: float, normalize_by: float, key: jax.Array
) -> optax.GradientTransformation:
    """Adds noise to a `Counted`, gives the gradient on, and moves the clip norm by the count.

    Formal guarantee: a step is a Gaussian mechanism of this noise multiplier. Given the sample and C_t, one example
    moves ``(gradient / z_g, count / z_c)`` by at most ``(1 / z_g, 1 / (2 z_c))`` over normalize_by, of norm ``1 / z``
    (`QuantileClipping.noise_multipliers`). C_(t+1) is post-processing of the noisy count.

    Args:
      clipping: how the clip norm moves.
      noise_multiplier: z of the whole step, above 0.
      l2_clip_norm: the first clip norm.
      normalize_by: the expected batch size.
      key: as of `add_gaussian_noise`.

    Returns:
      A transformation from `Counted` to the noisy gradient, in units of the clip norm.
    """
    of_sum, of_count = clipping.noise_multipliers(noise_multiplier)
    noise = add_gaussian_noise(of_sum / normalize_by, key)
    # In these units the count has the noise of a gradient's entry, so that it is one more leaf of the same draw.
    unit = of_sum / of_count

    def init(params: Params) -> QuantileClippingState:
        return QuantileClippingState(noise.init(params), jnp.asarray(l2_clip_norm, jnp.float32))

    def update(
        updates: Counted, state: QuantileClippingState, params: Params | None = None
    ) -> tuple[Params, QuantileClippingState]:
        noisy, noise_state = noise.update(Counted(updates.gradient, unit * updates.num_below), state.noise, params)
        share_below = jnp.clip(noisy.num_below / unit + 0.5, 0.0, 1.0)
        moved = state.l2_clip_norm * jnp.exp(-clipping.learning_rate * (share_below - clipping.quantile))
        return noisy.gradient, QuantileClippingState(noise_state, jnp.clip(moved, SMALLEST, LARGEST))

    return optax.GradientTransformation(init, update)
