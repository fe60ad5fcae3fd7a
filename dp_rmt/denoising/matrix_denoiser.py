"""Denoises one batch of noisy matrices: spectrum, gate, shrinker, blend, norm. It knows arrays only, no trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from dp_rmt.denoising.gates import Gate, Kappa
from dp_rmt.random_matrix import marchenko_pastur, shrinkage, singular_values, stein, subspace
from dp_rmt.random_matrix.units import in_units, unit_of

Shrinker = Literal["frobenius", "operator", "nuclear", "hard_threshold", "optshrink"]
Rescale = Literal["noisy_norm", "signal_norm", "none"]
BelowEdge = Literal["drop", "keep"]
Backend = Literal["exact", "gram", "subspace"]
Blend = Literal["none", "stein"]

SHRINKERS: dict[str, Callable[..., jax.Array]] = {name: getattr(shrinkage, name) for name in get_args(Shrinker)}


AT_THE_EDGE = Kappa(1.0)
"""The paper's gate, which is the default."""


class MatrixDiagnostics(NamedTuple):
    """What the denoiser saw in B matrices. Each field (B,) is a function of the noisy update alone, safe to publish.

    Attributes:
      kept_rank: number of components kept, int32; 0 where the gate refused or an entry is not finite.
      top_over_edge: largest singular value over the bulk edge, y_1 / e; NaN where an entry is not finite.
    """

    kept_rank: jax.Array
    top_over_edge: jax.Array


Restored = tuple[jax.Array, MatrixDiagnostics]
"""Denoised matrices (B, rows, cols), and what was found in each."""


@dataclasses.dataclass(frozen=True)
class MatrixDenoiser:
    """The options of `dp_rmt.denoise_matrices`, which explains them, and what they do to one batch of matrices.

    Raises:
      ValueError: an option is unknown, or does not go with another.
    """

    shrinker: Shrinker = "frobenius"
    gate: Gate = AT_THE_EDGE
    rescale: Rescale = "noisy_norm"
    below_edge: BelowEdge = "drop"
    svd: Backend = "exact"
    blend: Blend = "none"

    def __post_init__(self) -> None:
        for name, kind in (
            ("shrinker", Shrinker),
            ("rescale", Rescale),
            ("below_edge", BelowEdge),
            ("svd", Backend),
            ("blend", Blend),
        ):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"denoise_matrices: {name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        if self.shrinker == "optshrink" and (self.svd == "subspace" or self.blend == "stein"):
            raise ValueError(
                "denoise_matrices: shrinker='optshrink' reads the whole spectrum, so that it needs svd='exact' or "
                "'gram', and has no divergence for blend='stein'; shrinker='frobenius' goes with both"
            )

    def start(self, count: int, rows: int, cols: int, dtype: jnp.dtype) -> jax.Array | None:
        """The start (count, R, K) of the first step's search for singular vectors; None where nothing is searched."""
        return subspace.initial_start(count, rows, cols, dtype=dtype) if self.svd == "subspace" else None

    def __call__(
        self, matrices: jax.Array, noise_std: jax.Array, start: jax.Array | None, step: jax.Array
    ) -> tuple[jax.Array, MatrixDiagnostics, jax.Array | None]:
        """Denoises each matrix.

        Args:
          matrices: (B, rows, cols), float32 or wider.
          noise_std: standard deviation of one entry, a scalar of the same dtype.
          start: what the last step returned, or the result of the method `start`.
          step: int32; the random part of the search is a function of it.

        Returns:
          ``(denoised (B, rows, cols), diagnostics, start of the next step)``.
        """
        if self.svd == "subspace":
            assert start is not None  # from `start`, or from the last step
            return self._from_leading(matrices, noise_std, start, step)
        basis, values = singular_values.short_side_svd(matrices, method=self.svd)
        return *self._restore(matrices, basis, values, noise_std), start

    def _from_leading(
        self, matrices: jax.Array, noise_std: jax.Array, start: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, MatrixDiagnostics, jax.Array]:
        """Denoises from what stands above the gate alone; decomposes in full where that cannot be certified."""
        rows, cols = matrices.shape[1:]
        cut = self.gate.cut(rows=rows, cols=cols, noise_std=noise_std)
        key = jax.random.fold_in(jax.random.key(0), step)  # a public key: it chooses directions and hides nothing
        found = subspace.subspace_svd(matrices, start=start, cut=cut, key=key)
        leading = self._restore(matrices, found.basis, found.values, noise_std)

        def where_incomplete() -> Restored:
            def one(of_one: tuple[jax.Array, jax.Array, Restored]) -> Restored:
                matrix, is_complete, of_leading = of_one
                restored: Restored = jax.lax.cond(
                    is_complete, lambda: of_leading, lambda: self._restore_one(matrix, noise_std)
                )
                return restored

            of_all: Restored = jax.lax.map(one, (matrices, found.is_complete, leading))
            return of_all

        denoised, diagnostics = jax.lax.cond(jnp.all(found.is_complete), lambda: leading, where_incomplete)
        return denoised, diagnostics, found.start

    def _restore_one(self, matrix: jax.Array, noise_std: jax.Array) -> Restored:
        """Denoises a matrix by its full decomposition, on an NVIDIA GPU by eigenvectors, several times faster."""
        batch = matrix[None]

        def decompose(method: Literal["exact", "gram"]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
            return lambda x: tuple(singular_values.short_side_svd(x, method=method))

        basis, values = jax.lax.platform_dependent(batch, cuda=decompose("gram"), default=decompose("exact"))
        restored: Restored = jax.tree.map(lambda x: x[0], self._restore(batch, basis, values, noise_std))
        return restored

    def _restore(self, matrices: jax.Array, basis: jax.Array, values: jax.Array, noise_std: jax.Array) -> Restored:
        """Computes weights from the (leading) singular values (B, K), and the matrices that they give."""
        rows, cols = matrices.shape[1:]
        # Each matrix is in units of its largest value, a power of two: squares fit, and digits do not depend on the
        # scale.
        unit = unit_of(values[:, 0])
        values, noise_std = values * (1 / unit)[:, None], in_units(noise_std, unit)
        shape: Any = {"rows": rows, "cols": cols, "noise_std": noise_std[:, None]}
        shrunken = SHRINKERS[self.shrinker](values, **shape)
        kept = self.gate.passes(values, **shape) & (shrunken > 0)
        base = jnp.full(len(matrices), 1.0 if self.below_edge == "keep" else 0.0, values.dtype)
        weights = jnp.where(kept, shrunken / jnp.where(kept, values, 1.0), base[:, None])
        squared_norm = jnp.sum(jnp.square(matrices * (1 / unit)[:, None, None]), axis=(1, 2))
        accepted = jnp.any(kept, axis=1)
        if self.blend == "stein":
            weight = self._blend_weight(values, kept, weights, base, squared_norm, shape)
            weights, base = 1 + weight[:, None] * (weights - 1), 1 + weight * (base - 1)
            if self.rescale == "none":  # otherwise a multiple of Y would come out as Y, which is better left alone
                accepted = jnp.isfinite(squared_norm)
        factor = self._norm_correction(values, weights, base, squared_norm, matrices.shape, noise_std)
        weights, base = weights * factor[:, None], base * factor
        denoised = singular_values.scale_spectrum(matrices, basis, weights, complement=base)
        denoised = jnp.where(accepted[:, None, None], denoised, matrices)  # what was refused stays bit for bit
        edge = jnp.asarray(marchenko_pastur.bulk_edge(**shape))
        top_over_edge = values[:, 0] / jnp.maximum(edge[:, 0], jnp.finfo(values.dtype).tiny)
        return denoised, MatrixDiagnostics(jnp.sum(kept, axis=1, dtype=jnp.int32), top_over_edge.astype(jnp.float32))

    def _blend_weight(
        self,
        values: jax.Array,
        kept: jax.Array,
        weights: jax.Array,
        base: jax.Array,
        squared_norm: jax.Array,
        shape: Any,
    ) -> jax.Array:
        """How far to go from Y to the denoised matrix, (B,) in [0, 1], by Stein's estimate of the risk."""
        # D is base Y + H, with H made of the kept components alone, so that div D = base m n + div H.
        h = jnp.where(kept, (weights - base[:, None]) * values, 0.0)
        slope = stein.slope_of(SHRINKERS[self.shrinker])(values, **shape)
        h_slope = jnp.where(kept, slope - base[:, None], 0.0)
        divergence = base * shape["rows"] * shape["cols"] + stein.divergence(values, h, h_slope, **shape)
        outside = _outside(values, squared_norm)
        distance = jnp.sum(jnp.square((weights - 1) * values), axis=1) + jnp.square(base - 1) * outside
        return stein.blend_weight(distance, divergence, **(shape | {"noise_std": shape["noise_std"][:, 0]}))

    def _norm_correction(
        self,
        values: jax.Array,
        weights: jax.Array,
        base: jax.Array,
        squared_norm: jax.Array,
        shape: tuple[int, ...],
        noise_std: jax.Array,
    ) -> jax.Array:
        """Factor for each denoised matrix, (B,)."""
        if self.rescale == "none":
            return jnp.ones_like(squared_norm)
        wanted = squared_norm
        if self.rescale == "signal_norm":
            wanted = jnp.maximum(squared_norm - shape[1] * shape[2] * jnp.square(noise_std), 0.0)
        has = jnp.sum(jnp.square(weights * values), axis=1) + jnp.square(base) * _outside(values, squared_norm)
        return jnp.sqrt(wanted) / jnp.maximum(jnp.sqrt(has), jnp.finfo(values.dtype).tiny)


def _outside(values: jax.Array, squared_norm: jax.Array) -> jax.Array:
    """Squared norm of what the given singular values (B, K) leave out; 0 where they are all of them."""
    return jnp.maximum(squared_norm - jnp.sum(jnp.square(values), axis=1), 0.0)
