"""Denoising of noisy gradient matrices as an optax transformation. It is post-processing, so it costs no privacy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dp_rmt.denoising import matrix_groups, matrix_view
from dp_rmt.denoising.explicit_axes import with_auto_axes
from dp_rmt.denoising.gates import Gate
from dp_rmt.denoising.joins import JoinRule
from dp_rmt.denoising.matrix_denoiser import (
    AT_THE_EDGE,
    Backend,
    BelowEdge,
    Blend,
    MatrixDenoiser,
    MatrixDiagnostics,
    Rescale,
    Shrinker,
)
from dp_rmt.trees import OPTAX_PLACEHOLDER, is_known
from dp_rmt.types import Params


class DenoiseState(NamedTuple):
    """State of `denoise_matrices`.

    Attributes:
      step: number of updates so far, int32 scalar.
      diagnostics: `MatrixDiagnostics` of the last update for every matrix leaf (or joined leaves), by path.
        `optax.tree_map_params` takes each of the dicts as one field that is not a parameter.
      starts: the starts of the next search for singular vectors, by group of equal shapes; None unless
        ``svd="subspace"``.
    """

    step: jax.Array
    diagnostics: dict[str, MatrixDiagnostics]
    starts: dict[str, jax.Array | None]


def denoise_matrices(
    noise_std: float | optax.Schedule,
    *,
    shrinker: Shrinker = "frobenius",
    gate: Gate = AT_THE_EDGE,
    rescale: Rescale = "noisy_norm",
    below_edge: BelowEdge = "drop",
    blend: Blend = "none",
    svd: Backend = "exact",
    matrix_rule: matrix_view.MatrixRule | None = None,
    join: JoinRule | None = None,
    sharding: NamedSharding | None = None,
) -> optax.GradientTransformation:
    """Restores the singular-value profile of every noisy gradient matrix (arXiv 2510.01137).

    Let ``Y = G + noise_std N = sum_i y_i u_i v_i^T``. If the gate passes, the result is ``D = sum_i w_i y_i u_i v_i^T``
    with ``w_i = eta(y_i) / y_i`` for the components that are kept, and with 0 (``below_edge="drop"``) or 1 (``"keep"``,
    partial restoration) for the others. Three kinds of leaves pass through unchanged: a matrix in which no component is
    kept, a matrix with an entry that is not finite, and every leaf that the matrix rule does not name. With
    ``blend="stein"`` the result is ``(1 - a) Y + a D`` instead. Each matrix has its own a in [0, 1], the one with the
    least squared error by Stein's unbiased estimate (docs/math.md). D is then 0 where nothing is kept, and with
    ``rescale="none"`` such a matrix is shrunken as a whole (James & Stein). Last, the result is rescaled to ``||Y||_F``
    ("noisy_norm"), to ``sqrt(max(||Y||_F^2 - m n noise_std^2, 0))``, an estimate of ``||G||_F`` ("signal_norm"), or not
    at all.

    The scale does not matter: from 1e-30 to 1e30, ``2^k Y`` with ``2^k noise_std`` gives 2^k times the result.

    Formal guarantee: the output is a function of the noisy update and of public constants. Placed after
    `add_gaussian_noise` it is post-processing and leaves epsilon and delta as they are.

    Args:
      noise_std: standard deviation of ONE entry of the incoming update, or a schedule of it. With the wrong unit the
        method is silently off. `dp_rmt.mechanism.DPSGD` computes it once for noise and denoiser.
      shrinker: eta, a function of `dp_rmt.random_matrix.shrinkage`.
      gate: decides what is signal, see `dp_rmt.denoising.gates`. The default is ``Kappa(1.0)``, the bulk edge.
      rescale: norm correction of a denoised matrix.
      below_edge: what happens to components that are not kept, in a matrix that is denoised.
      blend: "stein" for the blend of noisy and denoised matrix.
      svd: "exact" (an SVD), "gram" (eigenvectors of ``Y Y^T``) or "subspace", see `dp_rmt.random_matrix`. "subspace"
        finds only what stands above the gate, from the last step's singular vectors. A matrix is decomposed in full
        where the certificate cannot exclude that more stands above the gate.
      matrix_rule: which leaves are matrices, see `dp_rmt.denoising.matrix_view`. None is `kernels_are_matrices` there,
        which knows weights by the names that Flax, Equinox, Haiku and torch give them.
      join: which leaves are denoised side by side as one matrix, such as `dp_rmt.denoising.joins.shared_inputs`.
      sharding: where the batch of equal-shaped matrices is divided among devices, such as
        ``NamedSharding(mesh, PartitionSpec("data"))``. The results are gathered once for each shape, unless the mesh
        divides the parameters (axes ``fsdp`` and ``tensor``): then no device ever has them all. With None every device
        denoises everything.

    Returns:
      An `optax.GradientTransformation` with a `DenoiseState`. Shapes are kept; matrices come out in float32 at least.

    Raises:
      ValueError: an option is unknown, or noise_std is negative or not finite. ``init`` raises it if there are matrices
        and the matrix rule or the join rule names none of them.

    >>> noise_std = 0.01
    >>> updates = {"layer": {"kernel": jnp.outer(jnp.ones(32), jnp.ones(64))}}
    >>> denoise = denoise_matrices(noise_std)
    >>> denoised, state = denoise.update(updates, denoise.init(updates))
    >>> int(state.diagnostics["layer/kernel"].kept_rank[0])
    1
    """
    check_noise_std(noise_std)
    tree_denoiser = TreeDenoiser(
        MatrixDenoiser(shrinker=shrinker, gate=gate, rescale=rescale, below_edge=below_edge, blend=blend, svd=svd),
        matrix_rule,
        join,
        sharding,
    )

    @jax.named_scope("denoise")  # for profiles
    def update(updates: Params, state: DenoiseState, params: Params | None = None) -> tuple[Params, DenoiseState]:
        del params
        return tree_denoiser(updates, state, noise_std(state.step) if callable(noise_std) else noise_std)

    return optax.GradientTransformation(tree_denoiser.init, update)


class TreeDenoiser(NamedTuple):
    """`MatrixDenoiser` applied to the matrices of a tree. The attributes are the options of `denoise_matrices`."""

    matrix_denoiser: MatrixDenoiser
    matrix_rule: matrix_view.MatrixRule | None = None
    join: JoinRule | None = None
    sharding: NamedSharding | None = None

    def init(self, params: Params) -> DenoiseState:
        """The state before the first update of a tree of these shapes."""
        step = jnp.zeros([], jnp.int32)
        if isinstance(params, OPTAX_PLACEHOLDER):
            return DenoiseState(step, *(cast(Any, jnp.zeros([])) for _ in range(2)))
        matrix_groups.check_names_some(params, self.matrix_rule, self.join, "denoise_matrices")
        diagnostics, starts = {}, {}
        for shape, group in matrix_groups.matrix_groups(params, self.matrix_rule, self.join).items():
            for matrix in group:
                zeros = jnp.zeros(matrix.number, jnp.int32)
                diagnostics[matrix.name] = MatrixDiagnostics(zeros, zeros.astype(jnp.float32))
            count = sum(matrix.number for matrix in group)
            starts[shape] = self.matrix_denoiser.start(count, group[0].rows, group[0].cols, group[0].dtype)
        return DenoiseState(step, diagnostics, starts)

    def __call__(
        self, updates: Params, state: DenoiseState, noise_std: float | jax.Array
    ) -> tuple[Params, DenoiseState]:
        """Returns ``(denoised updates, new state)``; noise_std is that of one entry of the updates."""
        return with_auto_axes(self._denoise, updates, state, noise_std)

    def _denoise(
        self, updates: Params, state: DenoiseState, noise_std: float | jax.Array
    ) -> tuple[Params, DenoiseState]:
        diagnostics: dict[str, MatrixDiagnostics] = {}
        starts: dict[str, jax.Array | None] = {}
        denoise = self.matrix_denoiser if self.sharding is None else _divided(self.matrix_denoiser, self.sharding)

        def denoise_group(shape: str, group: list[matrix_groups.BlockMatrix], noisy: jax.Array) -> jax.Array:
            std = jnp.asarray(noise_std, noisy.dtype)
            denoised, seen, starts[shape] = denoise(noisy, std, state.starts[shape], state.step)
            for matrix, *parts in zip(group, *(matrix_groups.split(group, field) for field in seen), strict=True):
                diagnostics[matrix.name] = MatrixDiagnostics(*parts)
            return denoised

        tree = matrix_groups.map_groups(denoise_group, updates, self.matrix_rule, self.join)
        return tree, DenoiseState(state.step + 1, diagnostics, starts)


def check_noise_std(noise_std: float | optax.Schedule) -> None:
    """Raises ValueError unless noise_std is a schedule, or a number that is not negative and finite."""
    if not callable(noise_std) and is_known(noise_std) and not 0 <= noise_std < float("inf"):
        raise ValueError(f"noise_std must be non-negative and finite, got {noise_std}")


"""It has no paths to name matrices by. Each leaf of what `init` returns for it stands for a part of the state."""


def _divided(denoise: MatrixDenoiser, sharding: NamedSharding) -> Any:
    """The same function of whole batches, in which each device of the sharding's first axis denoises a part."""
    mesh, axes = sharding.mesh, sharding.spec[0]
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    devices = math.prod(mesh.shape[name] for name in names)
    rows, cols = (name if mesh.shape.get(name, 1) > 1 else None for name in ("fsdp", "tensor"))
    whole, by_part = PartitionSpec(), PartitionSpec(None, rows, cols)
    # Each device has parts of all matrices, as the parameters are divided, and needs some matrices as a whole. One axis
    # of the mesh after the other, these are exchanges. If XLA is asked for all axes at once, it puts all matrices on
    # every device in between.
    by_copy = PartitionSpec(tuple(name for name in names if name not in (rows, cols)), rows, cols)
    without_cols = PartitionSpec(tuple(name for name in names if name != cols), None, cols)
    by_matrix = PartitionSpec(names)

    def through(x: jax.Array, *specs: PartitionSpec) -> jax.Array:
        for spec in specs:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x

    def divided(matrices: jax.Array, noise_std: jax.Array, start: Any, step: jax.Array) -> tuple[Any, ...]:
        count = len(matrices)
        # The number of matrices must be a multiple of the number of devices. So the last matrix is repeated, and its
        # copies are dropped. Each device does so with its own parts, so there are as many copies as devices.
        index = jnp.minimum(jnp.arange(-(-count // devices) * devices), count - 1)
        is_full = count % devices == 0

        def filled_up(x: jax.Array, spec: PartitionSpec) -> jax.Array:
            return through(x if is_full else x[through(index, PartitionSpec(spec[0]))], spec)

        part = jax.shard_map(
            denoise, mesh=mesh, in_specs=(by_matrix, whole, by_matrix, whole), out_specs=by_matrix, check_vma=False
        )
        moved = through(filled_up(through(matrices, by_part), by_copy), without_cols, by_matrix)
        starts = jax.tree.map(lambda x: filled_up(through(x, whole), by_matrix), start)
        denoised, *others = part(moved, noise_std, starts, step)
        denoised = through(through(denoised, without_cols, by_copy)[:count], by_part)
        return denoised, *jax.tree.map(lambda x: through(x[:count], whole), others)

    return divided
