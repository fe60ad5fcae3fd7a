"""Denoises a tree three times, as a program for a process of its own: ``python denoise_divided.py OUT.npz``.

The matrices are divided over all devices there are; more than one device or not, the results must be the same. Of four
devices a second mesh divides the leaves, too.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dp_rmt import denoise_matrices, scale_by_denoised_adam
from dp_rmt.training.partitioning import by_matrix, data_mesh, make_mesh
from dp_rmt.trees import leaves_by_path
from experiments.benchmarks.scaling.hlo import cost_of

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


def three_steps(kind: str, mesh: Mesh) -> dict[str, np.ndarray]:
    """Everything by ``KIND/step/path``, and under ``gathered/KIND`` the bytes that a device gathers."""
    transform = TRANSFORMS[kind](sharding=by_matrix(mesh))

    def place(leaf: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor") if leaf.ndim == 3 else PartitionSpec())

    layout = jax.tree.map(place, updates(0))
    state = transform.init(updates(0))
    update = jax.jit(transform.update, in_shardings=(layout, None), out_shardings=(layout, None))
    compiled = update.lower(updates(0), state).compile()
    gathered = sum(size for (name, _), size in cost_of(compiled.as_text()).payload.items() if name == "all-gather")
    results = {f"gathered/{kind}": np.array(gathered)}
    for step in range(3):
        denoised, state = jax.block_until_ready(compiled(jax.device_put(updates(step), layout), state))
        found = {"out": denoised, "seen": getattr(state, "denoise", state).diagnostics}
        results |= {f"{kind}/{step}/{path}": np.asarray(leaf) for path, leaf in leaves_by_path(found)}
    return results


def main(path: str) -> None:
    """Writes everything; what the second mesh has under ``divided_leaves/...``."""
    results = {"num_devices": np.array(jax.device_count())}
    for kind in TRANSFORMS:
        results |= three_steps(kind, data_mesh())
    if jax.device_count() == 4:
        divided = three_steps("subspace", make_mesh(1, 2, 2))
        results |= {f"divided_leaves/{path}": array for path, array in divided.items()}
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
