"""What a training run carries from step to step, and the split into trained and frozen parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dp_rmt.clipping.coordinates import Coordinates
from dp_rmt.trees import merge_params
from dp_rmt.types import Params


@dataclasses.dataclass(frozen=True)
class Transforms:
    """The three stages between a clipped gradient and a parameter update.

    Attributes:
      noise: `dp_rmt.add_gaussian_noise`; the boundary between private and public.
      denoise: `dp_rmt.denoise_matrices`, or `optax.identity()`.
      optimizer: any optax optimizer.
      published: ``(state of the optimizer, trained parameters) -> trained parameters`` as they are evaluated and saved,
        for an optimizer that differentiates at another point than its iterate (`dp_rmt.baselines.filters.kalman_filter`
        with `without_look_ahead`); None where the two are the same.
      coordinates: ``state of the optimizer -> Coordinates`` in which gradients are clipped, noised and given to the
        optimizer, whose last stage takes the update back to the parameters (`dp_rmt.geometry.whiten_inputs`); None
        where gradients are those of the parameters.
    """

    noise: optax.GradientTransformation
    denoise: optax.GradientTransformation
    optimizer: optax.GradientTransformation
    published: Callable[[Any, Params], Params] | None = None
    coordinates: Callable[[Any], Coordinates] | None = None

    def published_params(self, state: TrainState) -> dict[str, Any]:
        """All parameters of a state, trained and frozen, as they are evaluated and saved."""
        params = state.params if self.published is None else self.published(state.optimizer, state.params)
        return merge_params(params, state.frozen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree; everything that a checkpoint must hold besides the sampler's seed.

    Attributes:
      step: updates done, int32 scalar.
      params: trained parameters, float32.
      frozen: parameters that are never differentiated, clipped, noised or updated.
      noise: `GaussianNoiseState` (secret).
      denoise: state of the denoiser.
      optimizer: state of the optimizer.
    """

    step: jax.Array
    params: Params
    frozen: Params
    noise: Any
    denoise: Any
    optimizer: Any

    @classmethod
    def create(cls, transforms: Transforms, params: Params, frozen: Params) -> TrainState:
        """The state before the first step."""
        return cls(
            step=jnp.zeros([], jnp.int32),
            params=params,
            frozen=frozen,
            noise=transforms.noise.init(params),
            denoise=transforms.denoise.init(params),
            optimizer=transforms.optimizer.init(params),
        )
