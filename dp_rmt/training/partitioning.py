"""Where arrays lie on a mesh of devices: examples are divided over ``data`` and ``fsdp``, parameters as rules say.

One program serves every layout: `jax.jit` gets the shardings of state and batch, and XLA inserts the communication.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dp_rmt.training.sharding_rules import SHARDING_RULES, Rules, state_shardings
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import TrainStep

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor``.

    Args:
      data: number of devices that hold the same part of the parameters and different examples; -1 for what is left.
      fsdp: number of devices that divide parameters and optimizer state and hold different examples; or -1.
      tensor: number of devices that divide each layer's work on the same examples; or -1.
      devices: by default all devices of all processes.

    Returns:
      The mesh.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    given = math.prod(size for size in sizes.values() if size != -1)
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {asked}: a size is at least 1, and at most one of them -1 (what is left)")
    if len(devices) % given or (-1 not in sizes.values() and given != len(devices)):
        raise ValueError(
            f"mesh {asked} does not fit {len(devices)} devices: the sizes must multiply to their number; give -1 for "
            "one of them, or choose sizes whose product divides it"
        )
    shape = tuple(len(devices) // given if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that divides nothing but the examples, over the given devices or over all."""
    return make_mesh(devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The leading axis, the examples, is divided over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in BATCH_AXES if name in mesh.axis_names)))


def by_matrix(mesh: Mesh) -> NamedSharding:
    """The leading axis, matrices to be denoised, is divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that the examples are divided into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.axis_names)


def jit_train_step(train_step: TrainStep, mesh: Mesh, shardings: TrainState | None = None) -> TrainStep:
    """Compiles a step for a mesh; the state is donated.

    Args:
      train_step: from `make_train_step`, without an axis_name.
      mesh: its `batch_parts` must divide every batch (and every microbatch, to be of use).
      shardings: of the state, from `state_shardings`; None replicates the state.

    Returns:
      The compiled step, which takes NumPy or JAX arrays. Its metrics are replicated.
    """
    state_layout: Any = replicated(mesh) if shardings is None else shardings

    def on_mesh(state: TrainState, groups: Any) -> tuple[TrainState, dict[str, Any]]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the models' layers ask for this mesh
            return train_step(state, groups)

    return jax.jit(
        on_mesh,
        in_shardings=(state_layout, by_example(mesh)),
        out_shardings=(state_layout, replicated(mesh)),
        donate_argnums=0,
    )


def init_state(
    transforms: Transforms,
    params: Mapping[str, Any],
    frozen: Mapping[str, Any],
    mesh: Mesh,
    rules: Rules = SHARDING_RULES,
) -> tuple[TrainState, TrainState]:
    """The state before the first step, made where it will lie: no device ever holds more than its part.

    Args:
      transforms: the stages of the step.
      params: trained parameters, which are copied.
      frozen: the other parameters, which are copied, too.
      mesh: from `make_mesh`.
      rules: see `dp_rmt.training.sharding_rules`.

    Returns:
      ``(state, its shardings)``.

    Raises:
      ValueError: a leaf has no rule.
    """

    def create(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> TrainState:
        return TrainState.create(transforms, params, frozen)

    shardings = state_shardings(jax.eval_shape(create, params, frozen), mesh, rules)
    placed = place((params, frozen), (shardings.params, shardings.frozen))
    return jax.jit(create, out_shardings=shardings, donate_argnums=(0, 1))(*placed), shardings


def place(tree: Any, layout: Mesh | Any) -> Any:
    """Puts a copy of every array where it belongs.

    Args:
      tree: a tree of arrays that every process has whole.
      layout: a mesh, to copy everything to each of its devices, or a tree with a sharding for every leaf.

    Returns:
      The tree of (global) arrays.
    """
    if isinstance(layout, Mesh):
        layout = jax.tree.map(lambda _: replicated(layout), tree)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.array(leaf)  # a copy, because a CPU device may use the memory of what it is given, and donate it
        if sharding.is_fully_addressable:
            return jax.device_put(whole, sharding)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, layout)
