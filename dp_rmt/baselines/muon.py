"""Muon for the matrices of a model, with another optimizer for its other leaves."""

from __future__ import annotations

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

    def labels(params: Params) -> Params:
        axes = matrix_view.matrix_leaves(params, matrix_rule)
        names = ["muon" if path in axes else "others" for path, _ in leaves_by_path(params)]
        return jax.tree.unflatten(jax.tree.structure(params), names)

    matrices = optax.chain(
        _orthogonal_momentum(beta, nesterov, consistent_rms, matrix_rule),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    both = optax.partition({"muon": matrices, "others": others}, labels)

    def init(params: Params) -> optax.OptState:
        matrix_view.check_names_some(params, matrix_rule, "private_muon")
        return both.init(params)

    return optax.GradientTransformationExtraArgs(init, both.update)


class MomentumState(NamedTuple):
    """State of the matrices: the number of updates so far, an int32 scalar, and their exponential average."""

    step: jax.Array
    momentum: Params


def _orthogonal_momentum(
    beta: float, nesterov: bool, consistent_rms: float | None, matrix_rule: matrix_view.MatrixRule | None
) -> optax.GradientTransformation:
    """The transformation to ``sqrt(max(1, cols / rows)) X_t`` of `private_muon`, for a tree of matrices alone."""

    def init(params: Params) -> MomentumState:
        return MomentumState(jnp.zeros([], jnp.int32), wide_zeros_like(params))

    def update(updates: Params, state: MomentumState, params: Params | None = None):
        del params
        step = optax.safe_increment(state.step)
        gradient = jax.tree.map(wide, updates)
        momentum = optax.tree.update_moment(gradient, state.momentum, beta, 1)
        if nesterov:
            direction = jax.tree.map(
                lambda m, g: beta * m + (1 - beta) * g,
                optax.tree.bias_correction(momentum, beta, optax.safe_increment(step)),
                optax.tree.bias_correction(gradient, beta, step),
            )
        else:
            direction = optax.tree.bias_correction(momentum, beta, step)

        def orthogonalize(tree: Params) -> tuple[Params, tuple[()]]:
            axes = matrix_view.matrix_leaves(tree, matrix_rule)
            steps = [_orthogonal(leaf, axes[path], consistent_rms) for path, leaf in leaves_by_path(tree)]
            return jax.tree.unflatten(jax.tree.structure(tree), steps), ()

        steps, _ = with_auto_axes(orthogonalize, direction)
        return steps, MomentumState(step, momentum)

    return optax.GradientTransformation(init, update)


def _orthogonal(leaf: jax.Array, axes: matrix_view.MatrixAxes, consistent_rms: float | None) -> jax.Array:
    """Sets the singular values of each matrix of a leaf to about the factor of its shape."""
    matrices = matrix_view.to_matrices(leaf, axes)
    # The matrix is in units of its largest entry, because Newton-Schulz divides by its norm plus 1e-8, and squares it.
    matrices = matrices * (1 / unit_of(largest_entry(matrices)))[:, None, None]
    newton_schulz = contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=contrib.MuonDimensionNumbers(1, 2)
    )
    orthogonal, _ = newton_schulz.update(matrices, newton_schulz.init(matrices))
    rows, cols = matrices.shape[1:]
    factor = max(1.0, cols / rows) ** 0.5 if consistent_rms is None else consistent_rms * max(rows, cols) ** 0.5
    return matrix_view.from_matrices(factor * orthogonal, axes, leaf.shape)
