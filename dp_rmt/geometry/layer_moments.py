"""Second moments of what the layers of a model see, for any losses of stock Flax layers.

Layers are found while the losses are traced, as for ghost clipping (`dp_rmt.clipping.layer_rules`). A zero matrix rides
beside each kernel (`dp_rmt.clipping.coordinates.with_riders`), and the tap of its layer gives it the second moment as
its cotangent. Therefore scans over layers, remat and jit are no obstacle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dp_rmt.clipping.contraction import Contraction
from dp_rmt.clipping.coordinates import with_riders
from dp_rmt.clipping.counted_once import Matrix, trace_layers
from dp_rmt.clipping.layer_rules import FoundLayer, intercepted
from dp_rmt.clipping.mapped_norms import as_tokens, with_ones
from dp_rmt.clipping.products import einsum
from dp_rmt.trees import leaves_by_path, merge_params
from dp_rmt.types import Batch, Params, PerExampleLosses


@dataclasses.dataclass(frozen=True)
class LayerMoments:
    """Second moments of one matrix's layer, summed over all tokens.

    Attributes:
      inputs: ``sum a a^T`` of the layer's inputs a, (n, n) or (layers, n, n). Where there is a bias, a is (x, 1).
      outputs: ``sum g g^T`` of the loss's gradients g with respect to its outputs; None if they were not asked for.
      row_axes: the axes of the matrix that are inputs, as negative numbers.
      col_axes: those that are outputs.
      bias: path of the layer's bias, if it is trained, too.
    """

    inputs: np.ndarray
    outputs: np.ndarray | None
    row_axes: tuple[int, ...]
    col_axes: tuple[int, ...]
    bias: str | None = None


def layer_moments(
    per_example_losses: PerExampleLosses,
    params: Params,
    batches: Iterable[Batch],
    *,
    frozen: Params | None = None,
    outputs: bool = False,
) -> dict[str, LayerMoments]:
    """Computes the second moments of the inputs of every matrix, and on request of its output gradients.

    ``A = sum_t a_t a_t^T`` over all tokens t of all examples, and ``B = sum_t g_t g_t^T``: Kronecker factors of the
    curvature (K-FAC; Martens & Grosse 2015). A bias that is trained is the weight of one more input, which is 1 (the
    homogeneous coordinates of the same paper). All rows count, so the batches must not hold padding.

    Formal guarantee: none of its own. What is computed from public rows (random tokens, public text) is a public
    constant. Private rows would make it private: never give them.

    Args:
      per_example_losses: ``(params, batch) -> (batch,)``, as for `dp_rmt.ghost_clipped_grad`.
      params: the parameters of which some are matrices of layers with rules; leaves of other kinds are left out.
      batches: public rows. For `outputs` their labels should be random: gradients at labels that the model finds right
        are small.
      frozen: parameters that the losses want beside these (`dp_rmt.trees.split_params`); they have no moments. What the
        losses close over instead becomes a constant of the compiled program, which holds it a second time.
      outputs: whether the moments of the output gradients are wanted, too.

    Returns:
      `LayerMoments` by path of the matrix, of matrices with at least one axis of inputs and one of outputs.

    Raises:
      ValueError: there are no batches, or a moment is not finite.

    >>> import flax.linen as nn
    >>> model = nn.Dense(1)
    >>> losses = lambda params, x: model.apply(params, x)[:, 0] ** 2
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> moments = layer_moments(losses, params, [jnp.array([[1.0, 2.0], [0.0, 1.0]])])
    >>> moments["params/kernel"].inputs.tolist()
    [[1.0, 2.0, 1.0], [2.0, 5.0, 3.0], [1.0, 3.0, 2.0]]
    """
    total: dict[str, _Sums] = {}
    matrices: dict[str, Matrix] = {}
    compiled: Any = None
    for batch in batches:
        if not matrices:
            matrices = _matrices(_beside(frozen, per_example_losses), params, batch)
            compiled = jax.jit(partial(_moments, per_example_losses, matrices, outputs))
        for path, found in compiled(params, frozen, batch).items():
            sums = _Sums(*(None if part is None else np.asarray(part, np.float64) for part in found))
            total[path] = sums if path not in total else total[path].plus(sums)
    if not total:
        raise ValueError("layer_moments needs at least one batch, and a model in which some layer's matrix has a rule")
    if broken := [path for path, sums in total.items() if not sums.is_finite()]:
        raise ValueError(
            f"the second moments of {', '.join(broken)} are not finite: what the layer sees overflows on these rows. "
            "Give other rows, or a model whose pre-trained values are finite"
        )
    return {
        path: LayerMoments(*sums, *matrices[path].rule.matrix_axes, matrices[path].bias) for path, sums in total.items()
    }


class _Sums(NamedTuple):
    """What riders carry: zeros in, second moments out."""

    inputs: Any
    outputs: Any

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(*(None if mine is None else mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def is_finite(self) -> bool:
        return all(part is None or bool(np.isfinite(part).all()) for part in self)


def _matrices(per_example_losses: PerExampleLosses, params: Params, batch: Batch) -> dict[str, Matrix]:
    """The matrices that one layer uses, with a side of inputs and one of outputs and no axes of both."""
    matrices = trace_layers(per_example_losses, params, batch).matrices()
    return {
        path: matrix
        for path, matrix in matrices.items()
        if all(matrix.rule.matrix_axes) and not matrix.rule.has_shared_axes
    }


def _beside(frozen: Params | None, per_example_losses: PerExampleLosses) -> PerExampleLosses:
    """The losses as a function of the parameters that are not frozen."""
    if frozen is None:
        return per_example_losses
    return lambda params, batch: per_example_losses(merge_params(params, frozen), batch)


def _moments(
    per_example_losses: PerExampleLosses,
    matrices: Mapping[str, Matrix],
    outputs: bool,
    params: Params,
    frozen: Params | None,
    batch: Batch,
) -> dict[str, _Sums]:
    """The moments of one batch."""
    per_example_losses = _beside(frozen, per_example_losses)
    batch_size = len(jax.tree.leaves(batch)[0])
    leaves = dict(leaves_by_path(params))
    zeros = {path: _zeros(matrix, leaves[path].shape, outputs) for path, matrix in matrices.items()}

    def total_loss(riders: Mapping[str, _Sums]) -> jax.Array:
        losses = intercepted(per_example_losses, with_riders(params, riders), batch, batch_size, _with_tap)
        return jnp.sum(losses)

    found: dict[str, _Sums] = jax.grad(total_loss)(zeros)
    return found


def _zeros(matrix: Matrix, shape: tuple[int, ...], outputs: bool) -> _Sums:
    stack = shape[: len(shape) - len(matrix.rule.w_axes)]
    rows, cols = (math.prod(shape[axis] for axis in side) for side in matrix.rule.matrix_axes)
    rows += matrix.bias is not None
    return _Sums(jnp.zeros((*stack, rows, rows)), jnp.zeros((*stack, cols, cols)) if outputs else None)


def _with_tap(layer: FoundLayer) -> jax.Array:
    output = layer.output
    for name, rider in layer.riders.items():
        output = _tap(layer.rules[name], rider, layer.inputs, output)
    return output


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(rule: Contraction, rider: _Sums, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns ``y``, and gives the rider the second moments as its cotangent."""
    return y


def _tap_forward(rule: Contraction, rider: _Sums, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    return y, (rider, x)


def _tap_backward(rule: Contraction, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    rider, x = residuals
    x_BxTxI, g_BxTxO = as_tokens(rule, x, g)
    if rider.inputs.shape[-1] > x_BxTxI.shape[-1]:  # there is a bias
        x_BxTxI = with_ones(x_BxTxI)
    inputs = einsum("bti,btj->ij", x_BxTxI, x_BxTxI).astype(rider.inputs.dtype)
    outputs = None if rider.outputs is None else einsum("bti,btj->ij", g_BxTxO, g_BxTxO).astype(rider.outputs.dtype)
    return _Sums(inputs, outputs), jnp.zeros_like(x), g


_tap.defvjp(_tap_forward, _tap_backward)
