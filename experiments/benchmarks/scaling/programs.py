"""A private step of a decoder, compiled for many virtual devices and never run: shapes are all it takes.

    XLA_FLAGS=--xla_force_host_platform_device_count=64 python -m experiments.benchmarks.scaling.programs 8 8 1 noisy

prints, as JSON, what one device does on a mesh of 8 (data) x 8 (fsdp) x 1 (tensor) devices. A process of its own for
each, since the number of devices is fixed when JAX starts; `experiments.benchmarks.scaling.main` and
`experiments.benchmarks.scaling.memory` start them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dp_rmt.clipping.execution import Execution
from dp_rmt.clipping.microbatch_size import bytes_needed
from dp_rmt.mechanism import DPSGD
from dp_rmt.models import CausalLanguageModel, DecoderConfig, init_params
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.losses import causal_lm_loss
from dp_rmt.training.partitioning import batch_parts, by_matrix, jit_train_step, make_mesh
from dp_rmt.training.sharding_rules import state_shardings
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import TrainStep, make_train_step
from experiments.benchmarks.scaling.hlo import cost_of
from experiments.benchmarks.step.models import MODELS


class Problem(NamedTuple):
    """What a step is compiled for.

    Attributes:
      config: the decoder's.
      tokens: of each example.
      examples_per_part: examples that a device, or those that share a layer's work, differentiate at once.
      microbatches: how many times in a step.
    """

    config: DecoderConfig
    tokens: int
    examples_per_part: int
    microbatches: int = 1


# Sides that 256 devices divide, and wide enough for the norms to be ghost norms (2 T < I), as those of an 8B model are.
CONFIG = DecoderConfig(
    512, 256, 4, 8, 4, head_dim=32, intermediate_size=768, max_position_embeddings=64, tie_word_embeddings=False
)
_QWEN3_4B: Any = dataclasses.replace(MODELS["qwen3_4b"], dtype=jnp.dtype(jnp.bfloat16))
PROBLEMS = {
    "small": Problem(CONFIG, 64, 2),
    "qwen3_4b": Problem(_QWEN3_4B, 512, 1, microbatches=4),
    # The same structure for a test: parameters outweigh activations, and its matrices are small enough to compile soon.
    "shrunken": Problem(
        dataclasses.replace(
            _QWEN3_4B,
            vocab_size=512,
            hidden_size=96,
            num_layers=32,
            num_heads=4,
            num_kv_heads=4,
            head_dim=24,
            intermediate_size=192,
            max_position_embeddings=8,
        ),
        8,
        1,
    ),
}
KINDS = ("plain", "noisy", "denoised")
"""The gradient of the mean loss and Adam; clipped, with noise; and denoised (subspace)."""


def compiled_step(mesh: jax.sharding.Mesh, variant: str, problem: Problem = PROBLEMS["small"]) -> jax.stages.Compiled:
    """A step, all of it, as it is trained with: the state is donated.

    Args:
      mesh: from `dp_rmt.training.partitioning.make_mesh`.
      variant: one of `KINDS`, then ``_remat`` for layers that are computed again, and ``_ghost`` for clipping by that
        instead of book-keeping.
      problem: model and batch.

    Returns:
      The executable, made of shapes alone.
    """
    kind, *options = variant.split("_")
    module = CausalLanguageModel(dataclasses.replace(problem.config, remat="remat" in options))
    at_once = problem.examples_per_part * batch_parts(mesh)
    batch_size = at_once * problem.microbatches
    mechanism = DPSGD(
        num_examples=100 * batch_size,
        expected_batch_size=batch_size,
        num_steps=10,
        noise_multiplier=1.0,
        l2_clip_norm=1.0,
        max_batch_size=batch_size,
    )
    microbatch_size = at_once if problem.microbatches > 1 else None
    execution = Execution("ghost" if "ghost" in options else "bookkeeping", microbatch_size)
    transforms = Transforms(
        optax.identity() if kind == "plain" else mechanism.noise(noise_key(0)),
        mechanism.denoiser(svd="subspace", sharding=by_matrix(mesh)) if kind == "denoised" else optax.identity(),
        optax.adam(1e-3),
    )

    def losses(params: Any, batch: Any) -> jax.Array:
        ids_BxL, mask_BxL = batch["input_ids"], batch["attention_mask"]
        logits_BxLxV: Any = module.apply({"params": params}, ids_BxL, mask_BxL)
        return causal_lm_loss(logits_BxLxV, ids_BxL, mask_BxL)

    params = jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
    state = jax.eval_shape(lambda params: TrainState.create(transforms, params, {}), params)
    shardings = state_shardings(state, mesh)
    ids_BxL = jax.ShapeDtypeStruct((batch_size, problem.tokens), jnp.int32)
    group = ({"input_ids": ids_BxL, "attention_mask": ids_BxL}, jax.ShapeDtypeStruct((batch_size,), jnp.bool))
    if kind == "plain":
        step = _plain_step(losses, transforms, batch_size, microbatch_size, shardings.params)
    else:
        step = make_train_step(
            mechanism, losses, transforms, execution=execution, nonprivate_metrics=False, layout=shardings.params
        )
    jitted: Any = jit_train_step(step, mesh, shardings)
    return jitted.lower(state, [group]).compile()


def _plain_step(
    losses: Any, transforms: Transforms, batch_size: int, microbatch_size: int | None, layout: Any
) -> TrainStep:
    """What a step without privacy is, its microbatches added up as those of a private one are."""
    gradient: Any = jax.grad(lambda params, batch: jnp.sum(losses(params, batch)) / batch_size)
    if microbatch_size is not None:
        add = optax.microbatching.AccumulationType.SUM
        gradient = optax.microbatching.microbatch(gradient, argnums=1, microbatch_size=microbatch_size, accumulator=add)

    def step(state: TrainState, groups: Any) -> tuple[TrainState, dict[str, Any]]:
        ((batch, _),) = groups
        grads = jax.lax.with_sharding_constraint(gradient(state.params, batch), layout)
        updates, optimizer = transforms.optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, optimizer=optimizer), {}

    return step


def main(data: int, fsdp: int, tensor: int, variant: str, problem: str = "small") -> None:
    """Prints the record of one program."""
    mesh = make_mesh(data, fsdp, tensor)
    compiled: Any = compiled_step(mesh, variant, PROBLEMS[problem])
    cost, memory = cost_of(compiled.as_text()), compiled.memory_analysis()
    record = {
        "problem": problem,
        "variant": variant,
        "devices": mesh.size,
        "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
        "examples": PROBLEMS[problem].examples_per_part * PROBLEMS[problem].microbatches * batch_parts(mesh),
        "matrix_flops": cost.matrix_flops,
        "collectives": [
            {"kind": kind, "devices": n, "payload_bytes": size} for (kind, n), size in sorted(cost.payload.items())
        ],
        "sent_bytes": cost.sent,
        "unknown_loops": cost.unknown_loops,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "needed_bytes": bytes_needed(compiled),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
