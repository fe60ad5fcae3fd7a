"""From a config to what follows the clipped gradient: noise, denoiser or filter, optimizer."""

from __future__ import annotations

from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dp_rmt.baselines.filters import kalman_filter, low_pass_filter, without_look_ahead
from dp_rmt.baselines.muon import private_muon
from dp_rmt.baselines.truncation import truncate_rank
from dp_rmt.denoising.gates import Gate, Kappa, TracyWidom
from dp_rmt.denoising.joins import layers_side_by_side, reads_the_stream, shared_inputs
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.partitioning import by_matrix
from dp_rmt.training.train_state import Transforms

STRUCTURES: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared_inputs": {"join": shared_inputs},
    "residual_stream": {"matrix_rule": layers_side_by_side, "join": reads_the_stream},
}
"""What `config.denoise.structure` names: options of `dp_rmt.denoise_matrices`."""


def build_transforms(config: ConfigDict, mechanism: DPSGD, noise_seed: int, mesh: Mesh) -> Transforms:
    """The stages of a config at the mechanism's noise level.

    Args:
      config: optimizer and denoise of `configs.base`.
      mechanism: its noise_std goes to noise and denoiser, its num_steps to the schedule.
      noise_seed: secret, for private data.
      mesh: its devices share the denoiser's work.

    Returns:
      `Transforms`; the denoiser is the identity where it is off, where it is part of the optimizer, or where there is
      no noise.
    """
    settings, method = config.denoise, config.denoise.method
    if not settings.enabled or mechanism.noise_std == 0:
        method = "none"
    of_moment = method == "rmt" and settings.target == "first_moment"
    stages = {
        "rmt": lambda: mechanism.denoiser(**_denoiser_options(settings, mesh)),
        "low_pass": low_pass_filter,
        "truncate_rank": lambda: truncate_rank(settings.rank),
    }
    optimizer = _optimizer(config, mechanism, mesh, of_moment=of_moment)
    return Transforms(
        noise=mechanism.noise(noise_key(noise_seed)),
        denoise=stages[method]() if method in stages and not of_moment else optax.identity(),
        optimizer=kalman_filter(optimizer, kappa=settings.kalman_gain) if method == "kalman" else optimizer,
        published=without_look_ahead if method == "kalman" else None,
    )


def learning_rate_schedule(settings: ConfigDict, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then linear decay to zero at num_steps, or constant."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if warmup >= num_steps:
        raise ValueError(f"config.optimizer.warmup_steps={warmup} must be less than the {num_steps} steps of the run")
    end = 0.0 if settings.schedule == "linear" else peak
    decay = optax.linear_schedule(peak, end, num_steps - warmup)
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), decay], [warmup])


def _optimizer(config: ConfigDict, mechanism: DPSGD, mesh: Mesh, *, of_moment: bool) -> optax.GradientTransformation:
    settings = config.optimizer
    schedule = learning_rate_schedule(settings, mechanism.num_steps)
    moments = {"b1": settings.b1, "b2": settings.b2, "eps": settings.eps}
    if of_moment:
        correction, options = settings.noise_correction, _denoiser_options(config.denoise, mesh)
        return optax.chain(
            mechanism.denoised_adam(
                **moments, second_moment=settings.second_moment, noise_correction=correction, **options
            ),
            optax.add_decayed_weights(settings.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    adamw = optax.adamw(schedule, **moments, weight_decay=settings.weight_decay)
    if settings.name == "muon":  # steps of Adam's size, so that one learning rate serves both
        return private_muon(schedule, adamw, consistent_rms=0.2, weight_decay=settings.weight_decay)
    return adamw


def _denoiser_options(denoise: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    return {
        "shrinker": denoise.shrinker,
        "gate": _gate(denoise),
        "rescale": denoise.rescale,
        "below_edge": denoise.below_edge,
        "blend": denoise.blend,
        "svd": denoise.svd,
        **STRUCTURES[denoise.structure],
        "sharding": by_matrix(mesh) if mesh.size > 1 else None,
    }


def _gate(denoise: ConfigDict) -> Gate:
    if denoise.gate == "tracy_widom":
        return TracyWidom(denoise.false_alarm, per=denoise.gate_per)
    return Kappa(denoise.kappa, per=denoise.gate_per)
