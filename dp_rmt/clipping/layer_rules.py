"""The rules of the layers that can be clipped without per-example gradients, and how a user's losses are searched.

Beside ``dp_rmt.models``, only this file imports flax. Layers inside a loss function are found by
`flax.linen.intercept_methods` while it is traced.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import canonicalize_padding

from dp_rmt.clipping.contraction import Contraction
from dp_rmt.clipping.convolution import Convolution, windows_of
from dp_rmt.clipping.coordinates import rider_of
from dp_rmt.clipping.leaf_rules import LeafRule, Lookup, Offset, Scale
from dp_rmt.clipping.products import is_wide_float
from dp_rmt.types import Batch, Params, PerExampleLosses


class LayerRule(NamedTuple):
    """The rules of a layer's parameters, and where they hold.

    Attributes:
      leaves: ``(module, input) -> {parameter name: LeafRule}``. It raises ValueError, saying why, if there is no rule.
      settings: names of attributes, and the values that the module must have there.
      rule_input: ``(module, input, output) -> x``, which makes what the rules take as ``x``.
    """

    leaves: Callable[[Any, jax.Array], Mapping[str, LeafRule]]
    settings: Mapping[str, Any] = {}
    rule_input: Callable[[Any, jax.Array, jax.Array], jax.Array] = lambda module, x, y: x.astype(y.dtype)


def contraction_leaves(x_axes: str, w_axes: str, y_axes: str) -> dict[str, LeafRule]:
    """The rules of kernel and bias of ``y = einsum("x,w->y", x, kernel) + bias``, with the batch first in x and y."""
    bias_axes = "".join(a for a in y_axes if a in w_axes)
    return {"kernel": Contraction(x_axes, w_axes, y_axes), "bias": Offset(y_axes, bias_axes)}


def _dense(module: nn.Dense, x: jax.Array) -> Mapping[str, LeafRule]:
    tokens = string.ascii_letters[: x.ndim - 1]
    return contraction_leaves(f"{tokens}y", "yz", f"{tokens}z")


def _dense_general(module: nn.DenseGeneral, x: jax.Array) -> Mapping[str, LeafRule]:
    axis, features = (a if isinstance(a, tuple | list) else (a,) for a in (module.axis, module.features))
    x_axes = string.ascii_letters[: x.ndim]
    if module.batch_dims:  # axis 0, the examples, would be one of them
        raise ValueError("with batch_dims, which would give every example a kernel of its own; use nn.Einsum")
    inputs = "".join(x_axes[a] for a in axis)
    outputs = string.ascii_letters[x.ndim : x.ndim + len(features)]
    y_axes = "".join(a for a in x_axes if a not in inputs) + outputs
    _check_axes(x_axes, inputs + outputs, y_axes)
    return contraction_leaves(x_axes, inputs + outputs, y_axes)


def _einsum(module: nn.Einsum, x: jax.Array) -> Mapping[str, LeafRule]:
    subscripts = (module.einsum_str or "").replace(" ", "")
    if "->" not in subscripts:
        raise ValueError("with its einsum_str not given to the constructor")
    operands, y_axes = subscripts.split("->")
    x_axes, w_axes = operands.split(",")
    free = [a for a in string.ascii_letters if a not in subscripts]
    dots = "".join(free[: x.ndim - len(x_axes.replace("...", ""))])
    x_axes, w_axes, y_axes = (axes.replace("...", dots) for axes in (x_axes, w_axes, y_axes))
    _check_axes(x_axes, w_axes, y_axes)
    return contraction_leaves(x_axes, w_axes, y_axes)


def _check_axes(x_axes: str, w_axes: str, y_axes: str) -> None:
    for axes in (x_axes, w_axes, y_axes):
        if len(set(axes)) != len(axes) or "." in axes:
            raise ValueError(
                f"whose axes {x_axes},{w_axes}->{y_axes} repeat within one array, or are in the kernel's ..."
            )
    if x_axes[0] != y_axes[:1] or x_axes[0] in w_axes:
        raise ValueError(
            f"with axes {x_axes},{w_axes}->{y_axes}: the batch must be first in its input and output, alone"
        )
    if not set(x_axes) <= set(w_axes + y_axes) or not set(w_axes) <= set(x_axes + y_axes):
        raise ValueError(f"with axes {x_axes},{w_axes}->{y_axes}, of which one is summed within one operand")


def _conv(module: nn.Conv, x: jax.Array) -> Mapping[str, LeafRule]:
    sizes = (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)
    if module.mask is not None:
        raise ValueError("with a mask of its kernel")
    if (more_axes := x.ndim - len(sizes) - 2) < 0:
        raise ValueError(f"whose input has {x.ndim} axes, where it would slide along that of the examples")

    def each(setting: Any) -> tuple[int, ...]:
        return (setting or 1,) * len(sizes) if isinstance(setting, int | None) else tuple(setting)

    padding = canonicalize_padding(module.padding, len(sizes))
    windows = windows_of(
        x.shape[1 + more_axes : -1],
        sizes,
        strides=each(module.strides),
        dilations=each(module.kernel_dilation),
        input_dilations=each(module.input_dilation),
        padding=padding,
    )
    border: Any = "reflect" if padding == "REFLECT" else "wrap"
    axes = string.ascii_letters[: x.ndim]
    kernel = Convolution(windows, module.feature_group_count, more_axes, border)
    return {"kernel": kernel, "bias": Offset(axes, axes[-1])}


def _normalisation(module: Any, x: jax.Array) -> Mapping[str, LeafRule]:
    axes = string.ascii_letters[: x.ndim]
    return {"scale": Scale(), "bias": Offset(axes, axes[-1])}


def _normalised(module: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    off = {name: False for name in ("use_scale", "use_bias") if hasattr(module, name)}
    plain = module.clone(parent=None, dtype=jnp.promote_types(y.dtype, jnp.float32), **off)
    normalised: jax.Array = plain.apply({}, x)
    return normalised


def _rows(module: nn.Embed, ids: jax.Array, y: jax.Array) -> jax.Array:
    if module.num_embeddings == 1:  # it returns its one row for any id
        return jnp.zeros_like(ids)
    return jnp.where(ids < 0, ids + module.num_embeddings, ids)


def _head(module: nn.Embed, x: jax.Array) -> Mapping[str, LeafRule]:
    tokens = string.ascii_letters[: x.ndim - 1]
    return {"embedding": Contraction(f"{tokens}y", "zy", f"{tokens}z")}


_PER_TOKEN = {"reduction_axes": -1, "feature_axes": -1, "axis_name": None}
_PER_EXAMPLE = {"reduction_axes": None, "axis_name": None}
_STOCK_CONV = {"conv_general_dilated": None, "conv_general_dilated_cls": None, "promote_dtype": promote_dtype}
_STOCK_PRODUCT = {"dot_general": None, "dot_general_cls": None, "promote_dtype": promote_dtype}
_STOCK_TYPES = {"promote_dtype": promote_dtype}

LAYER_RULES: dict[tuple[type[nn.Module], str], LayerRule] = {
    (nn.Dense, "__call__"): LayerRule(_dense, _STOCK_PRODUCT),
    (nn.DenseGeneral, "__call__"): LayerRule(_dense_general, _STOCK_PRODUCT),
    (nn.Einsum, "__call__"): LayerRule(_einsum, _STOCK_TYPES),
    (nn.LayerNorm, "__call__"): LayerRule(_normalisation, _PER_TOKEN, _normalised),
    (nn.RMSNorm, "__call__"): LayerRule(_normalisation, _PER_TOKEN, _normalised),
    (nn.GroupNorm, "__call__"): LayerRule(_normalisation, _PER_EXAMPLE, _normalised),
    (nn.InstanceNorm, "__call__"): LayerRule(_normalisation, {"feature_axes": -1, "axis_name": None}, _normalised),
    (nn.Conv, "__call__"): LayerRule(_conv, _STOCK_CONV),
    (nn.Embed, "__call__"): LayerRule(
        lambda module, ids: {"embedding": Lookup(module.num_embeddings)}, _STOCK_TYPES, _rows
    ),
    (nn.Embed, "attend"): LayerRule(_head, _STOCK_TYPES),
}
"""Rules by module type and method, which hold for subclasses that add nothing, too. Add your layers here."""


def rule_of(kind: type, method: str) -> LayerRule | None:
    """The rule of a method of a module type: its own, or that of the type that it inherits all that it does from.

    >>> class Projection(nn.Dense):
    ...     features: int = 3
    >>> class Doubled(nn.Dense):
    ...     def __call__(self, x):
    ...         return 2 * super().__call__(x)
    >>> [rule_of(kind, "__call__") is not None for kind in (Projection, Doubled)]
    [True, False]
    """
    for base in kind.__mro__:
        if (rule := LAYER_RULES.get((base, method))) is not None:
            return rule if kind is base or _adds_nothing(kind, base) else None
    return None


@functools.cache
def _adds_nothing(kind: type, base: type) -> bool:
    """Whether a subclass has no method and no property of its own; rules read its fields from the module."""
    fields, of_base = ({field.name for field in dataclasses.fields(each)} for each in (kind, base))
    generated = {*vars(type("Plain", (base,), {})), *_OF_EVERY_CLASS}
    for own in kind.__mro__:
        for name, value in vars(own).items() if own not in base.__mro__ else ():
            is_field = name in fields and not hasattr(type(value), "__set__")
            is_value = is_field or not (callable(value) or hasattr(value, "__get__"))
            replaces = hasattr(base, name) and name not in of_base
            if name not in generated and (not is_value or replaces):
                return False
    return True


_OF_EVERY_CLASS = (
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__"),
    *("__firstlineno__", "__orig_bases__", "__parameters__", "__dict__", "__weakref__", "__doc__"),
)


class FoundLayer(NamedTuple):
    """A call of a method that has rules, found while the losses are traced."""

    name: str  # the module's type and path, and the method
    leaves: Mapping[str, Any]
    held: tuple[Any, ...]  # the module's parameters, which are the same objects wherever they are used
    inputs: jax.Array  # what the rules take as x
    output: jax.Array  # computed with the leaves held constant
    rules: Mapping[str, LeafRule]
    riders: Mapping[str, Any]  # what rides beside some of the leaves (`dp_rmt.clipping.coordinates.with_riders`)
    problem: str | None  # why the rules do not hold for this call


# This is part of the key of every jit cache. A jitted function inside the losses must be traced again if it was traced
# elsewhere, without the interceptor or with other weights.
_tracing = jax.make_user_context(None)


def intercepted(
    per_example_losses: PerExampleLosses,
    params: Params,
    batch: Batch,
    batch_size: int,
    on_layer: Callable[[FoundLayer], jax.Array],
) -> jax.Array:
    """Computes the losses with the output of each layer that has rules replaced by ``on_layer(FoundLayer)``.

    Args:
      per_example_losses: the user's function.
      params: trainable parameters.
      batch: examples.
      batch_size: how many examples.
      on_layer: returns a layer's output.

    Returns:
      The losses, ``(batch_size,)``.

    Raises:
      ValueError: the losses are not one per example, or are narrower than float32.
    """
    inside_layer = False

    def intercept(next_method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        nonlocal inside_layer
        module: Any = context.module
        rule = rule_of(type(module), context.method_name)
        if inside_layer or rule is None or "params" not in module.variables:
            return next_method(*args, **kwargs)
        inside_layer = True  # the layer's own computation below is intercepted, too
        try:
            return on_layer(_found(rule, module, context.method_name, args, kwargs, batch_size))
        finally:
            inside_layer = False

    with nn.intercept_methods(intercept), _tracing(object()):
        losses = per_example_losses(params, batch)
    if losses.shape != (batch_size,) or not is_wide_float(losses.dtype):
        raise ValueError(
            f"per_example_losses must return one loss per example, in float32 or wider: for {batch_size} examples it "
            f"returned shape {losses.shape}, {losses.dtype}; do not average over the batch, and cast the logits "
            "to float32"
        )
    return losses


def _found(
    rule: LayerRule, module: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int
) -> FoundLayer:
    held = module.variables["params"]
    params = nn.meta.unbox(held)
    inputs = next(iter((*args, *kwargs.values())))
    problem, rules = _problem(rule, module, len(args) + len(kwargs), inputs.shape, batch_size), {}
    if problem is None:
        try:
            rules = {name: leaf_rule for name, leaf_rule in rule.leaves(module, inputs).items() if name in params}
        except ValueError as error:
            problem = str(error)
    # A parameter without a rule stays as it is. Its use in this layer will be found, and refused.
    leaves = params if problem else {name: params[name] for name in rules}
    constants = {**params, **jax.lax.stop_gradient(leaves)}
    output = module.clone(parent=None).apply({"params": constants}, *args, **kwargs, method=method)
    if problem is None and not (jnp.issubdtype(output.dtype, jnp.floating) and jnp.finfo(output.dtype).bits >= 16):
        problem = f"computed in {output.dtype}, for which no rule bounds a norm"
    if problem is None:
        inputs = rule.rule_input(module, inputs, output)
    name = f"{type(module).__name__} {'/'.join(module.path)!r}" + ("" if method == "__call__" else f".{method}")
    riders = {leaf: rider for leaf in rules if (rider := rider_of(params, leaf)) is not None}
    return FoundLayer(name, leaves, tuple(jax.tree.leaves(held)), inputs, output, rules, riders, problem)


def _problem(rule: LayerRule, module: Any, num_arguments: int, shape: tuple[int, ...], batch_size: int) -> str | None:
    for setting, value in rule.settings.items():
        if getattr(module, setting) != value:
            return f"with {setting}={getattr(module, setting)!r}, which the rule does not cover"
    if num_arguments != 1:
        return "called with more than its input, such as a mask"
    if not shape or shape[0] != batch_size:
        shown = ", ".join("batch" if n == batch_size else str(n) for n in shape)
        return (
            f"whose input has shape ({shown}): the batch axis must come first, alone (broadcast what all "
            "examples share, such as position ids)"
        )
    return None
