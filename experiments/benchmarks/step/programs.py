"""The arms of the step profiler as compiled programs, and what the compiler says of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import dp_rmt
from dp_rmt.types import Params, PerExampleLosses
from experiments.benchmarks.matrix_flops import matrix_flops
from experiments.benchmarks.step.models import Workload
from third_party.peers import JAX_PEERS, NotInstalledError, jax_driver

OWN_ARMS = ("plain", "vmap", "ghost", "bookkeeping")
ARMS = (*OWN_ARMS, *JAX_PEERS)
WITH_MICROBATCHES = ("vmap", *JAX_PEERS)
"""Arms that keep one gradient per example, for which a microbatch size has to be found."""

Step = Callable[[Params, Any], tuple[Params, Any]]
"""``(trainable, batch) -> (gradient, whatever else it computes)``."""


@dataclasses.dataclass
class Program:
    """One arm, compiled; or the reason why there is none.

    Attributes:
      arm: name.
      microbatch_size: examples differentiated at once; None for all.
      reason: why it cannot be run; None if it can.
      compiled: the executable, a function of (trainable, frozen, batch).
      facts: what the compiler says, under the names of the record.
    """

    arm: str
    microbatch_size: int | None = None
    reason: str | None = None
    compiled: jax.stages.Compiled | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, workload: Workload) -> Any:
        """One step, to its end: ``(gradient, rest)``."""
        assert self.compiled is not None
        return jax.block_until_ready(self.compiled(workload.trainable, workload.frozen, workload.batch))


def make_step(arm: str, losses: PerExampleLosses, l2_clip_norm: float, microbatch_size: int | None) -> Step:
    """The function that an arm times: the gradient of the mean loss (plain), or the sum of clipped gradients.

    Args:
      arm: one of `ARMS`.
      losses: ``(params, batch) -> (batch,)``.
      l2_clip_norm: of the clipped arms.
      microbatch_size: of those `WITH_MICROBATCHES`.

    Returns:
      The step.

    Raises:
      NotInstalledError: the peer's package is missing.
    """
    if arm == "plain":
        value_and_grad = jax.value_and_grad(lambda params, batch: jnp.mean(losses(params, batch)))
        return lambda params, batch: value_and_grad(params, batch)[::-1]
    if arm == "vmap":
        clipped_grad = dp_rmt.clipped_grad(losses, l2_clip_norm=l2_clip_norm, microbatch_size=microbatch_size)
    elif arm in OWN_ARMS:
        clipped_grad = dp_rmt.ghost_clipped_grad(losses, l2_clip_norm=l2_clip_norm, method=arm)  # type: ignore[arg-type]
    if arm in ("vmap", *OWN_ARMS):
        return partial(clipped_grad, is_padding_example=None)
    clipped_sum = jax_driver(arm)(losses, l2_clip_norm, microbatch_size)
    return lambda params, batch: (clipped_sum(params, batch), None)


def compile_program(
    workload: Workload, arm: str, *, l2_clip_norm: float, microbatch_size: int | None = None, memory_budget: float
) -> Program:
    """Compiles an arm for a workload; never fails, but says why there is no program.

    Args:
      workload: model and batch.
      arm: one of `ARMS`.
      l2_clip_norm: of the clipped arms.
      microbatch_size: None for the whole batch.
      memory_budget: bytes of temporary memory and outputs above which a program is not run.

    Returns:
      The program; ``reason`` is set if the arm was refused (ValueError), is not installed, or needs too much memory.
    """
    program = Program(arm, microbatch_size)
    batch_size = len(jax.tree.leaves(workload.batch)[0])

    def step(trainable: Params, frozen: Params, batch: Any) -> tuple[Params, Any]:
        losses: PerExampleLosses = lambda params, examples: workload.per_example_losses(params, frozen, examples)  # noqa: E731
        return make_step(arm, losses, l2_clip_norm, microbatch_size)(trainable, batch)

    start = time.perf_counter()
    try:
        traced = jax.jit(step).trace(workload.trainable, workload.frozen, workload.batch)
        program.compiled = traced.lower().compile()
    except NotInstalledError as error:
        program.reason = str(error)
        return program
    except ValueError as error:
        program.reason = f"refused: {' '.join(str(error).split())}"
        return program
    except jax.errors.JaxRuntimeError as error:
        program.reason = out_of_memory(error)
        return program
    memory: Any = program.compiled.memory_analysis()
    cost = program.compiled.cost_analysis()
    program.facts = {
        "compile_seconds": time.perf_counter() - start,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "matrix_flops": matrix_flops(traced.jaxpr, while_trips=batch_size // (microbatch_size or batch_size)),
        "cost_analysis_flops": (cost or {}).get("flops"),
    }
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    if needed > memory_budget:
        program.reason = f"does not fit: needs {needed / 1e9:.1f} GB of {memory_budget / 1e9:.1f} GB"
    return program


def out_of_memory(error: jax.errors.JaxRuntimeError) -> str:
    """The reason to record if the device ran out of memory; any other error is raised again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return "does not fit: the device ran out of memory"


def microbatch_sizes(batch_size: int, given: Sequence[int] | None = None) -> list[int]:
    """Candidates: those given that divide the batch, or a quarter of the one before, from the whole batch down.

    Args:
      batch_size: examples.
      given: the user's choice.

    Returns:
      Divisors of the batch, the largest first.

    Raises:
      ValueError: none of those given divides the batch.

    >>> microbatch_sizes(32), microbatch_sizes(32, [4, 7])
    ([32, 8, 2], [4])
    """
    if given is None:
        given, size = [], batch_size
        while size >= 1:
            given.append(size)
            size //= 4
    sizes = sorted({size for size in given if size >= 1 and batch_size % size == 0}, reverse=True)
    if not sizes:
        raise ValueError(f"--microbatch_sizes={','.join(map(str, given))}: none divides the batch of {batch_size}")
    return sizes


def relative_error(gradient: Params, reference: Params) -> float:
    """l2 distance over the l2 norm of the reference, over all leaves together."""

    def norm(tree: Params) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))

    distance = jax.jit(lambda a, b: norm(jax.tree.map(jnp.subtract, a, b)) / norm(b))
    return float(distance(gradient, reference))
