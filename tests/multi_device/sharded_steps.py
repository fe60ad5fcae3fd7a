"""A small private run of an encoder on several meshes, as a program: ``python sharded_steps.py MESH... OUT.npz``.

For each mesh, such as 2x4x1, it writes parameters and metrics after every step under ``MESH/step/path``, the noise of a
step under ``MESH/noise/path``, the compiled step's bytes per device, and how every leaf of the state lies.
"""

from __future__ import annotations

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_rmt.clipping.execution import Execution
from dp_rmt.mechanism import DPSGD
from dp_rmt.models import EncoderConfig, SequenceClassifier, init_params
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.advice import measure_steps
from dp_rmt.training.losses import classifier_logits, label_losses
from dp_rmt.training.partitioning import by_matrix, init_state, jit_train_step, make_mesh
from dp_rmt.training.train_state import Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.trees import leaves_by_path, split_params

BATCH, LENGTH, WORDS, NUM_STEPS = 16, 6, 40, 3
MECHANISM = DPSGD(
    num_examples=200,
    expected_batch_size=12.0,
    num_steps=NUM_STEPS,
    noise_multiplier=0.1,
    l2_clip_norm=0.3,
    max_batch_size=BATCH,
)
EXECUTION = Execution("bookkeeping", BATCH)
# 40 words and 6 positions: the first are divided by 8, the second not even by 4. All kernels of the layers have one
# shape, which keeps the denoiser's program small.
MODULE = SequenceClassifier(EncoderConfig("bert", WORDS, 32, 2, 4, 32, LENGTH, 2, 1e-12, 0), num_labels=2)


def sample(step: int) -> list:
    """The Poisson sample of a step as one group, with padding rows."""
    rng = np.random.default_rng(step)
    ids = rng.integers(1, WORDS, (BATCH, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (BATCH, 1))).astype(np.int32)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    batch["label"] = rng.integers(0, 2, BATCH).astype(np.int32)
    return [(batch, rng.random(BATCH) < 0.3)]


def run(mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """Blocks after every step: un-blocked loops over several virtual devices can hang (jaxlib 0.10.2)."""
    params, frozen = split_params(init_params(MODULE, jax.random.key(0)), "^(?!.*token_type)")
    denoise = MECHANISM.denoiser(svd="subspace", sharding=by_matrix(mesh) if mesh.size > 1 else None)
    optimizer = measure_steps(optax.adamw(0.05, eps=1e-3), MECHANISM.noise_std)
    transforms = Transforms(MECHANISM.noise(noise_key(4)), denoise, optimizer)
    logits = classifier_logits(MODULE)
    state, shardings = init_state(transforms, params, frozen, mesh)

    def losses(params, batch):
        return label_losses(logits(params, batch), batch["label"])

    step = make_train_step(MECHANISM, losses, transforms, execution=EXECUTION, layout=shardings.params)
    add_noise = jax.jit(lambda p, s: transforms.noise.update(p, s)[0], out_shardings=shardings.params)
    noise = jax.block_until_ready(add_noise(jax.tree.map(jnp.zeros_like, state.params), state.noise))
    compiled = jit_train_step(step, mesh, shardings).lower(state, sample(0)).compile()
    memory = compiled.memory_analysis()
    results = {"bytes": np.array([memory.argument_size_in_bytes, memory.temp_size_in_bytes])}
    for number in range(NUM_STEPS):
        state, metrics = jax.block_until_ready(compiled(state, sample(number)))
        found = leaves_by_path({"params": state.params, "metrics": metrics})
        results |= {f"{number}/{path}": np.asarray(leaf) for path, leaf in found}
    specs = {path: list(leaf.sharding.spec) for path, leaf in leaves_by_path(state)}
    results["specs"] = np.array(json.dumps(specs))
    return results | {f"noise/{path}": np.asarray(leaf) for path, leaf in leaves_by_path(noise)}


def main(names: list[str], out: str) -> None:
    results = {}
    for name in names:
        sizes = [int(size) for size in name.split("x")]
        mesh = make_mesh(*sizes, jax.devices()[: math.prod(sizes)])
        results |= {f"{name}/{path}": leaf for path, leaf in run(mesh).items()}
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
