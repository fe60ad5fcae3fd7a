"""Clipped gradients at about the cost of an ordinary gradient, for Flax linen models.

The loss function stays the user's own. Its layers are found while it is traced (`dp_rmt.clipping.layer_rules`). Each
layer is differentiated by its rules (`dp_rmt.clipping.leaf_rules`, `dp_rmt.clipping.taps`). Every parameter is followed
to the layers that use it (`dp_rmt.clipping.leaf_uses`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dp_rmt.clipping.batch_leaves import row_weights
from dp_rmt.clipping.coordinates import Coordinates, with_riders
from dp_rmt.clipping.counted_once import Layers, layers_of
from dp_rmt.clipping.example_copies import with_copies
from dp_rmt.clipping.layer_rules import FoundLayer, intercepted
from dp_rmt.clipping.microbatch_size import default_memory_budget
from dp_rmt.clipping.per_example import (
    ClippedGradient,
    ClippingStyle,
    PerExample,
    check_arguments,
    clip_factors,
    summed_over_microbatches,
)
from dp_rmt.clipping.taps import tap, tap_frozen, tap_tied_head, tap_tied_lookup
from dp_rmt.trees import leaves_by_path
from dp_rmt.types import Batch, Params, PerExampleLosses, Unit

Method = Literal["auto", "bookkeeping", "ghost"]


def ghost_clipped_grad(
    per_example_losses: PerExampleLosses,
    *,
    l2_clip_norm: float,
    normalize_by: float = 1.0,
    clip: ClippingStyle = "flat",
    method: Method = "auto",
    microbatch_size: int | None = None,
    memory_budget: int | None = None,
    coordinates: Coordinates | None = None,
    unit: Unit = "example",
) -> ClippedGradient:
    """Computes what `dp_rmt.clipping.per_example.clipped_grad` computes, sooner, without per-example gradients.

    A backward pass gives every layer's input ``x`` and output gradient ``g``. From these follow the norms ``||g_i||``
    and, with the clip factors ``c_i``, the sum ``sum_i c_i g_i``. The methods differ in where the sum comes from:

    - "bookkeeping" (Bu et al. 2023) takes the sum from ``x`` and ``g``, which are kept for all layers at once. It costs
      the operations of a plain gradient and of the norms, and the memory of a plain gradient and of ``g``.
    - "ghost" (Li et al. 2022, section 4) takes it from a second backward pass, which is the same with other weights in
      the layers' sums. It costs 4/3 of the operations of a plain gradient (3/2 where matrices are frozen) and those of
      the norms, and the memory of a plain gradient.
    - "auto" is book-keeping, unless all ``g`` together are larger than ``memory_budget``.

    Under nn.remat both methods cost 3/2 of the operations, and little more memory than the plain gradient.

    Formal guarantee: it is that of `clipped_grad`, whose table of edge cases holds here too. Norms are rounded upwards,
    by a bound of all rounding in them and in the sums (for bfloat16 activations by some percent, else by 1e-5), so the
    reported norms may be larger than those of `clipped_grad`. The guarantee holds for inputs and output gradients of
    any size (`dp_rmt.clipping.token_scales`); what a layer sees in float16 is multiplied in float32. An example whose
    tokens' gradients have norms of more than 1.8e19 in sum contributes zero. With "ghost", norms and sums come from two
    backward passes of the same arithmetic, which a compiler may round differently. If a gradient is nothing but the
    rounding of the backward pass, its two lengths differ. Take "bookkeeping" where that can happen.

    There are rules for flax.linen's Dense, DenseGeneral, Einsum, Conv, LayerNorm, RMSNorm, GroupNorm, InstanceNorm and
    Embed (lookup, head, or both with one table), and for subclasses that add nothing, alone or inside nn.scan over
    stacked parameters, nn.remat and jax.jit, in any real compute dtype of 16 bits or more; also for parameters of which
    every example gets a copy, such as learned positions (`dp_rmt.clipping.example_copies`). `LAYER_RULES` takes more
    rules. Every leaf of ``params`` is counted exactly once: for each new shape of its arguments ``per_example_losses``
    is traced, each leaf is followed to the layer that uses it, and no operation may mix examples. A tied table is
    recognised as an object, so several modules may have one name. Its lookup must come before its head, and not inside
    a jit or a remat of its own.

    With ``unit="user"`` the mean gradient of a user's rows is that of an example with as many times the tokens, since
    each row's loss gets the cotangent 1 / n_i: norms have the cross terms of all pairs of rows, and no gradient of a
    row is formed. What stands in padding rows is replaced by the user's first row, with the cotangent 0.

    Dropout must be `dp_rmt.models.PerExampleDropout`, as in `clipped_grad`.

    Args:
      per_example_losses: ``(params, batch) -> (batch,)``, float32 or wider, for any number of examples. Frozen
        parameters are closed over; any layer may use them, in any way.
      l2_clip_norm: as in `clipped_grad`, like the arguments that follow.
      normalize_by: the EXPECTED batch size, which divides the sum.
      clip: "flat" or "automatic".
      method: "auto", "bookkeeping" or "ghost", as described above.
      microbatch_size: how many examples are differentiated at once; None for all. It must divide the batch.
      memory_budget: the budget of "auto", in bytes; None for a quarter of what `default_memory_budget` says.
      coordinates: as in `clipped_grad`, of leaves that layers use as matrices (a `Contraction`).
      unit: as in `clipped_grad`.

    Returns:
      A `ClippedGradient`.

    Raises:
      ValueError: an argument is out of range. The returned function raises it if an operation mixes examples, or if
        the losses have the wrong shape or dtype.
      LeafWithoutRule: the returned function raises it, which is a ValueError, too, if a leaf has no rule, is used more
        than once or is narrower than float32.

    >>> import flax.linen as nn
    >>> model = nn.Dense(1, use_bias=False)
    >>> losses = lambda params, batch: 0.5 * model.apply(params, batch)[:, 0] ** 2
    >>> params = {"params": {"kernel": jnp.ones((2, 1))}}
    >>> gradient, per_example = ghost_clipped_grad(losses, l2_clip_norm=1.0)(
    ...     params, jnp.eye(2) * 2, is_padding_example=None
    ... )
    >>> [round(float(x), 3) for x in per_example.grad_norm]
    [4.0, 4.0]
    """
    if method not in ("auto", *_METHODS):
        raise ValueError(f"method must be one of {', '.join(map(repr, ('auto', *_METHODS)))}, got {method!r}")
    check_arguments(l2_clip_norm, normalize_by, clip, microbatch_size)

    def clipped_sum(params: Params, batch: Batch, is_padding: jax.Array) -> tuple[Params, PerExample]:
        weights = jnp.ones(is_padding.shape) if unit == "example" else row_weights(is_padding)
        rows = batch if unit == "example" else _rows_of_users(batch, is_padding)
        layers = layers_of(per_example_losses, params, rows, coordinates)
        chosen = method if method != "auto" else _choose(layers.bytes_per_example * weights.size, memory_budget)

        maps = {} if coordinates is None else coordinates.by_path()

        def tapped(params: Params, weights_B: jax.Array) -> jax.Array:
            params = with_riders(params, maps)
            losses = _tapped_losses(per_example_losses, layers, params, rows, weights.size, weights_B)
            return losses if unit == "example" else _mean_of_rows(losses, weights)

        is_padding = is_padding if unit == "example" else jnp.all(is_padding, axis=1)
        ones = jnp.ones(is_padding.shape, jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
        losses, squared_norms, weighted_sum = _METHODS[chosen](tapped, params, ones)
        # The rounding of a cross term can be negative. A cross term that overflows to -inf must not
        # become a norm of zero.
        norms = jnp.sqrt(jnp.where(jnp.isneginf(squared_norms), jnp.inf, jnp.maximum(squared_norms, 0.0)))
        norms = jnp.where(jnp.isfinite(losses), norms, jnp.nan)
        contributes = jnp.isfinite(norms) & ~is_padding
        factors = jnp.where(contributes, clip_factors(norms, l2_clip_norm=l2_clip_norm, clip=clip), 0.0)
        return weighted_sum(factors), PerExample(*(jnp.where(is_padding, 0.0, a) for a in (losses, norms)))

    return summed_over_microbatches(
        clipped_sum,
        l2_clip_norm=l2_clip_norm,
        normalize_by=normalize_by,
        microbatch_size=microbatch_size,
        coordinates=coordinates,
        unit=unit,
    )


def _rows_of_users(batch: Batch, is_padding: jax.Array) -> Batch:
    """The rows of all users, one after the other, where a user's first row stands in the place of padding.

    The derivative of a padding row has the cotangent 0. It is then 0 unless it is infinite, as it could be of what
    stands in padding; of the first row it would be so, too, and the user contributes nothing anyway.
    """
    places = jnp.where(is_padding, 0, jnp.arange(is_padding.shape[1]))

    def chosen(of_user: jax.Array, places: jax.Array) -> jax.Array:
        return of_user[places]

    # Under vmap, so that users that are divided over devices stay where they are.
    return jax.tree.map(lambda x: jax.vmap(chosen)(x, places).reshape(places.size, *x.shape[2:]), batch)


def _mean_of_rows(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """Each user's mean loss; a weight of zero selects, since 0 * NaN would be NaN."""
    of_users = losses.reshape(weights.shape)
    return jnp.sum(jnp.where(weights > 0, of_users * weights.astype(losses.dtype), 0.0), axis=1)


# ---- The methods: (tapped losses, params, ones) -> (losses, squared norms, weights -> weighted sum) -----------------

_Tapped = Callable[[Params, jax.Array], jax.Array]
_Outcome = tuple[jax.Array, jax.Array, Callable[[jax.Array], Params]]


def _run(pull_back: Callable[[jax.Array], Any], cotangents: jax.Array) -> Any:
    return pull_back(cotangents)


def _bookkeeping(tapped: _Tapped, params: Params, ones: jax.Array, *, run: Callable[..., Any] = _run) -> _Outcome:
    """Keeps the linear map from the weights of the taps to the sums of a backward pass; that map is the book."""

    def backward(weights_B: jax.Array) -> tuple[Params, tuple[jax.Array, jax.Array]]:
        losses, pull_back = jax.vjp(tapped, params, weights_B)
        sums, squared_norms = run(pull_back, jnp.ones_like(losses))
        return sums, (losses, squared_norms)

    _, weighted_sum, (losses, squared_norms) = jax.linearize(backward, ones, has_aux=True)
    return losses, squared_norms, weighted_sum


def _ghost(tapped: _Tapped, params: Params, ones: jax.Array) -> _Outcome:
    """Repeats the backward pass from the same cotangents of the losses, instead of keeping a book.

    Weighted cotangents would give the same sums in exact arithmetic only. No norm of the first pass bounds what the
    layers in between make of other numbers by rounding, above all in bfloat16.
    """
    return _bookkeeping(tapped, params, ones, run=jax.checkpoint(_run))


_METHODS: dict[str, Callable[[_Tapped, Params, jax.Array], _Outcome]] = {"bookkeeping": _bookkeeping, "ghost": _ghost}


def _choose(bytes_kept: float, memory_budget: int | None) -> str:
    limit = default_memory_budget() / 4 if memory_budget is None else memory_budget
    return "bookkeeping" if bytes_kept <= limit else "ghost"


def _tapped_losses(
    per_example_losses: PerExampleLosses,
    layers: Layers,
    params: Params,
    batch: Batch,
    num_rows: int,
    weights_B: jax.Array,
) -> jax.Array:
    """The losses with taps. Their derivative gives ``weights_B`` squared gradient norms (`dp_rmt.clipping.taps`).

    There are `num_rows` losses, as many for each weight.
    """
    missing = set(layers.names)
    # What a lookup hands to its head. The table is kept with it, so that the table's identity is not used again.
    tickets: dict[Hashable, tuple[Any, jax.Array, Any]] = {}

    def table_of(head: str, layer: FoundLayer) -> Hashable:
        # Two modules of one name have tables of their own. Each table is the same object in its lookup and its head.
        return (head, *map(id, layer.held)) if head in layers.ambiguous else head

    def on_layer(layer: FoundLayer) -> jax.Array:
        if layer.name not in layers.names:  # its rules may not hold, and no leaf of `params` needs them
            return layer.output
        if layer.problem is not None:  # a frozen layer of the same name as one that is trained
            return tap_frozen(layer.leaves, layer.output, f"{layer.name} {layer.problem}: {_NOT_PURE}")
        missing.discard(layer.name)
        if layer.name in layers.tied:
            (table,) = layer.leaves.values()
            y, ticket = tap_tied_lookup(table, layer.inputs, layer.output, weights_B)
            tickets[table_of(layers.tied[layer.name], layer)] = (layer.held, layer.inputs, ticket)
            return y
        if layer.name in layers.tied.values():
            (table,) = layer.leaves.values()
            if (key := table_of(layer.name, layer)) not in tickets:
                return tap_frozen(layer.leaves, layer.output, f"{layer.name} {_NO_TICKET}")
            _, ids, ticket = tickets[key]
            return tap_tied_head(table, ids, ticket, layer.inputs, layer.output, weights_B)
        return tap(layer.rules, layer.leaves, layer.inputs, layer.output, weights_B, layer.riders)

    def with_taps(params: Params, batch: Batch) -> jax.Array:
        return intercepted(per_example_losses, params, batch, num_rows, on_layer)

    if not layers.copied:
        losses = with_taps(params, batch)
    else:
        paths = [path for path, _ in leaves_by_path(params)]
        copied = {paths.index(path): steps for path, steps in layers.copied.items()}
        losses, seen = with_copies(with_taps, (params, batch), copied, num_rows, weights_B)
        missing |= {f"params {paths[leaf]!r}" for leaf in copied.keys() - seen}
    if missing:
        raise ValueError(f"{sorted(missing)} are no longer used: {_NOT_PURE}")
    return losses


_NOT_PURE = (
    "traced again, the losses use their layers otherwise than before. per_example_losses must be a pure function that "
    "computes the same for every batch size"
)
_NO_TICKET = (
    "is called before the lookup in the same table; ghost clipping needs it after. If several modules have this name, "
    "it may also be that this one's table was not looked up, or was converted in between: give the modules names of "
    "their own (nn.Embed(..., name=...)), convert parameters once, freeze the table, or use clipped_grad"
)
