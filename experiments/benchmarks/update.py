"""What denoising and whitening add to a whole private update (clip, noise, Adam), on one batch, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast, get_args

import jax
import optax

import dp_rmt
from dp_rmt.clipping.coordinates import Coordinates
from dp_rmt.denoising.matrix_denoiser import Backend
from dp_rmt.finetuning.settings import Whitening
from dp_rmt.geometry.layer_moments import layer_moments
from dp_rmt.geometry.whitening import coordinates_of, whiten_inputs, whitened_coordinates
from dp_rmt.types import Params
from experiments.benchmarks.looped_noise import add_looped_noise
from experiments.benchmarks.matrix_flops import matrix_flops
from experiments.benchmarks.rounds import alternate, median_ratio
from experiments.benchmarks.step.models import Workload

NOISE_MULTIPLIER = 0.6
"""About that of SST-2 at epsilon 8; the gradient of random weights on random tokens is then below the noise."""

NOISY, LOOPED, WHITENED = "noisy", "looped", ("whitened_after", "whitened_before")
ARMS = (NOISY, LOOPED, *get_args(Backend), *WHITENED)
ROWS = 32
"""Of the batch, from which the maps are made: their cost does not depend on their values."""


def make_update(
    workload: Workload, arm: str, *, l2_clip_norm: float, microbatch_size: int | None
) -> tuple[Callable[..., Any], Any]:
    """A private update with Adam: ``(trainable, frozen, batch, state) -> (update, what clipping tells, state)``.

    Args:
      workload: model and batch.
      arm: "noisy"; "looped", the same with JAX's own Threefry; a backend of the denoiser; or "whitened_after" or
        "whitened_before", which is where the inputs are whitened: behind Adam, or already before the clipping.
      l2_clip_norm: of each example's gradient.
      microbatch_size: examples differentiated at once; None for all.

    Returns:
      A function to be compiled, and its first state. The subspace backend starts from nothing, as only a run's first
      update does.
    """
    batch_size = len(jax.tree.leaves(workload.batch)[0])
    noise_std = NOISE_MULTIPLIER * l2_clip_norm / batch_size
    add_noise = add_looped_noise if arm == LOOPED else dp_rmt.add_gaussian_noise
    stages = [add_noise(noise_std, jax.random.key(0)), optax.scale_by_adam()]
    if arm in WHITENED:
        stages.append(whiten_inputs(_coordinates(workload)))
    elif arm not in (NOISY, LOOPED):
        stages.insert(1, dp_rmt.denoise_matrices(noise_std, svd=cast(Backend, arm)))
    transform = optax.chain(*stages)

    def update(trainable: Params, frozen: Params, batch: Any, state: Any) -> Any:
        clipped_grad = dp_rmt.ghost_clipped_grad(
            lambda params, examples: workload.per_example_losses(params, frozen, examples),
            l2_clip_norm=l2_clip_norm,
            normalize_by=batch_size,
            method="auto",
            microbatch_size=microbatch_size,
            coordinates=coordinates_of(state) if arm == "whitened_before" else None,
        )
        gradient, per_example = clipped_grad(trainable, batch, is_padding_example=None)
        new, state = transform.update(gradient, state, trainable)
        return new, per_example, state

    return update, transform.init(workload.trainable)


class CompiledUpdate(NamedTuple):
    """A private update as a compiled program, what it is called with, and the operations of its matrix products."""

    program: jax.stages.Compiled
    arguments: tuple[Any, ...]
    matrix_flops: int

    def run(self) -> None:
        """One update, to its end; returns nothing, so that it is freed."""
        jax.block_until_ready(self.program(*self.arguments))


def compile_update(workload: Workload, arm: str, *, l2_clip_norm: float, microbatch_size: int | None) -> CompiledUpdate:
    """Compiles `make_update`'s update, whose arguments these are, too."""
    batch_size = len(jax.tree.leaves(workload.batch)[0])
    update, state = make_update(workload, arm, l2_clip_norm=l2_clip_norm, microbatch_size=microbatch_size)
    arguments = (workload.trainable, workload.frozen, workload.batch, state)
    traced = jax.jit(update).trace(*arguments)
    flops = matrix_flops(traced.jaxpr, while_trips=batch_size // (microbatch_size or batch_size))
    return CompiledUpdate(traced.lower().compile(), arguments, flops)


def _coordinates(workload: Workload) -> Coordinates:
    """As `config.whitening` has them by default, from a few rows of the batch, whose tokens are random anyway."""
    rows = jax.tree.map(lambda leaf: leaf[:ROWS], workload.batch)
    moments = layer_moments(
        lambda params, examples: workload.per_example_losses(params, workload.frozen, examples),
        workload.trainable,
        [rows],
    )
    return whitened_coordinates(moments, rank=Whitening().rank)


def measure_updates(
    workload: Workload,
    arms: Sequence[str],
    *,
    repeats: int,
    l2_clip_norm: float,
    microbatch_size: int | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Times a noisy update, and denoised or whitened ones, in turns.

    Args:
      workload: model and batch.
      arms: some of `ARMS`; the noisy one comes first whether it is among them or not.
      repeats: rounds.
      l2_clip_norm: of each example's gradient.
      microbatch_size: examples differentiated at once; None for all.
      progress: called with one line at a time.

    Returns:
      For the noisy update and each arm: seconds, ``time_ratio`` to the noisy update of the same round, the operations
      of its matrix products (without those of decompositions), the bytes that its compiled program reads and writes
      (a loop's body counted once), those that it needs beside its arguments and results, and those of its state.

    Raises:
      ValueError: an arm is unknown.
    """
    if unknown := sorted(set(arms) - set(ARMS)):
        raise ValueError(f"--updates={','.join(unknown)} is unknown; choose among {', '.join(ARMS)}")
    updates = {}
    for name in dict.fromkeys((NOISY, *arms)):
        progress(f"compiling the {name} update")
        updates[name] = compile_update(workload, name, l2_clip_norm=l2_clip_norm, microbatch_size=microbatch_size)
    for name, compiled in updates.items():
        progress(f"first {name} update")
        compiled.run()
    progress(f"timing {repeats} rounds of {', '.join(updates)}")
    rounds = alternate({name: compiled.run for name, compiled in updates.items()}, repeats)
    return {
        name: {
            "seconds_of_rounds": seconds,
            "seconds": statistics.median(seconds),
            "time_ratio": median_ratio(seconds, rounds[NOISY]),
            "matrix_flops": updates[name].matrix_flops,
            "matrix_flops_ratio": updates[name].matrix_flops / updates[NOISY].matrix_flops,
            "bytes_accessed": (updates[name].program.cost_analysis() or {}).get("bytes accessed"),
            "temporary_bytes": getattr(updates[name].program.memory_analysis(), "temp_size_in_bytes", None),
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(updates[name].arguments[-1])),
            "microbatch_size": microbatch_size,
        }
        for name, seconds in rounds.items()
    }
