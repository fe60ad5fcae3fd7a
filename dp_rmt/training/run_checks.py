"""Checks before a run's first step: what is wrong with it, and what its user ought to know."""

from __future__ import annotations

import jax
import numpy as np
from absl import logging

from dp_rmt import environment
from dp_rmt.clipping.execution import Execution
from dp_rmt.denoising.gradient import DenoiseState
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import GaussianNoiseState, noise_key
from dp_rmt.training import processes
from dp_rmt.training.guarantee import check_delta
from dp_rmt.training.private_scores import PrivateScores
from dp_rmt.training.task import Task
from dp_rmt.training.train import TrainLoop
from dp_rmt.training.train_state import TrainState


def warn_of_unprepared_process() -> None:
    """Warns on a CPU if `dp_rmt.environment.prepare` was not called, as in a notebook; the programs call it."""
    if (advice := environment.unprepared()) is not None:
        logging.warning("%s", advice)


def check_numbers(name: str, task: Task, mechanism: DPSGD, delta: float) -> None:
    """Raises ValueError unless the mechanism is for the task's units and delta is well below 1 / N."""
    mechanism.check_users(task.users)
    if mechanism.num_examples != task.num_units:
        raise ValueError(
            f"the mechanism accounts for {mechanism.num_examples:,} {mechanism.unit}s and the task has "
            f"{task.num_units:,}: give num_examples=task.num_units"
        )
    if mechanism.noise_multiplier > 0:
        check_delta(delta, mechanism.num_examples, unit=mechanism.unit)
        _warn_of_large_delta(name, mechanism, delta)


def _warn_of_large_delta(name: str, mechanism: DPSGD, delta: float) -> None:
    """Warns of a delta of 1 / N or more, at which a mechanism may publish an example, or a user's rows, outright."""
    if delta * mechanism.num_examples >= 1:
        logging.warning(
            "%s: delta=%g is at least 1 / N = %.3g of the %d training %ss. At such a delta the guarantee allows "
            "publishing one outright, and the statement will say so; set it well below, such as to N^-1.1",
            name,
            delta,
            1 / mechanism.num_examples,
            mechanism.num_examples,
            mechanism.unit,
        )


def check_noise(state: TrainState, mechanism: DPSGD, noise_seed: int) -> None:
    """Raises ValueError unless the noise's state has the key of the run's seed."""
    is_noise = lambda node: isinstance(node, GaussianNoiseState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state.noise, is_leaf=is_noise) if is_noise(node)]
    wanted = jax.random.key_data(noise_key(noise_seed, mechanism.noise_generator))
    if len(found) != 1 or not np.array_equal(processes.to_host(found[0].key), wanted):
        raise ValueError(
            "the transforms' noise is not that of the run's seed: let the function return "
            "Transforms(noise=mechanism.noise(noise_key(noise_seed)), ...) of the mechanism and the noise_seed that it "
            "is called with (dp_rmt.noise_addition.noise_key; with noise_generator='chacha20' it is "
            "noise_key(noise_seed, 'chacha20'))"
        )


def check_private_scores(private_scores: PrivateScores, num_steps: int, eval_every: int, task: Task) -> None:
    """Raises ValueError unless the scores were accounted for as the run computes them."""
    given = private_scores.num_steps, private_scores.eval_every, set(private_scores.rows)
    wanted = num_steps, eval_every, set(task.evaluators)
    if given != wanted:
        raise ValueError(
            f"private_scores accounts for (num_steps, eval_every, data) = {given}, and the run has {wanted}: give it "
            "the numbers of the run, and the rows of each of its evaluation data"
        )
    if not private_scores.content:
        raise ValueError(
            "private_scores does not say what its evaluation data is, so that a run could go on with other rows and "
            "the same noise, which would cancel: give content=, such as dp_rmt.data.fingerprint of the rows"
        )


def warn_of_nothing_to_denoise(name: str, state: TrainState) -> None:
    """Warns where the transforms have a denoiser but no trained parameter is a matrix."""
    is_denoiser = lambda node: isinstance(node, DenoiseState)  # noqa: E731
    found = jax.tree.leaves((state.denoise, state.optimizer), is_leaf=is_denoiser)
    denoisers = [node for node in found if is_denoiser(node)]
    if denoisers and not any(denoiser.diagnostics for denoiser in denoisers):
        logging.warning(
            "%s: the denoiser has no matrix among what is trained, so this is the run without denoising: train "
            "matrices, too, or leave the denoiser out",
            name,
        )


def trace_step(loop: TrainLoop, state: TrainState, execution: Execution) -> None:
    """Traces a step, so that what clipping refuses is refused here; the first step uses the same trace."""
    nobody = np.full_like(loop.mechanism.sampling(0, loop.users).indices(0), -1)
    try:
        jax.eval_shape(loop.train_step, state, loop.groups(nobody))
    except ValueError as error:
        raise ValueError(
            f"clipping_method={execution.clipping_method!r} does not fit this model: {error}. Let the pattern of what "
            "is trainable match all other parameters, or give clipping_method='vmap' (slower; each example's gradient "
            "takes the memory of the model)"
        ) from error
