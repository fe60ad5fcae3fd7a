"""Which axis of which parameter is divided over which axis of the mesh: regular expressions over paths.

The division is Megatron's (Shoeybi et al. 2019). Layers that read the residual stream are divided over ``tensor`` by
their outputs, and layers that write it by their inputs, so that a pair of them communicates once. The other side of
each matrix is divided over ``fsdp``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dp_rmt.training.train_state import TrainState
from dp_rmt.trees import leaves_by_path

Rules = Sequence[tuple[str, PartitionSpec]]
"""``(regular expression, spec of the LAST axes)``; the first that matches somewhere in a path counts."""

_MAPS = "(^|/)coordinates/maps/.*/basis$"
"""The maps of `dp_rmt.geometry.whiten_inputs`, (layers, inputs, directions), in the state of an optimizer."""

_READS, _WRITES = "(^|/)(query|key|value|gate|up|intermediate)", "(^|/)(output|down)"

SHARDING_RULES: Rules = (
    (f"{_READS}/kernel$", PartitionSpec("fsdp", "tensor")),
    (f"{_READS}/bias$", PartitionSpec("tensor")),
    (f"{_READS}_lora/lora_a/kernel$", PartitionSpec("fsdp", None)),
    (f"{_READS}_lora/lora_b/kernel$", PartitionSpec(None, "tensor")),
    (f"{_WRITES}/kernel$", PartitionSpec("tensor", "fsdp")),
    (f"{_WRITES}/bias$", PartitionSpec()),
    (f"{_WRITES}_lora/lora_a/kernel$", PartitionSpec("tensor", None)),
    (f"{_WRITES}_lora/lora_b/kernel$", PartitionSpec(None, "fsdp")),
    ("(^|/)(word|position|token_type)_embeddings/embedding$", PartitionSpec("tensor", "fsdp")),
    ("^lm_head/kernel$", PartitionSpec("fsdp", "tensor")),
    ("^(pooler|mlm_head/dense)/kernel$", PartitionSpec("fsdp", "tensor")),
    ("^(pooler|mlm_head/dense)/bias$", PartitionSpec("tensor")),
    ("^mlm_head/bias$", PartitionSpec("tensor")),
    ("^classifier/kernel$", PartitionSpec("fsdp", None)),
    ("^classifier/bias$", PartitionSpec()),
    ("_norm/(scale|bias)$", PartitionSpec()),
)
"""The rules for all models of `dp_rmt.models`. Stacked layers have a leading axis, which is not divided."""


def leaf_sharding(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = SHARDING_RULES) -> NamedSharding:
    """Where the parts of one parameter lie.

    If the size of an axis is no multiple of its number of parts, such as GPT-2's 50257 words on two devices, the axis
    is not divided, and the log says so. The results are the same, but each device holds more.

    Args:
      path: path of the parameter, such as ``"encoder/layers/attention/query/kernel"``.
      shape: shape of the parameter.
      mesh: from `dp_rmt.training.partitioning.make_mesh`.
      rules: the first that matches counts.

    Returns:
      The sharding.

    Raises:
      ValueError: no rule matches, or one has more axes than the parameter.
    """
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
    if spec is None:
        raise ValueError(
            f"no sharding rule covers the parameter {path} {shape}: add one to the rules (regular expression over the "
            "path, PartitionSpec of its last axes; PartitionSpec() copies it to every device)"
        )
    if len(spec) > len(shape):
        raise ValueError(f"the sharding rule of {path} has {len(spec)} axes ({spec}), the parameter {len(shape)}")
    entries = [None] * (len(shape) - len(spec)) + list(spec)
    for axis, entry in enumerate(entries):
        if entry is not None and shape[axis] % (parts := _parts(entry, mesh)):
            logging.info("%s: axis %d of %s is not divided: %d parts do not fit", path, axis, shape, parts)
            entries[axis] = None
    return NamedSharding(mesh, PartitionSpec(*entries))


def state_shardings(state: TrainState, mesh: Mesh, rules: Rules = SHARDING_RULES) -> TrainState:
    """Shardings of a whole state: parameters by the rules, and what a stage keeps for a parameter like that parameter.

    The path of a moment, a filter or whatever else a stage keeps for a parameter ends in the path of that parameter
    (``0/mu/encoder/...``), and it has the parameter's shape. The maps of whitened coordinates are divided by their
    inputs over ``fsdp``. All other leaves, such as step numbers, keys and the starts of the denoiser, are copied to
    every device.

    Args:
      state: arrays, or their shapes.
      mesh: from `dp_rmt.training.partitioning.make_mesh`.
      rules: must cover every trained and every frozen parameter.

    Returns:
      A `TrainState` of `NamedSharding`.

    Raises:
      ValueError: no rule covers a parameter; the message names it.
    """
    trained = {
        path: (leaf.shape, leaf_sharding(path, leaf.shape, mesh, rules)) for path, leaf in leaves_by_path(state.params)
    }

    def of_parameter(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf_sharding(name, leaf.shape, mesh, rules)

    def of_kept(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if re.search(_MAPS, name):
            return leaf_sharding(name, leaf.shape, mesh, ((_MAPS, PartitionSpec("fsdp", None)),))
        parts = name.split("/")
        for first in range(len(parts)):  # the longest end that is a parameter's path
            shape, sharding = trained.get("/".join(parts[first:]), (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    parameters = {
        name: jax.tree_util.tree_map_with_path(of_parameter, getattr(state, name)) for name in ("params", "frozen")
    }
    kept = {name: getattr(state, name) for name in ("step", "noise", "denoise", "optimizer")}
    return TrainState(**parameters, **jax.tree_util.tree_map_with_path(of_kept, kept))


def _parts(entry: str | tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for name in ((entry,) if isinstance(entry, str) else entry))
