"""Clipped gradients at about the cost of an ordinary gradient: ghost clipping for Flax linen models.

Ghost clipping replaces how single layers are differentiated, so it has to know them: this is the one file
outside ``dp_rmt.models`` that imports flax. The loss function stays the user's own; the layers inside it are
found by `flax.linen.intercept_methods` while it is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from dp_rmt.clipping import (
    ClippedGradient,
    ClippingStyle,
    PerExample,
    check_arguments,
    clip_factors,
    summed_over_microbatches,
)
from dp_rmt.ghost_rules import (
    LOOKUP,
    MATRIX,
    OFFSET,
    SCALE,
    LeafRule,
    is_wide_float,
    mark,
    tap,
    uses_of_leaves,
)
from dp_rmt.types import Batch, Params, PerExampleLosses


class LayerRule(NamedTuple):
    """Rules of a layer's parameters, and the settings under which they hold."""

    leaves: Mapping[str, LeafRule]
    settings: Mapping[str, Any]


LAYER_RULES: Mapping[type[nn.Module], LayerRule] = {
    nn.Dense: LayerRule(
        {"kernel": MATRIX, "bias": OFFSET},
        {"dot_general": None, "dot_general_cls": None, "promote_dtype": promote_dtype},
    ),
    nn.LayerNorm: LayerRule(
        {"scale": SCALE, "bias": OFFSET}, {"reduction_axes": -1, "feature_axes": -1, "axis_name": None}
    ),
    nn.Embed: LayerRule({"embedding": LOOKUP}, {"promote_dtype": promote_dtype}),
}
"""The layers with rules, for their ``__call__``. Subclasses may compute something else and have none."""


def ghost_clipped_grad(
    per_example_losses: PerExampleLosses,
    *,
    l2_clip_norm: float,
    normalize_by: float = 1.0,
    clip: ClippingStyle = "flat",
    method: Literal["ghost"] = "ghost",
    microbatch_size: int | None = None,
) -> ClippedGradient:
    """`dp_rmt.clipping.clipped_grad` without per-example gradients: the same numbers, sooner.

    One forward and two backward passes. The first backward pass gives the norms ``||g_i||`` from what each
    layer saw, and no gradient of a parameter; the second gives ``sum_i c_i g_i`` as the gradient of
    ``sum_i c_i loss_i``, the clip factors ``c_i`` held constant (Li et al. 2022, section 4). That is 4/3 of
    the operations of a plain gradient, and the norms (3/2 where matrices are frozen or under nn.remat).

    Formal guarantee: that of `clipped_grad`, whose table of edge cases holds here too, up to the rounding of
    the second backward pass: float32 for a float32 model. A bfloat16 model propagates ``c_i g`` with
    relative errors of 2^-9 per operation, so a contribution can exceed the clip norm by about a percent.

    There are rules for the kernel and bias of Dense, the scale and bias of LayerNorm, and the lookup of
    Embed, alone or inside nn.scan over stacked parameters, nn.remat and jax.jit, in any compute dtype. Every
    leaf of ``params`` is counted exactly once: each call traces ``per_example_losses`` and follows each leaf
    to the layer that uses it. That takes time at every call, so jit the result.

    Args:
      per_example_losses: ``(params, batch) -> (batch,)``, float32 or wider, for any number of examples.
        Frozen parameters are closed over: any layer may use them, in any way.
      l2_clip_norm: as in `clipped_grad`, like the arguments that follow.
      normalize_by: divides the sum; the EXPECTED batch size.
      clip: "flat" or "automatic".
      method: "ghost", as described above.
      microbatch_size: examples differentiated at once; None for all. Must divide the batch.

    Returns:
      A `ClippedGradient`.

    Raises:
      ValueError: an argument is out of range; or, from the returned function, a leaf has no rule, is used
        more than once or is narrower than float32, or the losses have the wrong shape or dtype.

    >>> model = nn.Dense(1, use_bias=False)
    >>> losses = lambda params, batch: 0.5 * model.apply(params, batch)[:, 0] ** 2
    >>> params = {"params": {"kernel": jnp.ones((2, 1))}}
    >>> gradient, per_example = ghost_clipped_grad(losses, l2_clip_norm=1.0)(params, jnp.eye(2) * 2)
    >>> [round(float(x), 3) for x in per_example.grad_norm]
    [4.0, 4.0]
    """
    if method != "ghost":
        raise ValueError(f"method must be 'ghost', got {method!r}")
    check_arguments(l2_clip_norm, normalize_by, clip, microbatch_size)

    def clipped_sum(params: Params, batch: Batch, is_padding: jax.Array) -> tuple[Params, PerExample]:
        layers = _check_every_leaf_is_counted_once(per_example_losses, params, batch)
        probe = jnp.zeros(is_padding.shape, jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
        losses, pull_back = jax.vjp(
            lambda p, q: _tapped_losses(per_example_losses, layers, p, batch, q), params, probe
        )
        norms = jnp.sqrt(pull_back(jnp.ones_like(losses))[1])
        contributes = jnp.isfinite(norms) & ~is_padding
        factors = jnp.where(contributes, clip_factors(norms, l2_clip_norm=l2_clip_norm, clip=clip), 0.0)
        total, _ = pull_back(factors.astype(losses.dtype))
        return total, PerExample(*(jnp.where(is_padding, 0.0, a) for a in (losses, norms)))

    return summed_over_microbatches(
        clipped_sum, l2_clip_norm=l2_clip_norm, normalize_by=normalize_by, microbatch_size=microbatch_size
    )


# ---- Finding the layers -----------------------------------------------------------------------------------


class FoundLayer(NamedTuple):
    """A call, found while the losses are traced, of a layer of a type that has rules."""

    name: str  # type and path of the module
    module: nn.Module
    leaves: dict[str, jax.Array]
    inputs: jax.Array
    output: jax.Array  # computed with the leaves held constant
    problem: str | None  # why the rules do not hold for this call


# Part of the key of every jit cache. A jitted function inside the losses that was traced elsewhere, without
# the interceptor or with another probe, must be traced again.
_tracing = jax.make_user_context(None)


def _intercepted(
    per_example_losses: PerExampleLosses,
    params: Params,
    batch: Batch,
    batch_size: int,
    on_layer: Callable[[FoundLayer], jax.Array],
) -> jax.Array:
    """The losses, with the output of each layer replaced by ``on_layer(FoundLayer)``."""
    inside_layer = False

    def intercept(next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        nonlocal inside_layer
        module: Any = context.module
        has_rule = type(module) in LAYER_RULES and context.method_name == "__call__"
        if inside_layer or not has_rule or "params" not in module.variables:
            return next_method(*args, **kwargs)
        inside_layer = True  # the layer's own computation below is intercepted too
        try:
            leaves = nn.meta.unbox(module.variables["params"])
            constants = jax.lax.stop_gradient(leaves)
            output = module.clone(parent=None).apply({"params": constants}, *args, **kwargs)
            inputs = next(iter((*args, *kwargs.values())))
            name = f"{type(module).__name__} {'/'.join(module.path)!r}"
            problem = _problem(module, len(args) + len(kwargs), inputs.shape, batch_size)
            return on_layer(FoundLayer(name, module, leaves, inputs, output, problem))
        finally:
            inside_layer = False

    with nn.intercept_methods(intercept), _tracing(object()):
        losses = per_example_losses(params, batch)
    if losses.shape != (batch_size,) or not is_wide_float(losses.dtype):
        raise ValueError(
            f"per_example_losses must return one loss per example, in float32 or wider: for {batch_size} "
            f"examples it returned shape {losses.shape}, {losses.dtype}; do not average over the batch, and "
            "cast the logits to float32"
        )
    return losses


def _problem(module: nn.Module, num_arguments: int, shape: tuple[int, ...], batch_size: int) -> str | None:
    for setting, value in LAYER_RULES[type(module)].settings.items():
        if getattr(module, setting) != value:
            return f"with {setting}={getattr(module, setting)!r}, which the rule does not cover"
    if num_arguments != 1:
        return "called with more than its input, such as a mask"
    if len(shape) < (1 if isinstance(module, nn.Embed) else 2) or shape[0] != batch_size:
        shown = ", ".join("batch" if n == batch_size else str(n) for n in shape)
        return (
            f"whose input has shape ({shown}): the batch axis must come first, alone (broadcast what all "
            "examples share, such as position ids)"
        )
    return None


def _rule_input(layer: FoundLayer) -> jax.Array:
    """What the rules of the layer's parameters take as ``x``."""
    module: Any = layer.module
    if isinstance(module, nn.LayerNorm):
        wide = jnp.promote_types(layer.output.dtype, jnp.float32)
        plain: Any = module.clone(parent=None, use_scale=False, use_bias=False, dtype=wide)
        return plain.apply({}, layer.inputs)
    if isinstance(module, nn.Embed):
        if module.num_embeddings == 1:  # the one row, whatever the id
            return jnp.zeros_like(layer.inputs)
        return jnp.where(layer.inputs < 0, layer.inputs + module.num_embeddings, layer.inputs)
    return layer.inputs.astype(layer.output.dtype)


def _tapped_losses(
    per_example_losses: PerExampleLosses,
    names: set[str],
    params: Params,
    batch: Batch,
    probe: jax.Array,
) -> jax.Array:
    """The losses; differentiation gives ``probe`` the squared norm of each gradient (see `tap`)."""
    missing = set(names)

    def on_layer(layer: FoundLayer) -> jax.Array:
        if layer.name not in names:  # the rules do not hold, and no leaf of `params` needs them
            return layer.output
        missing.discard(layer.name)
        rules = LAYER_RULES[type(layer.module)].leaves
        return tap(rules, layer.leaves, _rule_input(layer), layer.output, probe)

    losses = _intercepted(per_example_losses, params, batch, len(probe), on_layer)
    if missing:
        raise ValueError(
            f"traced again, the losses no longer use {sorted(missing)}: per_example_losses must be a pure "
            "function that computes the same for every batch size"
        )
    return losses


# ---- The law that every leaf is counted exactly once ------------------------------------------------------

# A batch size that no other axis is likely to have: an axis of that size is the batch axis.
_TRACED_BATCH_SIZE = 7919


def _check_every_leaf_is_counted_once(
    per_example_losses: PerExampleLosses, params: Params, batch: Batch
) -> set[str]:
    """Raises unless each leaf is unused, or used once by a rule; returns the names of layers with rules."""
    names: set[str] = set()

    def on_layer(layer: FoundLayer) -> jax.Array:
        if layer.problem is None:
            names.add(layer.name)
            return mark(layer.name, layer.leaves, layer.output)
        return mark(f"{layer.name} {layer.problem}", layer.leaves, layer.output)

    def losses(params: Params, batch: Batch) -> jax.Array:
        return _intercepted(per_example_losses, params, batch, _TRACED_BATCH_SIZE, on_layer)

    def many(examples: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((_TRACED_BATCH_SIZE, *examples.shape[1:]), examples.dtype)

    jaxpr = jax.make_jaxpr(losses)(params, jax.tree.map(many, batch)).jaxpr
    uses = uses_of_leaves(jaxpr, len(jax.tree.leaves(params)))
    for (path, leaf), used_by in zip(jax.tree_util.tree_leaves_with_path(params), uses):
        _check_leaf(f"params{jax.tree_util.keystr(path)}", jnp.result_type(leaf), used_by, names)
    return names


def _check_leaf(path: str, dtype: Any, used_by: list[str], names: set[str]) -> None:
    remedy = "freeze it (close over it instead of passing it in `params`), or use clipped_grad"
    if not is_wide_float(dtype):
        raise ValueError(
            f"{path} is {dtype}, but a clipped sum must be float32 or wider. Keep trained parameters in "
            "float32 and give the modules a narrower compute dtype, or use clipped_grad"
        )
    if not set(used_by) <= names:
        layers = ", ".join(layer.__name__ for layer in LAYER_RULES)
        raise ValueError(
            f"ghost clipping has no rule for {path}, which goes into: {'; '.join(used_by[:4])}. It has rules "
            f"for flax.linen's {layers}. Otherwise {remedy}"
        )
    if len(used_by) > 1:
        raise ValueError(
            f"{path} is used {len(used_by)} times, by {'; '.join(used_by[:4])}: ghost clipping has no rule "
            f"for the cross terms of its per-example norm. Use separate parameters, {remedy}"
        )
