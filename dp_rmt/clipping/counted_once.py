"""The law that every parameter is counted exactly once in a per-example norm, and that examples are not mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dp_rmt.clipping.contraction import Contraction
from dp_rmt.clipping.coordinates import Coordinates
from dp_rmt.clipping.example_copies import Steps, copied_leaves
from dp_rmt.clipping.example_mixing import mixed_examples
from dp_rmt.clipping.layer_rules import LAYER_RULES, FoundLayer, intercepted
from dp_rmt.clipping.leaf_rules import LeafRule, Offset
from dp_rmt.clipping.leaf_uses import (
    LeafWithoutRule,
    Use,
    bytes_of_marked_outputs,
    calls_of_layers,
    mark,
    uses_of_leaves,
)
from dp_rmt.clipping.products import is_wide_float
from dp_rmt.clipping.taps import BIAS
from dp_rmt.trees import name_of
from dp_rmt.types import Batch, Params, PerExampleLosses


class Layers(NamedTuple):
    """What is known of the layers of the losses."""

    names: set[str]  # the layers whose rules are needed
    tied: dict[str, str]  # the layers among them that share a table: lookup -> head
    ambiguous: set[str]  # heads whose name is also that of another call, of the lookup or of the head
    bytes_per_example: float  # the size of all their outputs
    copied: dict[str, Steps]  # the leaves of which every example gets a copy, by path


# No other axis is likely to have this size, so an axis that has it is the batch axis.
_TRACED_BATCH_SIZE = 7919


def layers_of(
    per_example_losses: PerExampleLosses, params: Params, batch: Batch, coordinates: Coordinates | None = None
) -> Layers:
    """Looks at the losses' layers before they are tapped.

    Args:
      per_example_losses: the user's function.
      params: trainable parameters.
      batch: examples, of which only the shapes matter.
      coordinates: in which the gradients will be taken.

    Returns:
      What is known of the layers.

    Raises:
      LeafWithoutRule: a leaf is not used once by a rule.
      ValueError: the losses mix examples, or the coordinates are not those of the layers.
    """
    traced = trace_layers(per_example_losses, params, batch)
    tied: dict[str, str] = {}
    copied: dict[str, Steps] = {}
    found = copied_leaves(traced.jaxpr, len(traced.uses), _TRACED_BATCH_SIZE)
    bytes_of_copies = 0
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for number, ((path, leaf), (name, uses)) in enumerate(zip(leaves, traced.uses, strict=True)):
        if number in found:
            uses, copied[name] = [], found[number]
            bytes_of_copies += jnp.size(leaf) * jnp.result_type(leaf).itemsize
        _check_leaf(f"params{jax.tree_util.keystr(path)}", jnp.result_type(leaf), uses, traced.names, tied)
    if coordinates is not None:
        _check_coordinates(coordinates, traced.matrices())
    calls = calls_of_layers(traced.jaxpr)
    ambiguous = {head for lookup, head in tied.items() if calls[lookup] > 1 or calls[head] > 1}
    mixed = mixed_examples(
        traced.jaxpr,
        batch_size=_TRACED_BATCH_SIZE,
        depends_on_batch=[i >= len(traced.uses) for i in range(len(traced.jaxpr.invars))],
    )
    if mixed is not None:
        raise ValueError(
            f"the losses mix examples: {mixed}. One example's gradient would then hold others' data, and clipping "
            "bounds nothing. Let every operation act on one example at a time (no batch norm, no in-batch negatives, "
            "no division by a count over the batch)"
        )
    of_outputs = bytes_of_marked_outputs(traced.jaxpr) / _TRACED_BATCH_SIZE
    return Layers(traced.names, tied, ambiguous, of_outputs + bytes_of_copies, copied)


class TracedLayers(NamedTuple):
    """The losses as a jaxpr, and what they do with each leaf."""

    jaxpr: Any
    names: set[str]  # the layers that have rules
    uses: list[tuple[str, list[Use]]]  # of each leaf, with its path, in tree order
    rules: dict[tuple[str, str], set[LeafRule]]  # by layer and parameter name

    def matrices(self) -> dict[str, Matrix]:
        """The leaves by path that one layer uses, once and as a matrix."""
        used_once = {path: uses[0].by for path, uses in self.uses if len(uses) == 1}
        found = {}
        for path, layer in used_once.items():
            parent, slash, name = path.rpartition("/")
            rule, bias = self._only_rule(layer, name), f"{parent}{slash}{BIAS}"
            if isinstance(rule, Contraction):
                offset = self._only_rule(layer, BIAS) if used_once.get(bias) == layer else None
                outputs = "".join(rule.w_axes[axis] for axis in rule.matrix_axes[1])
                joins = isinstance(offset, Offset) and offset.axes == outputs and not rule.has_shared_axes
                found[path] = Matrix(rule, bias if joins else None)
        return found

    def _only_rule(self, layer: str, name: str) -> LeafRule | None:
        rules = self.rules.get((layer, name), set())
        return next(iter(rules)) if len(rules) == 1 else None


class Matrix(NamedTuple):
    """A leaf that a layer uses as its matrix."""

    rule: Contraction
    bias: str | None  # path of the layer's bias, if it has one entry for each output of the matrix and is trained


def trace_layers(per_example_losses: PerExampleLosses, params: Params, batch: Batch) -> TracedLayers:
    """Traces the losses and follows every leaf to the layers that use it; arguments as of `layers_of`."""
    names: set[str] = set()
    rules: dict[tuple[str, str], set[LeafRule]] = {}

    def on_layer(layer: FoundLayer) -> jax.Array:
        if layer.problem is None:
            names.add(layer.name)
            for leaf, rule in layer.rules.items():
                rules.setdefault((layer.name, leaf), set()).add(rule)
        return mark(layer.name, layer.leaves, layer.output, problem=layer.problem)

    def losses(params: Params, batch: Batch) -> jax.Array:
        return intercepted(per_example_losses, params, batch, _TRACED_BATCH_SIZE, on_layer)

    def many(examples: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((_TRACED_BATCH_SIZE, *examples.shape[1:]), examples.dtype)

    jaxpr = jax.make_jaxpr(losses)(params, jax.tree.map(many, batch)).jaxpr
    paths = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return TracedLayers(jaxpr, names, list(zip(paths, uses_of_leaves(jaxpr, len(paths)), strict=True)), rules)


def _check_coordinates(coordinates: Coordinates, matrices: Mapping[str, Matrix]) -> None:
    for leaf in coordinates.leaves:
        if (matrix := matrices.get(leaf.path)) is None:
            raise ValueError(
                f"coordinates of {leaf.path}, which no layer uses once and as a matrix: leave it out of the "
                "coordinates, or use clipped_grad"
            )
        rule = matrix.rule
        if rule.has_shared_axes or rule.matrix_axes != (leaf.row_axes, leaf.col_axes):
            raise ValueError(
                f"coordinates of {leaf.path} map its axes {leaf.row_axes} and {leaf.col_axes}, while its layer has "
                f"inputs at {rule.matrix_axes[0]} and outputs at {rule.matrix_axes[1]}: make the coordinates from "
                "this model's own layers (dp_rmt.geometry)"
            )
        if leaf.bias not in (None, matrix.bias):
            raise ValueError(
                f"coordinates of {leaf.path} with the bias {leaf.bias}, while its layer's is {matrix.bias}: make the "
                "coordinates from this model's own layers (dp_rmt.geometry)"
            )


def _check_leaf(path: str, dtype: Any, uses: list[Use], names: set[str], tied: dict[str, str]) -> None:
    remedy = "freeze it (close over it instead of passing it in `params`), or use clipped_grad"
    if not is_wide_float(dtype):
        raise LeafWithoutRule(
            f"{path} is {dtype}, but a clipped sum must be float32 or wider. Keep trained parameters in "
            "float32 and give the modules a narrower compute dtype, or use clipped_grad",
            has_layers=bool(names),
        )
    used_by = [use.by for use in uses]
    if not set(used_by) <= names:
        layers = ", ".join(dict.fromkeys(layer.__name__ for layer, _ in LAYER_RULES))
        others = (
            ". Rules are for flax.linen only: for a model of flax nnx, equinox or haiku, or in plain JAX, use "
            'clipped_grad (config.train.clipping_method="vmap")'
        )
        raise LeafWithoutRule(
            f"ghost clipping has no rule for {path}, which goes into: {'; '.join(used_by[:4])}. It has rules "
            f"for {layers}, for subclasses that add no method, and for what every example gets a copy of (add yours to "
            f"dp_rmt.clipping.layer_rules.LAYER_RULES). Otherwise {remedy}{'' if names else others}",
            has_layers=bool(names),
        )
    if len(uses) == 2 and max(used_by) == f"{min(used_by)}.attend":
        lookup, head = sorted(uses)
        if not lookup.is_visible_from(head):
            raise LeafWithoutRule(
                f"{path} is looked up by {lookup.by} inside a jit, a remat or a scan that its head {head.by} is not "
                "inside: ghost clipping must hand the head what the lookup knows. Call the lookup outside, or both "
                f"inside, {remedy}",
                has_layers=True,
            )
        tied[lookup.by] = head.by
    elif len(used_by) > 1:
        raise LeafWithoutRule(
            f"{path} is used {len(used_by)} times, by {'; '.join(used_by[:4])}: ghost clipping has no rule for the "
            "cross terms of its per-example norm (only for one lookup and one `attend` of nn.Embed). Use separate "
            f"parameters, {remedy}",
            has_layers=True,
        )
