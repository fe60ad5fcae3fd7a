"""Low-rank truncation of noisy gradient matrices keeps a fixed number of components, whatever the noise level is."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from dp_rmt.denoising import matrix_groups, matrix_view
from dp_rmt.denoising.explicit_axes import with_auto_axes
from dp_rmt.random_matrix import singular_values
from dp_rmt.types import Params


def truncate_rank(
    rank: int = 4,
    *,
    svd: Literal["exact", "gram"] = "gram",
    matrix_rule: matrix_view.MatrixRule | None = None,
) -> optax.GradientTransformation:
    """Keeps the leading components of every matrix: ``sum_{i <= rank} y_i u_i v_i^T`` of ``sum_i y_i u_i v_i^T``.

    The result is the nearest matrix of that rank (Eckart & Young 1936). It is also what GaLore (Zhao et al. 2024, arXiv
    2403.03507) passes to its optimizer where its projection is renewed at every step: ``P P^T Y``, P the leading
    singular vectors of the shorter side. GaLore's authors take rank 4 to fine-tune RoBERTa-base on GLUE, and do not
    restore the norm. For a small rank, about ``rank (sqrt(m) + sqrt(n))^2 / (m n)`` of the squared norm of pure noise
    stays. The hard threshold, which cuts by the noise level instead, is ``denoise_matrices(noise_std,
    shrinker="hard_threshold", rescale="none", below_edge="drop")``, except that a matrix with nothing above it passes
    unchanged there.

    Placed after `add_gaussian_noise`, truncation is post-processing; on the clean gradient it would not be private.
    Leaves that the matrix rule does not name, matrices whose shorter side is at most `rank`, and those with an entry
    that is not finite pass unchanged.

    Args:
      rank: number of components that are kept, at least 1.
      svd: "exact" or "gram", see `dp_rmt.random_matrix.singular_values`.
      matrix_rule: which leaves are matrices, see `dp_rmt.denoising.matrix_view`; None for `kernels_are_matrices` there.

    Returns:
      An `optax.GradientTransformation` without state. Shapes are kept; matrices come out in float32 at least.

    Raises:
      ValueError: rank is below 1, or svd is unknown. ``init`` raises it if there are matrices and the rule names none
        of them.

    >>> updates = {"kernel": jnp.diag(jnp.arange(8.0, 0.0, -1.0))}
    >>> truncate = truncate_rank(2)
    >>> truncated, _ = truncate.update(updates, truncate.init(updates))
    >>> print(jnp.diag(truncated["kernel"]).round().astype(int))
    [8 7 0 0 0 0 0 0]
    """
    if rank < 1:
        raise ValueError(f"truncate_rank: rank must be at least 1, got {rank}")
    if svd not in ("exact", "gram"):
        raise ValueError(f"truncate_rank: svd must be 'exact' or 'gram', got {svd!r}")

    def update(updates: Params, state: optax.EmptyState, params: Params | None = None):
        del params

        def truncate(name: str, group: list[matrix_groups.BlockMatrix], noisy: jax.Array) -> jax.Array:
            del name, group
            if rank >= min(noisy.shape[1:]):
                return noisy
            basis, values = singular_values.short_side_svd(noisy, method=svd)
            truncated = singular_values.scale_spectrum(noisy, basis[..., :rank], jnp.ones_like(values[..., :rank]))
            return jnp.where(jnp.isfinite(values[:, :1, None]), truncated, noisy)

        return with_auto_axes(lambda tree: (matrix_groups.map_groups(truncate, tree, matrix_rule), state), updates)

    def init(params: Params) -> optax.EmptyState:
        matrix_view.check_names_some(params, matrix_rule, "truncate_rank")
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)
