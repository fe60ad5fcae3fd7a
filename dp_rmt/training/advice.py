"""What limits a private run, measured from noisy gradients alone: the slope along the last step, and the spectra.

It is post-processing: a function of what the mechanism releases, so that it costs no privacy and may be published.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dp_rmt.denoising import matrix_view
from dp_rmt.denoising.explicit_axes import with_auto_axes
from dp_rmt.denoising.gradient import check_noise_std
from dp_rmt.random_matrix.marchenko_pastur import bulk_edge
from dp_rmt.random_matrix.units import in_units, largest_entry, unit_of
from dp_rmt.trees import OPTAX_PLACEHOLDER, is_known, leaves_by_path, shape_and_dtype, wide, wide_dtype, wide_zeros_like
from dp_rmt.types import Params


class StepQuality(NamedTuple):
    """State of `measure_steps`.

    Attributes:
      step: number of updates so far, int32 scalar.
      inner: state of the wrapped optimizer.
      last_update: what the optimizer returned last, float32 or wider; zeros before the first step.
      slope: z of the last step, float32 scalar; 0 before the first update, and NaN after it or behind an update of 0.
      top_over_edge: lower bounds of y_1 / e of the last noisy gradient, (B,) float32 for every matrix leaf, by path.
      directions: where the next search for the largest singular value starts, (B, cols) by path, of any length.
    """

    step: jax.Array
    inner: Any
    last_update: Params
    slope: jax.Array
    top_over_edge: dict[str, jax.Array]
    directions: dict[str, jax.Array]


def measure_steps(
    optimizer: optax.GradientTransformation,
    noise_std: float | optax.Schedule,
    *,
    matrix_rule: matrix_view.MatrixRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures, beside an optimizer that it leaves as it is, whether steps overshoot and what stands above the noise.

    Let delta_t be the update of step t and ``g_(t+1) = G_(t+1) + s N`` the next noisy gradient. Then
    ``z = -<delta_t, g_(t+1)> / (s |delta_t|)`` is N(0, 1) around ``-<delta_t, G_(t+1)> / (s |delta_t|)``, because the
    noise of step t + 1 is independent of delta_t (docs/math.md, "The slope along the last step"). A step behind which
    the loss still falls has a positive mean, and one that went too far a negative one.

    For every matrix Y of the noisy gradient, one step of the power method from the last direction v gives
    ``u = Y v / |Y v|`` and ``|Y^T u| <= y_1``. It is compared with the bulk edge e. In noise alone ``|Y^T u|^2 / s^2``
    is chi-squared with rows + cols - 1 degrees of freedom, far below the edge. The first moment would show a weaker
    signal. Its decay is the wrapped optimizer's own business, and an average beside it would cost another copy of the
    parameters.

    Args:
      optimizer: its updates are handed on as they are, and so are extra arguments.
      noise_std: standard deviation s of ONE entry of the noisy gradient, above 0, or a schedule of it.
      matrix_rule: which leaves are matrices; None for `kernels_are_matrices`.

    Returns:
      A transformation with a `StepQuality`. Its update takes ``noisy``, the noisy gradient before it was denoised, in
      the coordinates of the optimizer's updates.

    Raises:
      ValueError: noise_std is not above 0 and finite. The update raises it where ``noisy`` is missing.

    >>> optimizer = measure_steps(optax.sgd(1.0), 0.5)
    >>> params, downhill = {"w": jnp.zeros(4)}, {"w": jnp.full(4, 2.0)}
    >>> state = optimizer.init(params)
    >>> for _ in range(2):
    ...     _, state = optimizer.update(downhill, state, params, noisy=downhill)
    >>> print(state.slope)  # the loss still falls: |g| / s = 4 / 0.5
    8.0
    """
    check_noise_std(noise_std)
    if not callable(noise_std) and is_known(noise_std) and noise_std == 0:
        raise ValueError("measure_steps: noise_std is 0, so that there is no noise to measure a slope by")
    inside = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> StepQuality:
        ratios: Any = jnp.zeros([])
        directions: Any = jnp.zeros([])
        if not isinstance(params, OPTAX_PLACEHOLDER):
            directions = _first_directions(params, matrix_rule)
            ratios = {path: jnp.zeros(len(starts), jnp.float32) for path, starts in directions.items()}
        return StepQuality(
            step=jnp.zeros([], jnp.int32),
            inner=inside.init(params),
            last_update=wide_zeros_like(params),
            slope=jnp.zeros([], jnp.float32),
            top_over_edge=ratios,
            directions=directions,
        )

    def update(
        updates: Params,
        state: StepQuality,
        params: Params | None = None,
        *,
        noisy: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, StepQuality]:
        if noisy is None:
            raise ValueError(
                "measure_steps: the noisy gradient is missing; call update(..., noisy=gradient) with the gradient as "
                "it was before any denoising"
            )
        std = jnp.asarray(noise_std(state.step) if callable(noise_std) else noise_std, jnp.float32)
        slope = slope_along(state.last_update, noisy, std)
        top_over_edge, directions = _look_at_matrices(noisy, state.directions, std, matrix_rule)
        new, inner = inside.update(updates, state.inner, params, noisy=noisy, **extra_args)
        step = optax.safe_increment(state.step)
        last_update = jax.tree.map(lambda leaf: jnp.array(leaf, wide_dtype(leaf)), new)  # a copy, which can be donated
        return new, StepQuality(step, inner, last_update, slope, top_over_edge, directions)

    return optax.GradientTransformationExtraArgs(init, update)


def slope_along(step: Params, noisy: Params, noise_std: jax.Array) -> jax.Array:
    """The slope of the loss along a step in units of its noise, ``-<step, noisy> / (noise_std |step|)``.

    Every number is in units of its own size, powers of two, so that no square leaves the range of float32.

    Args:
      step: an update of the parameters.
      noisy: a gradient with Gaussian noise that is independent of the step.
      noise_std: of one entry, above 0.

    Returns:
      Float32 scalar; NaN where the step is 0.

    >>> print(slope_along({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([-1.0, 0.0])}, jnp.float32(0.1)))
    6.0
    """
    steps = [wide(leaf) for leaf in jax.tree.leaves(step) if jnp.size(leaf)]
    gradients = [wide(leaf) for leaf in jax.tree.leaves(noisy) if jnp.size(leaf)]
    largest = jnp.max(jnp.array([0.0, *(jnp.max(jnp.abs(leaf)) for leaf in steps)], jnp.float32))
    size, unit = 1 / unit_of(largest), unit_of(noise_std)
    inner = sum(jnp.sum((d * size) * (g * (1 / unit))) for d, g in zip(steps, gradients, strict=True))
    squares = sum(jnp.sum(jnp.square(d * size)) for d in steps)
    return jnp.asarray(-inner / (jnp.sqrt(squares) * (noise_std * (1 / unit))), jnp.float32)


def advice_metrics(states: Any) -> dict[str, jax.Array]:
    """What `measure_steps` saw in the last step, by the names of metrics, wherever in the states it is.

    Args:
      states: of an optimizer.

    Returns:
      ``advice/slope``, z; and where there are matrices ``advice/top_over_edge``, the largest lower bound of y_1 / e
      over all of them. Empty without a `StepQuality`.
    """
    is_quality = lambda node: isinstance(node, StepQuality)  # noqa: E731
    metrics = {}
    for state in filter(is_quality, jax.tree.leaves(states, is_leaf=is_quality)):
        metrics["advice/slope"] = state.slope
        if state.top_over_edge:
            metrics["advice/top_over_edge"] = jnp.max(jnp.concatenate(list(state.top_over_edge.values())))
    return metrics


def _matrices(tree: Params, rule: matrix_view.MatrixRule | None) -> dict[str, jax.Array]:
    """The matrix leaves of a tree by path, each (B, rows, cols) and wide."""
    axes = matrix_view.matrix_leaves(tree, rule)
    return {
        path: matrix_view.to_matrices(wide(leaf), axes[path]) for path, leaf in leaves_by_path(tree) if path in axes
    }


def _first_directions(tree: Params, rule: matrix_view.MatrixRule | None) -> dict[str, jax.Array]:
    """Random vectors (B, cols) by path; their keys are public, since they choose directions and hide nothing."""
    shapes = jax.eval_shape(lambda leaves: _matrices(leaves, rule), jax.tree.map(shape_and_dtype, tree))
    starts = {}
    for index, (path, shape) in enumerate(sorted(shapes.items())):
        key = jax.random.fold_in(jax.random.key(0), index)
        starts[path] = jax.random.normal(key, (shape.shape[0], shape.shape[2]), shape.dtype)
    return starts


def _look_at_matrices(
    noisy: Params, directions: dict[str, jax.Array], noise_std: jax.Array, rule: matrix_view.MatrixRule | None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Lower bounds of y_1 / e by path, and the directions that they were found in."""

    def look(noisy: Params, directions: dict[str, jax.Array], std: jax.Array) -> tuple[Params, Any]:
        found = {path: _power_step(y, directions[path], std) for path, y in _matrices(noisy, rule).items()}
        return noisy, ({path: ratio for path, (ratio, _) in found.items()}, {path: v for path, (_, v) in found.items()})

    return with_auto_axes(look, noisy, directions, noise_std)[1]


def _power_step(matrices: jax.Array, direction: jax.Array, noise_std: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of the power method on each ``Y^T Y``: ``|Y^T u| / e`` for ``u = Y v / |Y v|``, and the next v."""
    _, rows, cols = matrices.shape
    largest = largest_entry(matrices)
    unit = unit_of(largest)
    y = matrices * (1 / unit)[:, None, None]
    u = jnp.einsum("bmn,bn->bm", y, direction)
    u = u / jnp.maximum(jnp.linalg.norm(u, axis=1, keepdims=True), jnp.finfo(u.dtype).tiny)
    v = jnp.einsum("bmn,bm->bn", y, u)
    value = jnp.linalg.norm(v, axis=1)
    edge = bulk_edge(rows=rows, cols=cols, noise_std=in_units(noise_std.astype(unit.dtype), unit))
    # A matrix that is 0 or not finite shows no direction: the search goes on from where it was.
    found = (value > 0) & jnp.isfinite(value)
    following = jnp.where(found[:, None], v / jnp.where(found, value, 1.0)[:, None], direction)
    return (value / edge).astype(jnp.float32), following
