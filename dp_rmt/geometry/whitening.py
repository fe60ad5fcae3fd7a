"""Whitening of what layers see: the coordinates in which their second moments are nearly even."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_rmt.arguments import integer, real
from dp_rmt.clipping.coordinates import AxisMap, Coordinates, LeafAxes
from dp_rmt.denoising.explicit_axes import with_auto_axes
from dp_rmt.geometry.layer_moments import LayerMoments
from dp_rmt.trees import OPTAX_PLACEHOLDER, wide
from dp_rmt.types import Params

RIDGE, POWER = 0.1, -0.5


def whitened_coordinates(
    moments: Mapping[str, LayerMoments], *, ridge: float = RIDGE, power: float = POWER, rank: int | None = None
) -> Coordinates:
    """The coordinates ``W = W_0 + F V H`` of matrices in which inputs (and output gradients) are nearly white.

    Per matrix, with the eigenvectors V and eigenvalues w of the second moment A of its inputs,

        F = c V diag((w / mean(w) + ridge)^power) V^T,      |F|_F^2 = the number of inputs,

    and H likewise from the output gradients where their moments are given. For ``power=-1/2`` and no ridge the mapped
    inputs ``F a`` are white (docs/math.md, "Whitened inputs"). With a `rank` the directions of the largest eigenvalues
    are mapped so, and all others by one number, the root mean square of theirs.

    Args:
      moments: from `layer_moments`, on public rows.
      ridge: added to the eigenvalues in units of their mean; it bounds how much a direction without inputs is raised.
      power: of the eigenvalues, not above 0.
      rank: directions of each side that have a factor of their own; None for all.

    Returns:
      `Coordinates`. Matrices with the same moments, such as query, key and value, share a map.

    Raises:
      ValueError: a number is out of range.
    """
    ridge = real("ridge", ridge, "be above 0", lambda x: x > 0)
    power = real("power", power, "be at least -2 and at most 0", lambda x: -2 <= x <= 0)
    if rank is not None:
        rank = integer("rank", rank, "be at least 1 and an integer, or None", lambda k: k >= 1)
    maps: dict[str, AxisMap] = {}
    known: list[tuple[str, np.ndarray]] = []
    leaves = []

    def name_of_map(path: str, moment: np.ndarray | None, side: str) -> str | None:
        if moment is None:
            return None
        for name, other in known:
            if other.shape == moment.shape and np.allclose(other, moment, rtol=1e-5, atol=1e-6 * np.abs(moment).max()):
                return name
        name = f"{path}:{side}"
        known.append((name, moment))
        maps[name] = whitening_map(moment, ridge=ridge, power=power, rank=rank)
        return name

    for path, moment in moments.items():
        names = (name_of_map(path, moment.inputs, "rows"), name_of_map(path, moment.outputs, "cols"))
        leaves.append(LeafAxes(path, moment.row_axes, moment.col_axes, *names, moment.bias))
    return Coordinates(maps, tuple(leaves))


def whitening_map(moment: np.ndarray, *, ridge: float, power: float, rank: int | None = None) -> AxisMap:
    """The map ``F`` of `whitened_coordinates` for one second moment, (n, n), or a stack of them.

    A moment of zero, of a layer that has seen nothing, gives the identity.

    >>> F = whitening_map(np.diag([8.0, 0.0]), ridge=0.5, power=-0.5)
    >>> mapped = F.along_last_axis(jnp.eye(2))
    >>> round(float(mapped[1, 1] / mapped[0, 0]), 3), round(float(jnp.sum(mapped**2)), 3)  # sqrt(2.5 / 0.5)
    (2.236, 2.0)
    """
    stack, n = moment.shape[:-2], moment.shape[-1]
    pairs = [
        _scale_and_basis(matrix, ridge, power, n if rank is None else min(rank, n))
        for matrix in moment.reshape(-1, n, n)
    ]
    scales, bases = (np.stack(parts).astype(np.float32) for parts in zip(*pairs, strict=True))
    return AxisMap(jnp.asarray(scales.reshape(stack)), jnp.asarray(bases.reshape(*stack, *bases.shape[1:])))


def _scale_and_basis(matrix: np.ndarray, ridge: float, power: float, rank: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(matrix)
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    mean = values.mean()
    factors = (values / mean + ridge) ** power if mean > 0 else np.ones(n)
    factors[rank:] = np.sqrt(np.mean(factors[rank:] ** 2)) if rank < n else factors[rank:]
    factors *= np.sqrt(n / np.sum(factors**2))
    scale = factors.max()
    # F = scale (I - U U^T) with the columns U_i = v_i sqrt(1 - factor_i / scale)
    return np.asarray(scale), vectors[:, :rank] * np.sqrt(np.maximum(1 - factors[:rank] / scale, 0))


def top_shares(moments: Mapping[str, LayerMoments]) -> dict[str, float]:
    """The share of the largest eigenvalue in the trace of each matrix's input moment; of a stack, the largest share.

    A share near 1 means that a layer's inputs are nearly all the same vector. Then the loss curves along that one
    direction much more than along any other, and it limits the learning rate.
    """
    shares = {}
    for path, moment in moments.items():
        values = np.linalg.eigvalsh(moment.inputs)
        traces = np.maximum(values.sum(-1), np.finfo(np.float64).tiny)
        shares[path] = float(np.max(values[..., -1] / traces))
    return shares


class WhitenState(NamedTuple):
    """State of `whiten_inputs`: its maps, so that a checkpoint has them."""

    coordinates: Coordinates


def whiten_inputs(coordinates: Coordinates) -> optax.GradientTransformation:
    """Maps updates by public constants: ``u -> F u H`` for every matrix that the coordinates name.

    - Behind an optimizer it makes its steps those of whitened coordinates; clipping and noise stay where they are.
    - Before an optimizer it whitens the noisy gradient, whose noise is then no longer the same in all directions: let
      it come after any denoiser.
    - Behind an optimizer whose gradient was clipped in the same coordinates (``clipped_grad(..., coordinates=)``) it
      takes the update of V back to the parameters. Then the noise that the optimizer sees is white.

    Formal guarantee: the maps are public constants, so this is post-processing.

    Args:
      coordinates: from `whitened_coordinates`.

    Returns:
      An `optax.GradientTransformation` with a `WhitenState`. Updates come out in float32 at least.

    Raises:
      ValueError: from ``init`` and ``update``, if the parameters lack a leaf of the coordinates.
    """

    def init(params: Params) -> WhitenState:
        if not isinstance(params, OPTAX_PLACEHOLDER):
            coordinates.check_leaves(params)
        return WhitenState(jax.tree.map(jnp.array, coordinates))  # copies: a state can be donated

    def update(updates: Params, state: WhitenState, params: Params | None = None) -> tuple[Params, WhitenState]:
        del params
        mapped, _ = with_auto_axes(
            lambda tree, coordinates: (coordinates(tree), ()), jax.tree.map(wide, updates), state.coordinates
        )
        return mapped, state

    return optax.GradientTransformation(init, update)


def coordinates_of(optimizer_state: Any) -> Coordinates:
    """The coordinates that `whiten_inputs` keeps in the state of an optimizer, whatever stages surround it.

    Raises:
      ValueError: no stage of the optimizer is `whiten_inputs`, or more than one.
    """
    is_whitening = lambda node: isinstance(node, WhitenState)  # noqa: E731
    found = [node for node in jax.tree.leaves(optimizer_state, is_leaf=is_whitening) if is_whitening(node)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer has {len(found)} stages of whiten_inputs: gradients that are clipped in other coordinates "
            "need one, which takes the update back to the parameters"
        )
    return found[0].coordinates
