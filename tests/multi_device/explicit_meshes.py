"""All transformations on an explicit mesh, as a program for a process of its own: ``python explicit_meshes.py OUT``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dp_rmt.trees import leaves_by_path

_shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "laws" / "transformations.py")))
CASES, run, tree = _shared.CASES, _shared.run, _shared.tree


def divided(leaf: jax.Array, mesh: Mesh) -> jax.Array:
    """Stacks by layer, matrices by row, and a leaf of one axis on every device."""
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data") if leaf.ndim > 1 else PartitionSpec()))


def main(out: str) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Explicit,))
    plain, found = tree(), {"num_devices": np.array(jax.device_count())}
    given = jax.tree.map(lambda leaf: divided(leaf, mesh), plain)
    for name, case in CASES.items():
        with jax.set_mesh(mesh):
            updates, state = run(case.transform, given, given)
            before, after = (jax.tree.map(jax.typeof, at) for at in (case.transform.init(given), state))
        expected, _ = run(case.transform, plain, plain)
        specs = [[jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(at)] for at in (updates, given)]
        found[f"{name}/sharding_kept"] = np.array(specs[0] == specs[1])
        found[f"{name}/state_kept"] = np.array(shapes(before) == shapes(after))
        for at, leaves in (("explicit", updates), ("plain", expected)):
            found |= {f"{name}/{at}/{path}": np.asarray(leaf) for path, leaf in leaves_by_path(leaves)}
    np.savez(out, **found)


def shapes(types: Any) -> list[tuple[Any, ...]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(types)]


if __name__ == "__main__":
    main(sys.argv[1])
