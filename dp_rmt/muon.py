"""Muon for the matrices of a model, another optimizer for its other leaves."""

from __future__ import annotations

import jax
import optax
from optax import contrib

from dp_rmt import matrix_view
from dp_rmt.types import Params


def private_muon(
    learning_rate: optax.ScalarOrSchedule,
    others: optax.GradientTransformation,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    consistent_rms: float | None = None,
    weight_decay: float = 0.0,
    matrix_rule: matrix_view.MatrixRule = matrix_view.kernels_are_matrices,
) -> optax.GradientTransformation:
    """DP-Muon: the momentum of the noisy gradients, its singular values all set to about 1 (Jordan et al. 2024).

    For a matrix with noisy gradients G_t, rows the inputs and columns the outputs of its layer,

        M_t = beta M_{t-1} + (1 - beta) G_t,      X_t = orthogonalize(beta M_t + (1 - beta) G_t),
        W_{t+1} = W_t - learning_rate sqrt(max(1, cols / rows)) X_t,

    both terms bias-corrected as `optax.contrib.scale_by_muon` does it; ``orthogonalize(U diag(y) V^T)`` is about
    ``U V^T``, by five quintic Newton-Schulz steps. After noise this is post-processing. The defaults are those of
    DP-Muon in Shanmugam et al. (2026, arXiv 2608.17415), who take learning rate 0.02; Kim & Fan (2026, arXiv
    2605.12994) use momentum without Nesterov's term (`nesterov=False`).

    Every component gets the same size, those of the noise too: it is meant for large batches. `optax.contrib.muon`
    itself takes only two-dimensional leaves unless told otherwise, so that it would leave a scanned stack
    ``(layers, in, out)`` to Adam; here the matrix rule decides, and each matrix of a stack is orthogonalized alone.

    Args:
      learning_rate: of the matrices, a number or a schedule.
      others: optimizer of the other leaves, its own learning rate included, such as ``optax.adamw(schedule)``.
      beta: decay of the momentum.
      nesterov: Nesterov's form of the momentum, as written above; else ``orthogonalize(M_t)``.
      consistent_rms: where given, the factor is ``consistent_rms sqrt(max(rows, cols))``; 0.2 gives steps as large as
        Adam's, so that its learning rates fit (Liu et al. 2025, arXiv 2502.16982).
      weight_decay: of the matrices, times the learning rate.
      matrix_rule: which leaves are matrices, see `dp_rmt.matrix_view`.

    Returns:
      An `optax.GradientTransformation`; the state has one copy of the matrices, and what `others` keeps of the rest.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}
    >>> muon = private_muon(0.02, optax.sgd(0.5))
    >>> updates, _ = muon.update(jax.tree.map(jnp.ones_like, params), muon.init(params), params)
    >>> print(updates["bias"][:2])
    [-0.5 -0.5]
    """

    def dimension_numbers(tree: Params) -> Params:
        """The matrix axes as Muon writes them, None for other leaves; masked parts of the tree stay masked."""
        axes = matrix_view.matrix_leaves(tree, matrix_rule)

        def of_leaf(path, leaf):
            del leaf
            found = axes.get(jax.tree_util.keystr(path, simple=True, separator="/"))
            return None if found is None else contrib.MuonDimensionNumbers(found.rows, found.cols)

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    def labels(params: Params) -> Params:
        axes = matrix_view.matrix_leaves(params, matrix_rule)
        names = ["muon" if path in axes else "others" for path, _ in matrix_view.leaves_by_path(params)]
        return jax.tree.unflatten(jax.tree.structure(params), names)

    matrices = contrib.muon(
        learning_rate,
        beta=beta,
        nesterov=nesterov,
        consistent_rms=consistent_rms,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=dimension_numbers,
    )
    return optax.partition({"muon": matrices, "others": others}, labels)
