"""The microbatch size of a run: found by compiling its clipped gradient, and rounded up for the devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from dp_rmt.clipping.execution import ClippingMethod, Execution
from dp_rmt.clipping.microbatch_size import default_memory_budget, largest_microbatch_size
from dp_rmt.mechanism import DPSGD
from dp_rmt.training.partitioning import batch_parts
from dp_rmt.training.processes import of_first
from dp_rmt.training.task import Task
from dp_rmt.trees import merge_params, split_params
from dp_rmt.types import Batch, Params


def fitting_microbatch_size(
    task: Task, mechanism: DPSGD, clipping_method: ClippingMethod = "auto", mesh: Mesh | None = None
) -> int:
    """The largest power of two of examples (or users) whose clipped gradient fits into the memory of each device.

    It is also small enough to leave little padding. Each length group is padded to whole microbatches, by half of one
    on average, and this padding may be at most an eighth of the batch.

    Args:
      task: data and model.
      mechanism: gives the clipping and the expected size of a batch; its noise plays no part.
      clipping_method: as in `Execution`.
      mesh: the devices that examples are divided over; None for all devices.

    Returns:
      Examples differentiated at once, on all devices together.

    Raises:
      ValueError: not even one example fits.
    """
    num_devices = jax.device_count() if mesh is None else mesh.size
    trained, frozen = split_params(task.params, task.trainable)
    execution = Execution(clipping_method, microbatch_size=None)

    def clipped_sum(trained: Params, frozen: Params, batch: Batch) -> Params:
        def losses(params: Params, batch: Batch) -> jax.Array:
            return task.losses(merge_params(params, frozen), batch)

        norm = None if mechanism.clip_quantile is None else jnp.float32(mechanism.l2_clip_norm)
        gradient = mechanism.clipped_grad(losses, execution, clip_norm=norm)
        return gradient(trained, batch, is_padding_example=None)

    rows_of_unit = mechanism.sampling(0, task.users).indices(0).shape[1:]

    def compile_step(size: int) -> jax.stages.Compiled:
        shape = (size, *rows_of_unit)
        batch = {name: jax.ShapeDtypeStruct((*shape, *a.shape[1:]), a.dtype) for name, a in task.train.items()}
        return jax.jit(clipped_sum).lower(trained, frozen, batch).compile()

    # Beside the clipped gradient, the optimizer and the noise need about four more copies of what is trained.
    budget = default_memory_budget() - 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
    share = int(mechanism.expected_batch_size) // (4 * max(1, len(task.lengths)) * num_devices)
    largest = 1 << (max(share, 1).bit_length() - 1)
    size = of_first(largest_microbatch_size(compile_step, batch_size=largest, memory_budget=budget))
    logging.info("microbatches of %d %ss for each device", size, mechanism.unit)
    return size * num_devices


def microbatch_size_on(mesh: Mesh, execution: Execution, task: Task, mechanism: DPSGD) -> int | None:
    """The size of an execution's microbatches, rounded up so that the devices of a mesh divide it.

    Neither samples nor accounting change with it: the training loop pads a batch to whole microbatches.

    Args:
      mesh: the devices that examples are divided over.
      execution: as given; "auto" becomes `fitting_microbatch_size`.
      task: data and model.
      mechanism: gives the clipping and the largest size of a batch.

    Returns:
      A multiple of `batch_parts`, or None for the whole batch.
    """
    size, parts = execution.microbatch_size, batch_parts(mesh)
    if size == "auto":
        size = fitting_microbatch_size(task, mechanism, execution.clipping_method, mesh)
    if size is None and mechanism.truncation.max_batch_size % parts:
        size = mechanism.truncation.max_batch_size
    return None if size is None else -(-size // parts) * parts
