"""The stages of a run's step, from its settings: noise, denoising, coordinates, optimizer, average."""

from __future__ import annotations

import inspect

import optax
from jax.sharding import Mesh

from dp_rmt.baselines.filters import without_look_ahead
from dp_rmt.baselines.iterates import average_iterates, averaged_params
from dp_rmt.clipping.coordinates import Coordinates
from dp_rmt.finetuning.settings import Named, Settings, Train
from dp_rmt.finetuning.transforms import OPTIMIZERS, name_and_options, named_stages
from dp_rmt.geometry.whitening import coordinates_of, whiten_inputs
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.advice import measure_steps
from dp_rmt.training.partitioning import by_matrix
from dp_rmt.training.train_state import Transforms


def build_transforms(
    settings: Settings, mechanism: DPSGD, noise_seed: int, mesh: Mesh, coordinates: Coordinates | None = None
) -> Transforms:
    """The stages of a run at the mechanism's noise level.

    Args:
      settings: of one arm.
      mechanism: its noise level goes to noise and denoiser, its num_steps to the schedule.
      noise_seed: secret, for private data.
      mesh: its devices share the denoiser's work.
      coordinates: those of `config.whitening`; None where it is "nowhere".

    Returns:
      `Transforms`. Where there is no noise nothing is denoised and the optimizer is the ordinary one.

    Raises:
      ValueError: a name or an option is unknown, or its value cannot be used; the message names the key.
    """
    denoise, optimizer = settings.denoise, settings.optimizer
    is_noisy = mechanism.noise_multiplier > 0
    if not is_noisy:
        denoise, optimizer = (), _without_denoising(optimizer)
    filled_in = {
        "noise_std": mechanism.noise_level,
        "learning_rate": learning_rate_schedule(settings.train, mechanism.num_steps),
        "sharding": by_matrix(mesh) if mesh.size > 1 else None,
    }
    denoiser, stepper = named_stages(denoise, optimizer, filled_in)
    where, decay = settings.whitening.where, settings.train.average_iterates
    whiten = optax.identity() if coordinates is None else whiten_inputs(coordinates)
    if where == "before_optimizer":
        denoiser = optax.chain(denoiser, whiten)
    if where == "after_optimizer":
        stepper = optax.chain(stepper, whiten)
    # The slope's law needs noise that is independent of the last step, as correlated noise is not.
    if settings.train.advice and is_noisy and mechanism.noise_strategy is None:
        stepper = measure_steps(stepper, mechanism.noise_std)  # of the update in the coordinates of the noisy gradient
    if where == "before_clipping":
        stepper = optax.chain(stepper, whiten)
    published = without_look_ahead if name_and_options(optimizer)[0] == "kalman_filter" else None
    if decay is not None:
        stepper, published = optax.chain(stepper, average_iterates(decay)), averaged_params
    return Transforms(
        mechanism.noise(noise_key(noise_seed, mechanism.noise_generator)),
        denoiser,
        stepper,
        published=published,
        coordinates=coordinates_of if where == "before_clipping" else None,
    )


def check_transforms(settings: Settings) -> None:
    """Raises the errors of `build_transforms` that need neither data nor model."""
    named_stages(settings.denoise, settings.optimizer, {"noise_std": 1.0, "learning_rate": 1.0, "sharding": None})
    _check_whitening(settings)
    _check_average(settings)


def _check_average(settings: Settings) -> None:
    """Raises ValueError where the points that the optimizer steps between are not the iterates to average."""
    decay = settings.train.average_iterates
    if decay is not None and name_and_options(settings.optimizer)[0] == "kalman_filter":
        raise ValueError(
            f"config.train.average_iterates={decay} does not go with config.optimizer kalman_filter, whose points are "
            "ahead of its iterates: let config.train.average_iterates be None, or take another config.optimizer"
        )


def _check_whitening(settings: Settings) -> None:
    where, (name, options) = settings.whitening.where, name_and_options(settings.optimizer)
    if where not in ("before_clipping", "after_optimizer"):
        return
    if name == "kalman_filter":
        raise ValueError(
            f"config.whitening.where={where!r} maps the updates of the optimizer, and kalman_filter looks ahead along "
            "its own, unmapped ones: take another optimizer, or whitening.where 'nowhere' or 'before_optimizer'"
        )
    own = inspect.signature(OPTIMIZERS[name]).parameters.get("weight_decay")  # optax.adamw has 1e-4 unless told
    decay = options.get("weight_decay", 0.0 if own is None else own.default)
    if decay:
        raise ValueError(
            f"config.whitening.where={where!r} maps the updates of the optimizer, so that weight_decay "
            f"{decay} would shrink some directions more than others: give weight_decay 0"
        )


def learning_rate_schedule(train: Train, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then linear decay to zero at num_steps, or constant."""
    peak, warmup = train.learning_rate, train.warmup_steps
    if warmup >= num_steps:
        raise ValueError(f"config.train.warmup_steps={warmup} must be less than the {num_steps} steps of the run")
    end = 0.0 if train.schedule == "linear" else peak
    decay = optax.linear_schedule(peak, end, num_steps - warmup)
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), decay], [warmup])


def _without_denoising(optimizer: Named) -> Named:
    """The optimizer that is left where there is no noise to remove."""
    name, options = name_and_options(optimizer)
    if name == "kalman_filter":
        return _without_denoising(options["optimizer"])
    if name in ("denoised_adam", "adam_bc"):
        shared = inspect.signature(optax.adamw).parameters
        return "adamw", {"weight_decay": 0.0, **{key: value for key, value in options.items() if key in shared}}
    return optimizer
