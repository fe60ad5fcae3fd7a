"""What denoising adds to a whole private update: clip, noise, denoise, Adam, on one batch, side by side."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import optax

import dp_rmt
from dp_rmt.denoising.matrix_denoiser import Backend
from dp_rmt.types import Params
from experiments.benchmarks.rounds import alternate, median_ratio
from experiments.benchmarks.step.models import Workload

NOISE_MULTIPLIER = 0.6
"""About that of SST-2 at epsilon 8; the gradient of random weights on random tokens is then below the noise."""


def make_update(
    workload: Workload, backend: Backend | None, *, l2_clip_norm: float, microbatch_size: int | None
) -> Callable[..., Any]:
    """``(trainable, frozen, batch) -> (Adam's update, what clipping tells of each example)``, from fresh states.

    Args:
      workload: model and batch.
      backend: of the denoiser; None for a noisy update.
      l2_clip_norm: of each example's gradient.
      microbatch_size: examples differentiated at once; None for all.

    Returns:
      A function to be compiled. The subspace backend starts from nothing, as only a run's first update does.
    """
    batch_size = len(jax.tree.leaves(workload.batch)[0])
    noise_std = NOISE_MULTIPLIER * l2_clip_norm / batch_size
    stages = [dp_rmt.add_gaussian_noise(noise_std, jax.random.key(0)), optax.scale_by_adam()]
    if backend is not None:
        stages.insert(1, dp_rmt.denoise_matrices(noise_std, svd=backend))
    transform = optax.chain(*stages)

    def update(trainable: Params, frozen: Params, batch: Any) -> Any:
        clipped_grad = dp_rmt.ghost_clipped_grad(
            lambda params, examples: workload.per_example_losses(params, frozen, examples),
            l2_clip_norm=l2_clip_norm,
            normalize_by=batch_size,
            method="auto",
            microbatch_size=microbatch_size,
        )
        gradient, per_example = clipped_grad(trainable, batch, is_padding_example=None)
        return transform.update(gradient, transform.init(trainable), trainable)[0], per_example

    return update


def measure_updates(
    workload: Workload,
    backends: Sequence[str],
    *,
    repeats: int,
    l2_clip_norm: float,
    microbatch_size: int | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Times a noisy update and denoised ones in turns.

    Args:
      workload: model and batch.
      backends: of the denoiser.
      repeats: rounds.
      l2_clip_norm: of each example's gradient.
      microbatch_size: examples differentiated at once; None for all.
      progress: called with one line at a time.

    Returns:
      For the noisy update and each backend, seconds, and ``time_ratio`` to the noisy update of the same round.

    Raises:
      ValueError: a backend is unknown.
    """
    unknown = sorted(set(backends) - set(get_args(Backend)))
    if unknown:
        raise ValueError(f"--updates={','.join(unknown)} is unknown; choose among {', '.join(get_args(Backend))}")
    runs = {}
    for name in ("noisy", *backends):
        progress(f"compiling the {name} update")
        backend: Any = None if name == "noisy" else name
        update = make_update(workload, backend, l2_clip_norm=l2_clip_norm, microbatch_size=microbatch_size)
        arguments = (workload.trainable, workload.frozen, workload.batch)
        runs[name] = functools.partial(_run, jax.jit(update).lower(*arguments).compile(), arguments)
    for name, run in runs.items():
        progress(f"first {name} update")
        run()
    progress(f"timing {repeats} rounds of {', '.join(runs)}")
    rounds = alternate(runs, repeats)
    return {
        name: {
            "seconds_of_rounds": seconds,
            "seconds": statistics.median(seconds),
            "time_ratio": median_ratio(seconds, rounds["noisy"]),
            "microbatch_size": microbatch_size,
        }
        for name, seconds in rounds.items()
    }


def _run(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> None:
    """One update, to its end; returns nothing, so that it is freed."""
    jax.block_until_ready(compiled(*arguments))
