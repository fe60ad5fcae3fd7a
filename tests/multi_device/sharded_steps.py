"""A small private run of an encoder on several meshes, for a process of its own: ``python sharded_steps.py OUT.npz``.

For each mesh it writes parameters and metrics after every step under ``DATAxFSDPxTENSOR/step/path``, what plain noise
makes of the parameters under ``.../noise/path``, and the compiled step's bytes per device.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import optax

from dp_rmt.matrix_view import leaves_by_path
from dp_rmt.mechanism import DPSGD
from dp_rmt.models import EncoderConfig, SequenceClassifier, init_params
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.losses import classifier_logits, label_losses
from dp_rmt.training.partitioning import by_matrix, init_state, jit_train_step, make_mesh
from dp_rmt.training.train_state import Transforms, split_params
from dp_rmt.training.train_step import make_train_step

BATCH, LENGTH, WORDS, NUM_STEPS = 16, 6, 40, 3
MESHES = ((1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8))
MECHANISM = DPSGD(
    num_examples=200, expected_batch_size=12.0, num_steps=NUM_STEPS, noise_multiplier=0.1, l2_clip_norm=0.3,
    max_batch_size=BATCH, microbatch_size=BATCH, clipping_method="bookkeeping",
)  # fmt: skip
# 40 words and 6 positions: the first are divided by 8, the second not even by 4.
MODULE = SequenceClassifier(EncoderConfig("bert", WORDS, 32, 2, 4, 64, LENGTH, 2, 1e-12, 0), num_labels=2)


def sample(step: int, *, empty: bool = False) -> list:
    """The Poisson sample of a step as one group, with padding rows."""
    rng = np.random.default_rng(step)
    ids = rng.integers(1, WORDS, (BATCH, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (BATCH, 1))).astype(np.int32)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    batch["label"] = rng.integers(0, 2, BATCH).astype(np.int32)
    return [(batch, np.ones(BATCH, bool) if empty else rng.random(BATCH) < 0.3)]


def build(mesh: jax.sharding.Mesh, *, only_noise: bool = False):
    """The initial state and the compiled step."""
    params, frozen = split_params(init_params(MODULE, jax.random.key(0)), "(?!.*token_type)")
    noise = MECHANISM.noise(noise_key(4))
    sharding = by_matrix(mesh) if mesh.size > 1 else None
    denoise = MECHANISM.denoiser(svd="subspace", sharding=sharding)
    transforms = (
        Transforms(noise, optax.identity(), optax.sgd(1.0))
        if only_noise
        else Transforms(noise, denoise, optax.adamw(0.05, eps=1e-3))
    )
    logits = classifier_logits(MODULE)
    step = make_train_step(MECHANISM, lambda p, b: label_losses(logits(p, b), b["label"]), transforms)
    state, shardings = init_state(transforms, params, frozen, mesh)
    return state, jit_train_step(step, mesh, shardings)


def run(mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """Blocks after every step: un-blocked loops over several virtual devices can hang (jaxlib 0.10.2)."""
    state, step = build(mesh)
    compiled = step.lower(state, sample(0)).compile()
    memory = compiled.memory_analysis()
    results = {"bytes": np.array([memory.argument_size_in_bytes, memory.temp_size_in_bytes])}
    for number in range(NUM_STEPS):
        state, metrics = jax.block_until_ready(compiled(state, sample(number)))
        found = leaves_by_path({"params": state.params, "metrics": metrics})
        results |= {f"{number}/{path}": np.asarray(leaf) for path, leaf in found}
    specs = {path: str(leaf.sharding.spec) for path, leaf in leaves_by_path(state)}
    results["specs"] = np.array(json.dumps(specs))
    state, step = build(mesh, only_noise=True)
    state, _ = jax.block_until_ready(step(state, sample(0, empty=True)))
    return results | {f"noise/{path}": np.asarray(leaf) for path, leaf in leaves_by_path(state.params)}


def main(out: str) -> None:
    results = {"num_devices": np.array(jax.device_count())}
    for data, fsdp, tensor in MESHES:
        mesh = make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])
        results |= {f"{data}x{fsdp}x{tensor}/{path}": leaf for path, leaf in run(mesh).items()}
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
