"""The microbatch size of a run, found by compiling its clipped gradient where the config leaves it open."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
from absl import logging

from dp_rmt.clipping.microbatch_size import default_memory_budget, largest_microbatch_size
from dp_rmt.finetuning.settings import Settings
from dp_rmt.mechanism import DPSGD
from dp_rmt.training.processes import of_first
from dp_rmt.trees import merge_params, split_params
from dp_rmt.types import Batch, Params

if TYPE_CHECKING:
    from dp_rmt.finetuning.tasks.task import Task


def with_microbatch_size(settings: Settings, task: Task) -> Settings:
    """Fills in ``train.microbatch_size`` where it is "auto": the largest power of two whose step fits into the memory.

    Not more than leaves little padding. The size becomes part of the run's identity: to resume on a machine with other
    memory, give the size that the first one found.

    Args:
      settings: of one arm.
      task: data and model.

    Returns:
      The settings; the same if they give a size.

    Raises:
      ValueError: not even one example fits.
    """
    if settings.train.microbatch_size != "auto":
        return settings
    trained, frozen = split_params(task.params, task.trainable)
    mechanism = DPSGD(
        num_examples=task.num_examples,
        expected_batch_size=settings.privacy.expected_batch_size,
        num_steps=1,
        l2_clip_norm=settings.privacy.l2_clip_norm,
        noise_multiplier=0.0,
        clip=settings.privacy.clip,
        clipping_method=settings.train.clipping_method,
    )

    def clipped_sum(trained: Params, frozen: Params, batch: Batch) -> Params:
        def losses(params: Params, batch: Batch) -> jax.Array:
            return task.losses(merge_params(params, frozen), batch)

        return mechanism.clipped_grad(losses)(trained, batch, is_padding_example=None)

    def compile_step(size: int) -> jax.stages.Compiled:
        batch = {name: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for name, a in task.train.items()}
        return jax.jit(clipped_sum).lower(trained, frozen, batch).compile()

    # What the optimizer and the noise need beside the clipped gradient: about four more copies of what is trained.
    budget = default_memory_budget() - 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
    # Each length group is padded to whole microbatches, by half of one on average: an eighth of the batch at most.
    groups = 1 + sum(length < settings.data.max_length for length in set(settings.data.length_groups))
    share = int(settings.privacy.expected_batch_size) // (4 * groups * jax.device_count())
    largest = 1 << (max(share, 1).bit_length() - 1)
    size = of_first(largest_microbatch_size(compile_step, batch_size=largest, memory_budget=budget))
    logging.info("microbatches of %d examples for each device", size)
    train = dataclasses.replace(settings.train, microbatch_size=size * jax.device_count())
    return dataclasses.replace(settings, train=train)
