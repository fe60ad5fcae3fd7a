"""Denoising of noisy gradient matrices as an optax transformation: post-processing, so it costs no privacy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dp_rmt import matrix_view
from dp_rmt.random_matrix import marchenko_pastur, shrinkage, singular_values
from dp_rmt.types import Params

Shrinker = Literal["frobenius", "operator", "nuclear", "hard_threshold", "optshrink"]
Rescale = Literal["noisy_norm", "signal_norm", "none"]
BelowEdge = Literal["drop", "keep"]

SHRINKERS: dict[str, Callable[..., jax.Array]] = {
    name: getattr(shrinkage, name) for name in ("frobenius", "operator", "nuclear", "hard_threshold", "optshrink")
}


@dataclasses.dataclass(frozen=True)
class Kappa:
    """The paper's gate: compare singular values with ``kappa * e``, e the bulk edge (arXiv 2510.01137).

    Attributes:
      kappa: multiple of the bulk edge; dimensionless, at least 0.
      per: "layer" denoises a matrix if its largest singular value passes, "component" keeps those values that pass.
    """

    kappa: float = 1.0
    per: Literal["layer", "component"] = "layer"

    def __post_init__(self) -> None:
        if not self.kappa >= 0:
            raise ValueError(f"kappa must be at least 0, got {self.kappa}; 1.0 is the edge of the noise")
        if self.per not in ("layer", "component"):
            raise ValueError(f"a gate decides per 'layer' or per 'component', got {self.per!r}")

    def passes(self, values: jax.Array, *, rows: int, cols: int, noise_std: jax.Array) -> jax.Array:
        """Which components of each matrix pass; values (B, R) descending -> bool (B, R)."""
        above = values > self.kappa * marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=noise_std)
        return jnp.broadcast_to(above[:, :1], above.shape) if self.per == "layer" else above


class MatrixDiagnostics(NamedTuple):
    """What the denoiser saw in one leaf, functions of the noisy update alone and so safe to publish; each (B,).

    Attributes:
      kept_rank: number of components kept, int32; 0 where the gate refused.
      top_over_edge: largest singular value over the bulk edge, y_1 / e.
    """

    kept_rank: jax.Array
    top_over_edge: jax.Array


class DenoiseState(NamedTuple):
    """State of `denoise_matrices`.

    Attributes:
      step: number of updates so far, int32 scalar.
      diagnostics: `MatrixDiagnostics` of the last update for every matrix leaf, by path.
    """

    step: jax.Array
    diagnostics: dict[str, MatrixDiagnostics]


def denoise_matrices(
    noise_std: float | optax.Schedule,
    *,
    shrinker: Shrinker = "frobenius",
    gate: Kappa = Kappa(1.0),
    rescale: Rescale = "noisy_norm",
    below_edge: BelowEdge = "drop",
    svd: Literal["exact", "gram"] = "exact",
    matrix_rule: matrix_view.MatrixRule = matrix_view.kernels_are_matrices,
) -> optax.GradientTransformation:
    """Restores the singular-value profile of every noisy gradient matrix (arXiv 2510.01137).

    For ``Y = G + noise_std N = sum_i y_i u_i v_i^T``: if the gate passes, ``X = sum_i w_i y_i u_i v_i^T`` with
    ``w_i = eta(y_i) / y_i`` for the components kept and 0 (``below_edge="drop"``) or 1 (``"keep"``, partial
    restoration) for the others; then X is rescaled to ``||Y||_F`` ("noisy_norm"), to
    ``sqrt(max(||Y||_F^2 - m n noise_std^2, 0))``, an estimate of ``||G||_F`` ("signal_norm"), or not at all. A matrix
    in which no component is kept passes through unchanged, and so does every leaf that the matrix rule does not name.

    Formal guarantee: the output is a function of the noisy update and of public constants. Placed after
    `add_gaussian_noise` it is post-processing and leaves epsilon and delta as they are.

    Args:
      noise_std: standard deviation of ONE entry of the incoming update, or a schedule of it; with the wrong unit the
        method is silently off (`dp_rmt.mechanism.DPSGD` computes it once for noise and denoiser).
      shrinker: eta, a function of `dp_rmt.random_matrix.shrinkage`.
      gate: decides what is signal, see `Kappa`.
      rescale: norm correction of a denoised matrix.
      below_edge: what happens to components that are not kept, in a matrix that is denoised.
      svd: "exact" or "gram", see `dp_rmt.random_matrix.singular_values`.
      matrix_rule: which leaves are matrices, see `dp_rmt.matrix_view`.

    Returns:
      An `optax.GradientTransformation` with a `DenoiseState`; shapes are kept, matrices come out in float32 at least.

    Raises:
      ValueError: an option is unknown, or noise_std is negative or not finite.

    >>> noise_std = 0.01
    >>> updates = {"layer": {"kernel": jnp.outer(jnp.ones(32), jnp.ones(64))}}
    >>> denoise = denoise_matrices(noise_std)
    >>> denoised, state = denoise.update(updates, denoise.init(updates))
    >>> int(state.diagnostics["layer/kernel"].kept_rank[0])
    1
    """
    _check_options(noise_std, shrinker=shrinker, rescale=rescale, below_edge=below_edge, svd=svd)

    def init(params: Params) -> DenoiseState:
        diagnostics = {}
        leaves = dict(matrix_view.leaves_by_path(params))
        for path, axes in matrix_view.matrix_leaves(params, matrix_rule).items():
            count = jax.eval_shape(lambda x, axes=axes: matrix_view.to_matrices(x, axes), leaves[path]).shape[0]
            diagnostics[path] = MatrixDiagnostics(jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.float32))
        return DenoiseState(jnp.zeros([], jnp.int32), diagnostics)

    denoise = functools.partial(
        _denoise, shrinker=shrinker, gate=gate, rescale=rescale, below_edge=below_edge, svd=svd
    )

    def update(updates: Params, state: DenoiseState, params: Params | None = None):
        del params
        std = noise_std(state.step) if callable(noise_std) else noise_std
        matrices = matrix_view.matrix_leaves(updates, matrix_rule)
        diagnostics: dict[str, MatrixDiagnostics] = {}
        leaves = []
        after = jnp.zeros([], jnp.int32)
        for path, leaf in matrix_view.leaves_by_path(updates):
            if path in matrices:
                wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
                # One decomposition at a time: on the CPU, LAPACK calls of one program that overlap can hang for ever
                # (jaxlib 0.10.2, seen on two cores). `after` is always 0, but XLA does not know.
                noisy = matrix_view.to_matrices(wide, matrices[path]) + after.astype(wide.dtype)
                denoised, diagnostics[path] = denoise(noisy, jnp.asarray(std, wide.dtype))
                after = jnp.minimum(jnp.sum(diagnostics[path].kept_rank), 0)
                leaf = matrix_view.from_matrices(denoised, matrices[path], leaf.shape)
            leaves.append(leaf)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), DenoiseState(state.step + 1, diagnostics)

    return optax.GradientTransformation(init, update)


def _denoise(
    matrices: jax.Array,
    std: jax.Array,
    *,
    shrinker: Shrinker,
    gate: Kappa,
    rescale: Rescale,
    below_edge: BelowEdge,
    svd: Literal["exact", "gram"],
) -> tuple[jax.Array, MatrixDiagnostics]:
    """Matrices (B, rows, cols) of one leaf, and what was seen in each; see `denoise_matrices` for the equation."""
    rows, cols = matrices.shape[1:]
    basis, values = singular_values.short_side_svd(matrices, method=svd)
    shrunken = SHRINKERS[shrinker](values, rows=rows, cols=cols, noise_std=std)
    kept = gate.passes(values, rows=rows, cols=cols, noise_std=std) & (shrunken > 0)
    weights = jnp.where(kept, shrunken / jnp.where(kept, values, 1.0), 1.0 if below_edge == "keep" else 0.0)
    denoised = singular_values.scale_spectrum(matrices, basis, weights)
    denoised = denoised * _norm_correction(matrices, denoised, std, rescale)[:, None, None]
    accepted = jnp.any(kept, axis=1)
    edge = marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=std)
    top_over_edge = (values[:, 0] / jnp.maximum(edge, jnp.finfo(values.dtype).tiny)).astype(jnp.float32)
    return (
        jnp.where(accepted[:, None, None], denoised, matrices),
        MatrixDiagnostics(jnp.sum(kept, axis=1, dtype=jnp.int32), top_over_edge),
    )


def _norm_correction(noisy: jax.Array, denoised: jax.Array, std: jax.Array, rescale: Rescale) -> jax.Array:
    """Factor for each denoised matrix, shape (B,)."""
    if rescale == "none":
        return jnp.ones(len(noisy), noisy.dtype)
    squared_norm = jnp.sum(jnp.square(noisy), axis=(1, 2))
    if rescale == "signal_norm":
        squared_norm = jnp.maximum(squared_norm - noisy.shape[1] * noisy.shape[2] * jnp.square(std), 0.0)
    denoised_norm = jnp.sqrt(jnp.sum(jnp.square(denoised), axis=(1, 2)))
    return jnp.sqrt(squared_norm) / jnp.maximum(denoised_norm, jnp.finfo(noisy.dtype).tiny)


def _check_options(noise_std: float | optax.Schedule, **options: str) -> None:
    if not callable(noise_std) and not 0 <= noise_std < float("inf"):
        raise ValueError(f"noise_std must be non-negative and finite, got {noise_std}")
    allowed = {
        "shrinker": tuple(SHRINKERS),
        "rescale": ("noisy_norm", "signal_norm", "none"),
        "below_edge": ("drop", "keep"),
        "svd": ("exact", "gram"),
    }
    for name, value in options.items():
        if value not in allowed[name]:
            raise ValueError(f"denoise_matrices: {name} must be one of {', '.join(allowed[name])}, got {value!r}")
