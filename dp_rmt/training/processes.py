"""Several processes make one run: each computes on its own devices and reads its own rows, and the first one writes.

All processes run the same program on the same config. They differ in two things: each puts other rows of a batch on
its devices, and only the first writes metrics and reports. All of them write checkpoints, each its part.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dp_rmt.data.batches import gather_batch
from dp_rmt.extras import extra
from dp_rmt.training.partitioning import by_example

with extra("finetune"):
    import orbax.checkpoint as ocp

AUTO = "auto"
LONGEST_WAIT = 24 * 3600
"""Seconds that the other processes wait while the first works alone, such as on writing texts for a test set."""
_WAITS = itertools.count()


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = 100,
) -> None:
    """Joins the run's other processes (`jax.distributed.initialize`). Call it before anything asks for a device.

    Args:
      coordinator_address: ``host:port`` of the first process; "auto" on TPU pods, Slurm and Open MPI, which know this
        and the next two; None for a run of one process.
      num_processes: number of processes of the run.
      process_id: this process's own number, counted from 0.
      heartbeat_timeout_seconds: the processes end when one of them has not been heard of for so long.

    Raises:
      ValueError: numbers without an address, or an address without numbers.
    """
    given = {"--num_processes": num_processes, "--process_id": process_id}
    if coordinator_address is None:
        if any(number is not None for number in given.values()):
            raise ValueError(
                "--num_processes and --process_id need --coordinator_address: host:port of the first process, or "
                f"{AUTO!r} on TPU pods, Slurm and Open MPI"
            )
        return
    if coordinator_address == AUTO:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout_seconds)
        return
    missing = [name for name, number in given.items() if number is None]
    if missing:
        raise ValueError(f"--coordinator_address={coordinator_address} needs {' and '.join(missing)}, too")
    jax.distributed.initialize(
        coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_timeout_seconds
    )


def is_first() -> bool:
    """Whether this process is the one that writes; true in a run of one process."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has called it. All processes must call it at the same places in the same order."""
    if jax.process_count() > 1:
        key = f"dp_rmt {next(_WAITS)} {name}"  # no two keys of a run may be the same
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=LONGEST_WAIT * 1000)


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """The first process runs the block alone; the others run it afterwards and find the files of the first."""
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


def of_first(number: int) -> int:
    """The first process's number, of up to 128 bits, in every process: all need the same seeds from entropy."""
    if jax.process_count() == 1:
        return number
    words = np.array([number >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)], np.uint32)
    words = np.asarray(multihost_utils.broadcast_one_to_all(words))
    return sum(int(word) << shift for word, shift in zip(words, (0, 32, 64, 96), strict=True))


def to_devices(
    groups: Sequence[tuple[Mapping[str, np.ndarray], np.ndarray]], mesh: Mesh
) -> tuple[tuple[dict[str, jax.Array], jax.Array], ...]:
    """A batch as global arrays, of which each process reads the rows of its own devices and no others.

    Args:
      groups: for each length group the data set and the examples (B,) in it, or its users with their rows (B, rows),
        -1 for padding (`dp_rmt.data.length_groups.rows_of_groups`); the same in every process.
      mesh: the devices; its `batch_parts` must divide B.

    Returns:
      ``(batch, is_padding_example)`` for each group, as `gather_batch` gives it.
    """
    sharding = by_example(mesh)

    def batch_of(arrays: Mapping[str, np.ndarray], examples: np.ndarray) -> tuple[dict[str, jax.Array], jax.Array]:
        def array_of(name: str) -> jax.Array:
            def rows(index: Any) -> np.ndarray:
                return gather_batch({name: arrays[name]}, examples[index[0]])[0][name]

            return jax.make_array_from_callback((*examples.shape, *arrays[name].shape[1:]), sharding, rows)

        is_padding = jax.make_array_from_callback(examples.shape, sharding, lambda index: examples[index] < 0)
        return {name: array_of(name) for name in arrays}, is_padding

    return tuple(batch_of(arrays, examples) for arrays, examples in groups)


def to_host(tree: Any) -> Any:
    """The tree, in which arrays that other processes hold parts of become whole NumPy arrays.

    All processes must call it together.
    """

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return np.asarray(leaf if leaf.is_fully_replicated else multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(whole, tree)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at once, with its message, if it fails while there are others.

    Otherwise it would wait for the others when it leaves, and they for it. They end when its heartbeat stops.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or (isinstance(error, SystemExit) and not isinstance(error.code, str)):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        process = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{process} ends, and with it the others: {error}", file=sys.stderr)
        print("Checkpoints are as they were: run the same command again in all processes.", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # not sys.exit, which waits for the processes that wait for this one
