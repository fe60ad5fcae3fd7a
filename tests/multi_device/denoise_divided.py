"""Denoises a tree three times, as a program for a process of its own: ``python denoise_divided.py OUT.npz``.

The matrices are divided over all devices there are; more than one device or not, the results must be the same.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dp_rmt import denoise_matrices, scale_by_denoised_adam
from dp_rmt.matrix_view import leaves_by_path
from dp_rmt.training.partitioning import data_mesh

STD = 0.1
TRANSFORMS = {
    "gram": lambda **options: denoise_matrices(STD, svd="gram", **options),
    "subspace": lambda **options: denoise_matrices(STD, svd="subspace", **options),
    "moment": lambda **options: scale_by_denoised_adam(STD, svd="gram", blend="stein", **options),
}


def updates(step: int) -> dict:
    """Two shapes, five and eleven matrices: neither is a multiple of the devices."""
    rng = np.random.default_rng(step)

    def stack(count: int, rows: int, cols: int) -> jax.Array:
        spikes = np.einsum("bi,bj->bij", rng.standard_normal((count, rows)), rng.standard_normal((count, cols)))
        return jnp.asarray(0.15 * spikes + STD * rng.standard_normal((count, rows, cols)), jnp.float32)

    return {"a": {"kernel": stack(5, 24, 40)}, "b": {"kernel": stack(11, 40, 40)}, "bias": jnp.ones(3)}


def main(path: str) -> None:
    """Writes everything under ``KIND/step/path``."""
    mesh = data_mesh()
    results = {"num_devices": np.array(mesh.size)}
    for kind, make in TRANSFORMS.items():
        transform = make(sharding=NamedSharding(mesh, PartitionSpec("data")))
        state = transform.init(updates(0))
        update = jax.jit(transform.update)
        for step in range(3):
            denoised, state = jax.block_until_ready(update(updates(step), state))
            found = {"out": denoised, "seen": getattr(state, "denoise", state).diagnostics}
            results |= {f"{kind}/{step}/{path}": np.asarray(leaf) for path, leaf in leaves_by_path(found)}
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
