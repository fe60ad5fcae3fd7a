"""What the audit trains: a linear model with worst-case canaries, an MLP with random labels; and code with mistakes.

A mutation is a `DPSGD` with one method overridden, or a step of the run done wrongly. All else is the project's code.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_rmt.clipping.coordinates import Coordinates
from dp_rmt.clipping.execution import AUTO, Execution
from dp_rmt.clipping.per_example import ClippedGradient, PerExample, clip_factors
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import add_gaussian_noise
from dp_rmt.types import Batch, Params, PerExampleLosses

CLIP_NORM = 1.0
SMALL, LARGE = 0.1, 100.0
"""Norms of a canary's parts, over the clip norm. Without noise a part of either size is plain to see."""

APART, TWICE = "rows of a user clipped apart", "a user drawn twice"
OF_USERS = APART, TWICE
"""The mistakes that only runs of users can make."""
MUTATIONS = {
    "none": "",
    "noise removed": "laws/test_private_step.py::"
    "test_noise_of_the_update_is_multiplier_times_clip_norm_over_expected_batch_size",
    "noise divided by B once more": "laws/test_private_step.py::"
    "test_noise_of_the_update_is_multiplier_times_clip_norm_over_expected_batch_size",
    "clipping skipped": "laws/test_sensitivity.py::test_neighbours_differ_by_at_most_the_sensitivity",
    "leaf left out of the norm": "clipping/test_per_example.py::test_every_leaf_counts_in_the_norm",
    "padding counted": "laws/test_private_step.py::test_padding_reaches_nothing",
    "tied weight counted once": "clipping/test_layer_rules.py::test_leaving_the_cross_term_out_would_be_noticed",
    "noise reused on resume": "training/test_resume.py::test_resumed_equals_uninterrupted",
    APART: "laws/test_users.py::test_neighbours_differ_by_one_users_rows_and_by_at_most_the_sensitivity",
    TWICE: "laws/test_user_sampler.py::test_users_are_poisson_samples",
}
"""The mistakes, each with the test under tests/ that guards against it."""


def canary_params(width: int) -> dict[str, jax.Array]:
    """Parameters of the linear model: a bias, and a table that is used twice."""
    return {"bias": jnp.zeros(width), "table": jnp.zeros(width)}


def canary_losses(params: Params, batch: Batch, head: jax.Array | None = None) -> jax.Array:
    """Example i has a gradient at its own place: small by the bias, small by the table's lookup, large by its head.

    Gradients of different examples are orthogonal, so that every canary is attacked by itself ("Dirac canaries"). The
    head is the table once more, unless another array is given for it.
    """
    row, head = batch["row"], params["table"] if head is None else head
    return -CLIP_NORM * (SMALL * (params["bias"][row] + params["table"][row]) + LARGE * head[row])


def mlp_params(width: int, hidden: int, seed: int) -> dict[str, jax.Array]:
    """Parameters of two layers, with Gaussian entries of variance 1 / inputs."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "hidden": jax.random.normal(first, (width, hidden)) / math.sqrt(width),
        "out": jax.random.normal(second, (hidden,)) / math.sqrt(hidden),
    }


def mlp_losses(params: Params, batch: Batch) -> jax.Array:
    """The logistic loss of a network with one hidden layer."""
    logits = jnp.tanh(batch["x"] @ params["hidden"]) @ params["out"]
    return optax.sigmoid_binary_cross_entropy(logits, batch["label"])


def mlp_arrays(num_examples: int, width: int, seed: int) -> dict[str, np.ndarray]:
    """Random inputs with random labels: there is nothing to learn but the examples themselves."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_examples, width)).astype(np.float32)
    return {"x": x, "label": rng.integers(0, 2, num_examples).astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Audited(DPSGD):
    """`DPSGD`, right ("none") or with one of `MUTATIONS`; it always claims the epsilon of the right one."""

    mutation: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mutation not in MUTATIONS:
            raise ValueError(f"mutation {self.mutation!r} is not one of {', '.join(MUTATIONS)}")

    @property
    def repeats_noise(self) -> bool:
        """Whether the run, resumed in its middle, starts its noise over."""
        return self.mutation == "noise reused on resume"

    def noise(self, key: jax.Array) -> optax.GradientTransformation:
        """The noise of `DPSGD`, or none, or too little."""
        if self.mutation == "noise removed":
            return add_gaussian_noise(0.0, key)
        if self.mutation == "noise divided by B once more":
            return add_gaussian_noise(self.noise_std / self.expected_batch_size, key)
        return super().noise(key)

    def clipped_grad(
        self,
        per_example_losses: PerExampleLosses,
        execution: Execution = AUTO,
        coordinates: Coordinates | None = None,
        clip_norm: jax.Array | None = None,
    ) -> ClippedGradient:
        """As of `DPSGD`, or with a mistake in it; the bound that it claims is the right one's."""
        right = super().clipped_grad(per_example_losses, execution, coordinates, clip_norm)
        function: Any = right.function
        if self.mutation == "clipping skipped":
            without = dataclasses.replace(
                self, noise_multiplier=0.0, l2_clip_norm=math.inf, clip="flat", mutation="none"
            )
            function = without.clipped_grad(per_example_losses, execution).function
        elif self.mutation == "padding counted":
            function = lambda params, batch, is_padding: right.function(  # noqa: E731
                params, batch, jnp.zeros_like(is_padding)
            )
        elif self.mutation == TWICE:
            twice = lambda tree: jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)  # noqa: E731
            function = lambda params, batch, is_padding: right.function(  # noqa: E731
                params, twice(batch), twice(is_padding)
            )
        elif self.mutation == APART:
            function = self._with_rows_apart(per_example_losses, execution)
        elif self.mutation == "leaf left out of the norm":
            function = self._with_norms_of(
                per_example_losses, lambda p, b: canary_losses(_frozen(p, "table"), b), execution
            )
        elif self.mutation == "tied weight counted once":
            head_apart: PerExampleLosses = lambda p, b: canary_losses(p, b, _frozen(p, "table")["table"])  # noqa: E731
            function = self._with_norms_of(per_example_losses, head_apart, execution)
        return dataclasses.replace(right, function=function)

    def _with_rows_apart(self, losses: PerExampleLosses, execution: Execution) -> Any:
        """Clips and sums the rows of all users as if each were a user."""
        by_row = dataclasses.replace(self, rows_per_user=None, mutation="none").clipped_grad(losses, execution)

        def function(params: Params, batch: Batch, is_padding: jax.Array) -> tuple[Params, PerExample]:
            rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
            return by_row.function(params, rows, is_padding.reshape(-1))

        return function

    def _with_norms_of(self, losses: PerExampleLosses, norm_losses: PerExampleLosses, execution: Execution) -> Any:
        """Sums the gradients of `losses`, but clips them by the norms of those of `norm_losses`."""
        norms_of = super().clipped_grad(norm_losses, execution)

        def function(params: Params, batch: Batch, is_padding: jax.Array) -> tuple[Params, PerExample]:
            _, per_example = norms_of.function(params, batch, is_padding)
            factors = clip_factors(per_example.grad_norm, l2_clip_norm=self.l2_clip_norm, clip=self.clip)
            weights = jnp.where(is_padding, 0.0, factors) / self.expected_batch_size
            return jax.grad(lambda p: jnp.sum(weights * losses(p, batch)))(params), per_example

        return function


def _frozen(params: Params, name: str) -> dict[str, jax.Array]:
    return {**params, name: jax.lax.stop_gradient(params[name])}
