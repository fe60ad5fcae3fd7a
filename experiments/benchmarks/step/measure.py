"""Measures the arms of the step profiler side by side: chooses microbatches, checks the sums, then times in turns."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.rounds import alternate, median_ratio, timed
from experiments.benchmarks.step.models import Workload
from experiments.benchmarks.step.programs import (
    WITH_MICROBATCHES,
    Program,
    compile_program,
    out_of_memory,
    relative_error,
)

# Largest difference of a sum of clipped gradients from clipped_grad's, relative to its norm. Float32 products of an
# NVIDIA GPU have 10 bits of mantissa (TF32), bfloat16 has 7; a dozen layers add up. On the CPU it is the bound of
# rounding that norms contain: 2e-4 of a norm where 512 tokens nearly cancel (rescaled by it, sums agree to 1e-6). What
# the check is to find, a norm without one of its leaves or a mean in the place of a sum, is of order one.
TOLERANCE = {("float32", "cpu"): 1e-3, ("float32", "gpu"): 2e-2, ("bfloat16", "cpu"): 0.1, ("bfloat16", "gpu"): 0.1}


def measure(
    workload: Workload,
    arms: Sequence[str],
    *,
    repeats: int,
    l2_clip_norm: float,
    sizes: Sequence[int],
    memory_budget: float,
    progress: Any = print,
) -> dict[str, Any]:
    """Everything that the record says of the arms.

    Args:
      workload: model and batch.
      arms: names; "plain" comes first whether it is among them or not.
      repeats: rounds of timed steps.
      l2_clip_norm: of the clipped arms.
      sizes: microbatch sizes to try, the largest first.
      memory_budget: bytes of temporary memory and outputs that a program may need.
      progress: called with one line at a time.

    Returns:
      ``{"arms": {name: numbers}, "clipped_fraction": ..., "matrix_teraflops": ...}``.

    Raises:
      RuntimeError: the plain gradient cannot be computed, or an arm's sum is not that of `dp_rmt.clipped_grad`.
      ValueError: the model refuses the batch.
    """
    compile_ = functools.partial(compile_program, workload, l2_clip_norm=l2_clip_norm, memory_budget=memory_budget)
    batch_size = len(jax.tree.leaves(workload.batch)[0])
    programs: dict[str, list[Program]] = {}
    for arm in dict.fromkeys(("plain", *arms)):
        candidates = [None if size == batch_size else size for size in sizes] if arm in WITH_MICROBATCHES else [None]
        progress(f"compiling {arm}")
        programs[arm] = _compile_all(compile_, arm, candidates)
    if programs["plain"][0].reason:
        raise ValueError(f"the plain gradient cannot be computed: {programs['plain'][0].reason}")
    _first_runs([program for group in programs.values() for program in group], workload, progress)
    chosen = {arm: _fastest(group) for arm, group in programs.items()}
    runnable = {arm: program for arm, program in chosen.items() if program.reason is None}
    progress("checking the sums")
    clipped_fraction = _check(runnable, workload, l2_clip_norm, functools.partial(compile_, "vmap"), sizes)
    progress(f"timing {repeats} rounds of {', '.join(runnable)}")
    rate = matrix_rate(workload.config.dtype)
    rounds = alternate({arm: functools.partial(_run, p, workload) for arm, p in runnable.items()}, repeats)
    return {
        "clipped_fraction": clipped_fraction,
        "matrix_teraflops": rate / 1e12,
        "arms": {arm: _numbers(arm, chosen, programs[arm], rounds, batch_size, rate) for arm in chosen},
    }


def matrix_rate(dtype: Any) -> float:
    """FLOP/s of a large square matrix product: what the device reaches at best in this dtype."""
    size, calls = (8192, 20) if jax.default_backend() == "gpu" else (2048, 1)
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    # Several calls in a row, so that the device does not wait for the host.
    trials = [timed(lambda: jax.block_until_ready([product(matrix, matrix) for _ in range(calls)])) for _ in range(3)]
    return calls * 2 * size**3 / min(trials)


def _compile_all(compile_: Any, arm: str, candidates: Sequence[int | None]) -> list[Program]:
    """The programs of all candidates; only one where the first shows that the others would fail likewise."""
    programs: list[Program] = []
    for size in candidates:
        programs.append(compile_(arm, microbatch_size=size))
        if programs[-1].compiled is None and not (programs[-1].reason or "").startswith("does not fit"):
            break
    return programs


def _first_runs(programs: Sequence[Program], workload: Workload, progress: Any) -> None:
    """Warms up every program, and times one step of those with rivals of the same arm.

    A device's peak of memory is since the start of the process. Hence the order, the smallest first: what a program
    adds to the peak is then its own; where it adds nothing, its peak is not known.
    """
    device = jax.devices()[0]
    ready = [program for program in programs if program.reason is None]
    for program in sorted(ready, key=lambda program: program.facts["temp_bytes"]):
        before = _peak(device)
        try:
            progress(f"first step of {program.arm}, microbatch {program.microbatch_size or 'whole'}")
            program.facts["first_seconds"] = timed(functools.partial(_run, program, workload))
        except jax.errors.JaxRuntimeError as error:
            program.reason = out_of_memory(error)
            continue
        after = _peak(device)
        program.facts["peak_bytes"] = after if after is not None and before is not None and after > before else None
        if sum(other.arm == program.arm for other in ready) > 1:
            program.facts["trial_seconds"] = timed(functools.partial(_run, program, workload))


def _run(program: Program, workload: Workload) -> None:
    """One step; returns nothing, so that its outputs are freed."""
    program.run(workload)


def _peak(device: Any) -> int | None:
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def _fastest(programs: Sequence[Program]) -> Program:
    """The quickest of an arm's programs; the last of them if none can be run."""
    ready = [program for program in programs if program.reason is None]
    return min(ready, key=lambda program: program.facts.get("trial_seconds", 0.0)) if ready else programs[-1]


def _check(
    runnable: Mapping[str, Program], workload: Workload, l2_clip_norm: float, compile_vmap: Any, sizes: Sequence[int]
) -> float | None:
    """Compares every arm's sum with clipped_grad's; returns the fraction of examples that were clipped."""
    clipped = [arm for arm in runnable if arm not in ("plain", "vmap")]
    reference = runnable.get("vmap") or (compile_vmap(microbatch_size=sizes[-1]) if clipped else None)
    if reference is None:
        return None
    if reference.reason:
        raise RuntimeError(f"clipped_grad, which all sums are checked against: {reference.reason}; use a smaller batch")
    expected, per_example = reference.run(workload)
    tolerance = TOLERANCE[jnp.dtype(workload.config.dtype).name, "cpu" if jax.default_backend() == "cpu" else "gpu"]
    for arm in clipped:
        error = relative_error(runnable[arm].run(workload)[0], expected)
        runnable[arm].facts["relative_error"] = error
        if not error <= tolerance:
            raise RuntimeError(
                f"{arm}: its sum of clipped gradients differs from that of dp_rmt.clipped_grad by {error:.2g} of its "
                f"norm (allowed {tolerance:g}); times of a wrong result mean nothing"
            )
    return float(jnp.mean(per_example.grad_norm > l2_clip_norm))


def _numbers(
    arm: str,
    chosen: Mapping[str, Program],
    trials: Sequence[Program],
    rounds: Mapping[str, list[float]],
    batch_size: int,
    rate: float,
) -> dict[str, Any]:
    """One arm of the record; ratios are to the plain gradient."""
    program, plain = chosen[arm], chosen["plain"]
    numbers: dict[str, Any] = {"reason": program.reason, "microbatch_size": program.microbatch_size, **program.facts}
    if arm in WITH_MICROBATCHES:
        numbers["trials"] = [{"microbatch_size": p.microbatch_size, "reason": p.reason, **p.facts} for p in trials]
    for name in ("temp_bytes", "matrix_flops"):
        if name in program.facts:
            numbers[f"{name}_ratio"] = program.facts[name] / max(plain.facts[name], 1)
    if arm in rounds:
        seconds = statistics.median(rounds[arm])
        numbers |= {
            "seconds_of_rounds": rounds[arm],
            "seconds": seconds,
            "time_ratio": median_ratio(rounds[arm], rounds["plain"]),
            "examples_per_second": batch_size / seconds,
            # Of the operations that a plain gradient needs; what an arm computes besides is no achievement.
            "teraflops": plain.facts["matrix_flops"] / seconds / 1e12,
            "fraction_of_matrix_rate": plain.facts["matrix_flops"] / seconds / rate,
        }
    return numbers
