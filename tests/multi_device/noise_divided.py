"""Noise of leaves that are divided over all devices there are: ``python noise_divided.py OUT.npz``.

The noise of every leaf is written under ``LAYOUT/leaf``, the program's collective operations under
``LAYOUT/collectives``. The second step of correlated noise, which has a history, is under ``LAYOUT/correlated/leaf``.
"""

from __future__ import annotations

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dp_rmt.correlated_noise import add_correlated_noise, square_root
from dp_rmt.noise_addition import add_gaussian_noise, noise_key

# Each divided axis has whole blocks of ChaCha20 (8 entries) on every device. Vectors and scalars are never divided.
SHAPES = {"matrix": (64, 96), "stack": (3, 32, 40), "odd": (7, 1008)}
COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|all-to-all|collective-[a-z]+|reduce-scatter)\b")


def layouts():
    """``{name: (mesh, spec of the last two axes)}`` of the leaves that can be divided so."""
    devices = jax.device_count()
    found = {}
    for name, sides in {"line": (devices, 1), "square": (max(1, devices // 2), min(2, devices))}.items():
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh(sides, ("rows", "cols"), axis_types=(kind, kind))
            for spec in (("rows", None), (None, "rows"), ("rows", "cols"), (None, ("rows", "cols"))):
                found[f"{name} {kind.name} {spec}"] = mesh, spec
    return found


def spec_for(shape, mesh, spec):
    """The spec where it divides the last two axes evenly, else none: such a leaf is on every device."""
    parts = [np.prod([mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ())]) for names in spec]
    even = all(side % int(part) == 0 for side, part in zip(shape[-2:], parts, strict=True))
    return PartitionSpec(*[None] * (len(shape) - 2), *spec) if even else PartitionSpec()


def cases():
    """All layouts with the noise of Threefry, and one of each kind with that of ChaCha20."""
    for name, (mesh, spec) in layouts().items():
        yield f"threefry2x32 {name}", "threefry2x32", (mesh, spec)
        if spec == ("rows", "cols"):
            yield f"chacha20 {name}", "chacha20", (mesh, spec)


def third_step(zeros, shardings=None):
    """The correlated noise of a third step, compiled for these shardings of its whole history."""
    noise = add_correlated_noise(1.0, square_root(3), noise_key(9))
    update = jax.jit(noise.update)
    state = noise.init(zeros)
    for _ in range(2):
        _, state = update(zeros, state)
    if shardings is not None:
        for past in state.earlier:
            assert all(past[name].sharding.is_equivalent_to(shardings[name], past[name].ndim) for name in zeros)
    return jax.block_until_ready(update(zeros, state)[0])


def main(out: str) -> None:
    """Draws, compiled for every layout, and saves."""
    zeros = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    results = {"num_devices": np.array(jax.device_count())}
    for generator in ("threefry2x32", "chacha20"):
        noise = add_gaussian_noise(1.0, noise_key(9, generator))
        noisy, _ = jax.jit(noise.update)(zeros, noise.init(zeros))
        results |= {f"whole {generator}/{name}": np.asarray(leaf) for name, leaf in noisy.items()}
    results |= {f"whole correlated/{name}": np.asarray(leaf) for name, leaf in third_step(zeros).items()}
    for layout, generator, (mesh, spec) in cases():
        noise = add_gaussian_noise(1.0, noise_key(9, generator))
        shardings = {name: NamedSharding(mesh, spec_for(shape, mesh, spec)) for name, shape in SHAPES.items()}
        divided, state = jax.device_put(zeros, shardings), noise.init(zeros)
        compiled = jax.jit(noise.update).lower(divided, state).compile()
        noisy, _ = jax.block_until_ready(compiled(divided, state))
        assert all(noisy[name].sharding.is_equivalent_to(shardings[name], len(SHAPES[name])) for name in SHAPES), layout
        results[f"{layout}/collectives"] = np.array(sorted(set(COLLECTIVE.findall(compiled.as_text()))), dtype=str)
        results |= {f"{layout}/{name}": np.asarray(leaf) for name, leaf in noisy.items()}
        if layout.startswith("threefry2x32") and spec == ("rows", "cols"):
            correlated = third_step(divided, shardings)
            results |= {f"{layout}/correlated/{name}": np.asarray(leaf) for name, leaf in correlated.items()}
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
