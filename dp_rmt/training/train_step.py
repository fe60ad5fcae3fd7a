"""One private update: clip, add noise, denoise, optimise. A pure function, the same under jit and pmap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dp_rmt.clipping.execution import AUTO, Execution
from dp_rmt.clipping.per_example import PerExample
from dp_rmt.clipping.quantile import Counted, centred_count
from dp_rmt.denoising import matrix_view
from dp_rmt.denoising.gradient import DenoiseState
from dp_rmt.mechanism import DPSGD
from dp_rmt.training.advice import advice_metrics
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.trees import leaves_by_path, merge_params
from dp_rmt.types import Batch, Params, PerExampleLosses

TrainStep = Callable[[TrainState, Sequence[tuple[Batch, jax.Array]]], tuple[TrainState, dict[str, Any]]]


def make_train_step(
    mechanism: DPSGD,
    per_example_losses: PerExampleLosses,
    transforms: Transforms,
    *,
    execution: Execution = AUTO,
    axis_name: str | None = None,
    nonprivate_metrics: bool = True,
    layout: Params | None = None,
) -> TrainStep:
    """Builds ``train_step(state, groups) -> (state, metrics)``.

    ``groups`` is the Poisson sample of one step, as one or more ``(batch, is_padding_example)``; their sums are added
    before the noise. Where the mechanism's unit is a user, both have the rows of each user as their second axis, and
    the metrics count users. The step can be data-parallel. Under `jax.jit`, shard the leading axis of the groups and
    replicate the state. Under `jax.pmap` (or `shard_map`), give axis_name: the gradients are summed over it before the
    noise, which is the same on every device because key and step are.

    Args:
      mechanism: clips and normalises; its noise_std must be the one in transforms.
      per_example_losses: a function of ALL parameters, trained and frozen merged.
      transforms: what follows the clipped gradient.
      execution: how the clipped gradient is computed; as in `DPSGD.clipped_grad`.
      axis_name: of pmap; None under jit.
      nonprivate_metrics: also report ``nonprivate/...`` metrics, which are computed from raw private values.
      layout: shardings of the trained parameters where a mesh divides them. Gradient and noise are divided alike.
        Without it the compiler may follow the denoiser and hold both whole on every device.

    Returns:
      The step. Metrics: ``clipping/l2_clip_norm`` where it follows a quantile,
      ``denoise/kept_rank`` and ``denoise/top_over_edge`` by leaf, ``advice/...`` where
      `dp_rmt.training.advice.measure_steps` stands around the optimizer, and with nonprivate_metrics the
      mean loss and gradient norm, the clipped fraction, the number of non-finite examples, the size of the sample, and
      the mean cosine of the matrices to the clean (clipped) gradient before and after denoising, and that of the step
      against it.
    """

    def train_step(state: TrainState, groups: Sequence[tuple[Batch, jax.Array]]) -> tuple[TrainState, dict[str, Any]]:
        coordinates = None if transforms.coordinates is None else transforms.coordinates(state.optimizer)
        unit = None if mechanism.clip_quantile is None else state.noise.l2_clip_norm
        clipped_grad = mechanism.clipped_grad(
            lambda params, batch: per_example_losses(merge_params(params, state.frozen), batch),
            execution,
            coordinates,
            unit,
        )
        params = state.params
        if axis_name is not None:
            # Otherwise shard_map itself sums the gradients of replicated parameters over the devices, before clipping.
            params = jax.lax.pcast(params, axis_name, to="varying")
        parts = [clipped_grad(params, batch, is_padding_example=padding) for batch, padding in groups]
        # What of each group is nobody: of a user, where all rows are padding.
        absent = [padding if mechanism.unit == "example" else jnp.all(padding, axis=1) for _, padding in groups]
        grads = jax.tree.map(lambda *g: sum(g), *[gradient for gradient, _ in parts])
        if axis_name is not None:
            grads = jax.lax.psum(grads, axis_name)

        grads = _placed(grads, layout)
        clean: Any = grads
        if unit is not None:
            size = mechanism.expected_batch_size
            counts = [
                centred_count(per_example, nobody, size) for (_, per_example), nobody in zip(parts, absent, strict=True)
            ]
            count = jnp.sum(jnp.stack(counts))
            clean = Counted(grads, count if axis_name is None else jax.lax.psum(count, axis_name))
        noisy, noise = transforms.noise.update(clean, state.noise)
        noisy = _placed(noisy, layout)
        denoised, denoise = transforms.denoise.update(noisy, state.denoise)
        optimize = optax.with_extra_args_support(transforms.optimizer).update
        updates, optimizer = optimize(denoised, state.optimizer, state.params, noisy=noisy)
        params = optax.apply_updates(state.params, updates)

        metrics: dict[str, Any] = _denoiser_metrics((denoise, optimizer)) | advice_metrics(optimizer)
        if unit is not None:
            metrics["clipping/l2_clip_norm"] = jnp.copy(unit)  # the state itself is donated
        if nonprivate_metrics:
            per_example = jax.tree.map(lambda *x: jnp.concatenate(x), *[p for _, p in parts])
            padding = jnp.concatenate(absent)
            if unit is not None:
                per_example = jax.tree.map(lambda x: x * unit, per_example)
            norm = mechanism.l2_clip_norm if unit is None else unit
            metrics |= _raw_metrics(per_example, ~padding, norm, axis_name)
            metrics["nonprivate/cosine_noisy"] = mean_matrix_cosine(noisy, grads)
            metrics["nonprivate/cosine_denoised"] = mean_matrix_cosine(denoised, grads)
            step = grads if coordinates is None else coordinates(grads)
            metrics["nonprivate/cosine_update"] = -mean_matrix_cosine(updates, step)
        state = dataclasses.replace(
            state, step=state.step + 1, params=params, noise=noise, denoise=denoise, optimizer=optimizer
        )
        return state, metrics

    return train_step


def _placed(tree: Params, layout: Params | None) -> Params:
    return tree if layout is None else jax.lax.with_sharding_constraint(tree, layout)


def mean_matrix_cosine(updates: Params, reference: Params) -> jax.Array:
    """Mean of `matrix_cosines` over all matrices; 0 without any."""
    cosines = list(matrix_cosines(updates, reference).values())
    return jnp.mean(jnp.concatenate(cosines)) if cosines else jnp.zeros([])


def matrix_cosines(updates: Params, reference: Params) -> dict[str, jax.Array]:
    """Cosine ``<X, G> / (||X|| ||G||)`` of every matrix, (B,) by path (`matrix_view`); 0 where one is zero."""
    references = dict(leaves_by_path(reference))
    matrices = matrix_view.matrix_leaves(updates)
    cosines = {}
    for path, leaf in leaves_by_path(updates):
        if axes := matrices.get(path):
            x, g = matrix_view.to_matrices(leaf, axes), matrix_view.to_matrices(references[path], axes)
            inner = jnp.einsum("bmn,bmn->b", x, g)
            norms = jnp.sqrt(jnp.sum(x**2, (1, 2))) * jnp.sqrt(jnp.sum(g**2, (1, 2)))
            cosines[path] = inner / jnp.where(norms > 0, norms, 1.0)
    return cosines


def _denoiser_metrics(states: Any) -> dict[str, Any]:
    """Diagnostics of the denoiser, which is a stage of its own or stands inside the optimizer."""
    is_denoiser = lambda node: isinstance(node, DenoiseState)  # noqa: E731
    return {
        f"denoise/{name}": {path: getattr(values, name) for path, values in state.diagnostics.items()}
        for state in filter(is_denoiser, jax.tree.leaves(states, is_leaf=is_denoiser))
        for name in ("kept_rank", "top_over_edge")
    }


def _raw_metrics(
    per_example: PerExample, is_example: jax.Array, l2_clip_norm: float | jax.Array, axis_name: str | None
) -> dict[str, jax.Array]:
    finite = jnp.isfinite(per_example.grad_norm) & is_example
    sums = {
        "loss": jnp.sum(jnp.where(finite, per_example.loss, 0.0)),
        "grad_norm": jnp.sum(jnp.where(finite, per_example.grad_norm, 0.0)),
        "clipped_fraction": jnp.sum(finite & (per_example.grad_norm > l2_clip_norm)),
        "nonfinite_examples": jnp.sum(is_example & ~finite),
        "batch_size": jnp.sum(is_example),
        "finite": jnp.sum(finite),
    }
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    count = jnp.maximum(sums.pop("finite"), 1)
    means = {name: sums[name] / count for name in ("loss", "grad_norm", "clipped_fraction")}
    return {f"nonprivate/{name}": value for name, value in (sums | means).items()}
