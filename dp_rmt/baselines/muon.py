"""Muon for the matrices of a model, with another optimizer for its other leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from dp_rmt.denoising import matrix_view
from dp_rmt.denoising.explicit_axes import with_auto_axes
from dp_rmt.random_matrix.units import largest_entry, unit_of
from dp_rmt.trees import leaves_by_path, wide, wide_zeros_like
from dp_rmt.types import Params

JORDAN = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz step of Jordan et al. (2024), chosen for a large slope at 0."""


def private_muon(
    learning_rate: optax.ScalarOrSchedule,
    others: optax.GradientTransformation,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    consistent_rms: float | None = None,
    weight_decay: float = 0.0,
    matrix_rule: matrix_view.MatrixRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """DP-Muon: steps along the momentum of noisy gradients, its singular values all about 1 (Jordan et al. 2024).

    For a matrix with noisy gradients G_t, whose rows are the inputs and whose columns are the outputs of its layer,

        M_t = beta M_{t-1} + (1 - beta) G_t,      X_t = orthogonalize(beta M_t + (1 - beta) G_t),
        W_{t+1} = W_t - learning_rate sqrt(max(1, cols / rows)) X_t,

    where both terms are bias-corrected as `optax.contrib.scale_by_muon` does it, and ``orthogonalize(U diag(y) V^T)``
    is about ``U V^T``, computed by five quintic Newton-Schulz steps. After noise this is post-processing. The defaults
    are those of DP-Muon in Shanmugam et al. (2026, arXiv 2608.17415), who take learning rate 0.02; Kim & Fan (2026,
    arXiv 2605.12994) use momentum without Nesterov's term (`nesterov=False`).

    Every component gets the same size, also those of the noise, so the method is meant for large batches.
    `optax.contrib.muon` itself takes only two-dimensional leaves unless told otherwise, so it would leave a scanned
    stack ``(layers, in, out)`` to Adam. Here the matrix rule decides, and each matrix of a stack is orthogonalized
    alone.

    Args:
      learning_rate: the learning rate of the matrices, a number or a schedule.
      others: the optimizer of the other leaves with its own learning rate, such as ``optax.adamw(schedule)``.
      beta: decay of the momentum.
      nesterov: True for Nesterov's form of the momentum, as written above; False for ``orthogonalize(M_t)``.
      consistent_rms: if given, the factor is ``consistent_rms sqrt(max(rows, cols))``. With 0.2 the steps are as large
        as Adam's, so that its learning rates fit (Liu et al. 2025, arXiv 2502.16982).
      weight_decay: the weight decay of the matrices, which is multiplied with the learning rate.
      matrix_rule: which leaves are matrices, see `dp_rmt.denoising.matrix_view`; None for `kernels_are_matrices` there.

    Returns:
      An `optax.GradientTransformation`. Its state has one copy of the matrices, in float32 at least, and what `others`
      keeps of the rest. An entry that is not finite stays in the momentum, as in optax, and spoils all of its matrix.

    Raises:
      ValueError: raised by ``init`` if there are matrices and the rule names none of them.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}
    >>> muon = private_muon(0.02, optax.sgd(0.5))
    >>> updates, _ = muon.update(jax.tree.map(jnp.ones_like, params), muon.init(params), params)
    >>> print(updates["bias"][:2])
    [-0.5 -0.5]
    """

    def direction(momentum: Params, gradient: Params, step: jax.Array) -> Params:
        if not nesterov:
            return optax.tree.bias_correction(momentum, beta, step)
        return jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g,
            optax.tree.bias_correction(momentum, beta, optax.safe_increment(step)),
            optax.tree.bias_correction(gradient, beta, step),
        )

    def factor(rows: int, cols: int) -> float:
        return max(1.0, cols / rows) ** 0.5 if consistent_rms is None else consistent_rms * max(rows, cols) ** 0.5

    def init(params: Params) -> MomentumState:
        return MomentumState(jnp.zeros([], jnp.int32), wide_zeros_like(params))

    def update(updates: Params, state: MomentumState, params: Params | None = None):
        del params
        step = optax.safe_increment(state.step)
        gradient = jax.tree.map(wide, updates)
        momentum = optax.tree.update_moment(gradient, state.momentum, beta, 1)
        steps = map_matrices(
            lambda matrices: factor(*matrices.shape[1:]) * orthogonalize(matrices),
            direction(momentum, gradient, step),
            matrix_rule,
        )
        return steps, MomentumState(step, momentum)

    matrices = optax.GradientTransformation(init, update)
    return with_others("private_muon", matrices, others, learning_rate, weight_decay, matrix_rule)


class MomentumState(NamedTuple):
    """State of the matrices: the number of updates so far, an int32 scalar, and their exponential average."""

    step: jax.Array
    momentum: Params


def with_others(
    name: str,
    matrices: optax.GradientTransformation,
    others: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    matrix_rule: matrix_view.MatrixRule | None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of matrices beside that of the other leaves.

    Args:
      name: of the optimizer, for messages.
      matrices: gives the directions of the matrices, which alone it is given.
      others: the optimizer of the other leaves, with its own learning rate.
      learning_rate: of the matrices.
      weight_decay: of the matrices, multiplied with the learning rate.
      matrix_rule: which leaves are matrices.

    Returns:
      The optimizer of all leaves.
    """

    def labels(params: Params) -> Params:
        axes = matrix_view.matrix_leaves(params, matrix_rule)
        names = ["muon" if path in axes else "others" for path, _ in leaves_by_path(params)]
        return jax.tree.unflatten(jax.tree.structure(params), names)

    stepped = optax.chain(
        matrices, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )
    both = optax.partition({"muon": stepped, "others": others}, labels)

    def init(params: Params) -> optax.OptState:
        matrix_view.check_names_some(params, matrix_rule, name)
        return both.init(params)

    return optax.GradientTransformationExtraArgs(init, both.update)


def map_matrices(
    function: Callable[..., jax.Array], tree: Params, matrix_rule: matrix_view.MatrixRule | None, *arguments: jax.Array
) -> Params:
    """Maps a function of matrices (B, rows, cols) over a tree in which every leaf is one or more matrices.

    Further arguments are handed on. What is on the tree's mesh must be one of them, for the axes of that mesh.
    """

    def map_all(tree: Params, *arguments: jax.Array) -> tuple[Params, tuple[()]]:
        def map_leaf(leaf: jax.Array, axes: matrix_view.MatrixAxes) -> jax.Array:
            mapped = function(matrix_view.to_matrices(leaf, axes), *arguments)
            return matrix_view.from_matrices(mapped, axes, leaf.shape)

        axes = matrix_view.matrix_leaves(tree, matrix_rule)
        leaves = [map_leaf(leaf, axes[path]) for path, leaf in leaves_by_path(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves), ()

    return with_auto_axes(map_all, tree, *arguments)[0]


def orthogonalize(matrices: jax.Array, coefficients: tuple[float, float, float] = JORDAN) -> jax.Array:
    """Sets all singular values of each matrix to about 1, by five quintic Newton-Schulz steps from ``X / |X|_F``.

    Args:
      matrices: (B, rows, cols).
      coefficients: (a, b, c) of ``X <- (a + b X X^T + c (X X^T)^2) X``.

    Returns:
      (B, rows, cols).
    """
    # A matrix is in units of its largest entry, because Newton-Schulz divides by its norm plus 1e-8, and squares it.
    matrices = matrices * (1 / unit_of(largest_entry(matrices)))[:, None, None]
    newton_schulz = contrib.scale_by_muon(
        coefficients, beta=0.0, nesterov=False, weight_dimension_numbers=contrib.MuonDimensionNumbers(1, 2)
    )
    orthogonal, _ = newton_schulz.update(matrices, newton_schulz.init(matrices))
    return orthogonal
