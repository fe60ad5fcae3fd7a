"""A private step of a small decoder, compiled for many virtual devices and never run.

    XLA_FLAGS=--xla_force_host_platform_device_count=64 python -m experiments.scaling_programs 8 8 1 noisy

prints, as JSON, what one device does on a mesh of 8 (data) x 8 (fsdp) x 1 (tensor) devices. A process of its own for
each, since the number of devices is fixed when JAX starts; `experiments.scaling` starts them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dp_rmt.mechanism import DPSGD
from dp_rmt.models import CausalLanguageModel, DecoderConfig, init_params
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.losses import causal_lm_loss
from dp_rmt.training.partitioning import batch_parts, by_matrix, jit_train_step, make_mesh
from dp_rmt.training.sharding_rules import state_shardings
from dp_rmt.training.train_state import TrainState, Transforms, merge_params
from dp_rmt.training.train_step import TrainStep, make_train_step
from experiments.scaling_hlo import cost_of

TOKENS, EXAMPLES_PER_PART = 64, 2
# Sides that 256 devices divide, and wide enough for the norms to be ghost norms (2 T < I), as those of an 8B model are.
CONFIG = DecoderConfig(
    512, 256, 4, 8, 4, head_dim=32, intermediate_size=768, max_position_embeddings=TOKENS, tie_word_embeddings=False
)
VARIANTS = ("plain", "noisy", "denoised", "plain_remat", "noisy_remat")
"""The gradient of the mean loss and Adam; clipped by book-keeping, with noise; and denoised (subspace)."""


def compiled_step(mesh: jax.sharding.Mesh, variant: str) -> jax.stages.Compiled:
    """A step over `EXAMPLES_PER_PART` examples for each part of the batch.

    Args:
      mesh: from `dp_rmt.training.partitioning.make_mesh`.
      variant: one of `VARIANTS`.

    Returns:
      The executable, made of shapes alone.
    """
    module = CausalLanguageModel(dataclasses.replace(CONFIG, remat=variant.endswith("_remat")))
    is_plain = variant.startswith("plain")
    batch_size = EXAMPLES_PER_PART * batch_parts(mesh)
    mechanism = DPSGD(
        num_examples=100 * batch_size, expected_batch_size=batch_size, num_steps=10, noise_multiplier=1.0,
        l2_clip_norm=1.0, max_batch_size=batch_size, clipping_method="bookkeeping",
    )  # fmt: skip
    is_denoised = variant == "denoised"
    transforms = Transforms(
        optax.identity() if is_plain else mechanism.noise(noise_key(0)),
        mechanism.denoiser(svd="subspace", sharding=by_matrix(mesh)) if is_denoised else optax.identity(),
        optax.adam(1e-3),
    )

    def losses(params: Any, batch: Any) -> jax.Array:
        ids_BxL, mask_BxL = batch["input_ids"], batch["attention_mask"]
        logits_BxLxV: Any = module.apply({"params": params}, ids_BxL, mask_BxL)
        return causal_lm_loss(logits_BxLxV, ids_BxL, mask_BxL)

    step = make_train_step(mechanism, losses, transforms, nonprivate_metrics=False)
    params = jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
    state = jax.eval_shape(lambda params: TrainState.create(transforms, params, {}), params)
    ids_BxL = jax.ShapeDtypeStruct((batch_size, TOKENS), jnp.int32)
    group = ({"input_ids": ids_BxL, "attention_mask": ids_BxL}, jax.ShapeDtypeStruct((batch_size,), jnp.bool))
    chosen = _plain_step(losses, transforms) if is_plain else step
    jitted: Any = jit_train_step(chosen, mesh, state_shardings(state, mesh))
    return jitted.lower(state, [group]).compile()


def _plain_step(losses: Any, transforms: Transforms) -> TrainStep:
    """What a step without privacy is."""

    def step(state: TrainState, groups: Any) -> tuple[TrainState, dict[str, Any]]:
        ((batch, _),) = groups
        grads = jax.grad(lambda params: jnp.mean(losses(merge_params(params, state.frozen), batch)))(state.params)
        updates, optimizer = transforms.optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, state.frozen, state.noise, state.denoise, optimizer), {}

    return step


def main(data: int, fsdp: int, tensor: int, variant: str) -> None:
    """Prints the record of one program."""
    mesh = make_mesh(data, fsdp, tensor)
    compiled: Any = compiled_step(mesh, variant)
    cost, memory = cost_of(compiled.as_text()), compiled.memory_analysis()
    record = {
        "variant": variant,
        "devices": mesh.size,
        "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
        "examples": EXAMPLES_PER_PART * batch_parts(mesh),
        "matrix_flops": cost.matrix_flops,
        "collectives": [
            {"kind": kind, "devices": n, "payload_bytes": size} for (kind, n), size in sorted(cost.payload.items())
        ],
        "sent_bytes": cost.sent,
        "unknown_loops": cost.unknown_loops,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
