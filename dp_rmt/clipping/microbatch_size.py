"""Finds how many examples fit into memory: compile, ask the compiler what it needs, and halve until it fits."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax

DEVICE_SHARE = 0.9
"""The usable share of what a device lends out: no allocator uses every byte, and a batch arrives during a step."""

HOST_SHARE = 0.5
"""The usable share of physical memory where the device is the CPU: the system and the data live there, too."""


def largest_microbatch_size(
    compile_step: Callable[[int], jax.stages.Compiled], *, batch_size: int, memory_budget: int | None = None
) -> int:
    """Finds the largest of the sizes B, about B/2, about B/4, ... whose compiled step fits into the budget.

    Sizes are divisors of B; each next one is the largest that is at most half the last. Every try compiles one program.
    A cheap stand-in for the whole step, such as its clipped gradient alone, saves time if it dominates the memory.

    Args:
      compile_step: maps a microbatch size to a compiled step, as from ``jax.jit(step).lower(...).compile()``. Nothing
        is run. If examples are divided over D devices, both it and `batch_size` are about one device.
      batch_size: B, the number of examples in a batch (of fixed shape, padding included).
      memory_budget: how many bytes there are on one device; None for `default_memory_budget`.

    Returns:
      The size. B itself means that no microbatches are needed.

    Raises:
      ValueError: not even one example at a time fits, an argument is out of range, or the compiler does not tell what
        it needs.

    >>> import jax.numpy as jnp
    >>> def compile_step(size):
    ...     in_loop = lambda x: jax.lax.map(lambda a: jnp.sort(jnp.sin(a)), x, batch_size=size).sum()
    ...     return jax.jit(in_loop).lower(jnp.ones((6, 1000))).compile()
    >>> largest_microbatch_size(compile_step, batch_size=6, memory_budget=2**20)
    6
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    budget = default_memory_budget() if memory_budget is None else memory_budget
    size = batch_size
    while (needed := _bytes_needed(compile_step, size)) is None or needed > budget:
        if size == 1:
            raise ValueError(
                f"one example at a time needs {'more than there is' if needed is None else f'{needed:,} bytes'}, and "
                f"the memory budget is {budget:,} bytes: shorten the sequences, rematerialise the layers, freeze "
                "parameters or use a larger device"
            )
        size = max(d for d in range(1, size // 2 + 1) if batch_size % d == 0)
    return size


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """The device memory that a running program needs: arguments, results, temporaries, and its own code.

    It is ``arguments + results - aliased + temporaries + code`` on one device, as the compiler planned them. Results
    that take the place of donated arguments are counted once. Host memory is not counted, nor are arrays that the
    program does not use.

    Args:
      compiled: from ``jax.jit(f).lower(...).compile()``.

    Returns:
      The number of bytes.

    Raises:
      ValueError: the backend does not tell.

    >>> import jax.numpy as jnp
    >>> bytes_needed(jax.jit(lambda x: x[:10]).lower(jnp.ones(1000, jnp.float32)).compile()) >= 4 * 1010
    True
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError("this backend does not tell how much memory a compiled step needs: give a microbatch size")
    size: int = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return size


def default_memory_budget() -> int:
    """The number of bytes that a step may use on one device.

    Returns:
      `DEVICE_SHARE` of what the device says that it lends out (``memory_stats()["bytes_limit"]``). Where it says
      nothing, as the CPU, `HOST_SHARE` of the physical memory over the number of devices. A container's own limit is
      not seen, so give a budget there.
    """
    devices = jax.local_devices()
    reported = (devices[0].memory_stats() or {}).get("bytes_limit")
    if reported:
        return int(DEVICE_SHARE * reported)
    return int(HOST_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices))


def _bytes_needed(compile_step: Callable[[int], jax.stages.Compiled], size: int) -> int | None:
    """The bytes that a step of this size needs; None if the compiler itself finds that it is too much."""
    try:
        return bytes_needed(compile_step(size))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
