"""The choices beyond the paper's in `denoise_matrices`: the subspace backend, and Stein's blend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt import TracyWidom, denoise_matrices
from dp_rmt.random_matrix import marchenko_pastur

pytestmark = pytest.mark.thorough

STD = 0.05


def spiked(rows: int, cols: int, strengths: list[list[float]], seed: int = 0) -> np.ndarray:
    """One noisy matrix for each list of strengths, in units of the detection threshold."""
    rng = np.random.default_rng(seed)
    threshold = marchenko_pastur.detection_threshold(rows=rows, cols=cols, noise_std=STD)
    noisy = STD * rng.standard_normal((len(strengths), rows, cols))
    for matrix, values in zip(noisy, strengths, strict=True):
        left, right = (np.linalg.qr(rng.standard_normal((n, len(values))))[0] for n in (rows, cols))
        matrix += (left * (np.array(values) * threshold)) @ right.T
    return noisy


def run(noisy: Any, steps: int = 1, **options: Any) -> tuple[np.ndarray, Any]:
    transform = denoise_matrices(STD, **options)
    state = transform.init({"kernel": noisy})
    update = jax.jit(transform.update)
    for _ in range(steps):
        denoised, state = update({"kernel": noisy}, state)
    return np.asarray(denoised["kernel"]), state


@pytest.mark.parametrize(
    ("options", "transposed"),
    [({}, False), ({"below_edge": "keep"}, True), ({"blend": "stein", "gate": TracyWidom(0.01)}, False)],
    ids=str,
)
def test_the_subspace_backend_gives_what_the_exact_one_gives(options: dict, transposed: bool) -> None:
    """Also pure noise, and more components than the subspace holds; at the first step and from the last one's basis."""
    many = list(np.linspace(2, 9, 60))
    noisy = spiked(240, 320, [[3.0, 1.8], [], [6.0, 5.0, 4.0, 1.5], many]).astype(np.float32)
    noisy = noisy.swapaxes(1, 2) if transposed else noisy
    expected, exact = run(noisy, svd="exact", **options)
    ranks = exact.diagnostics["kernel"].kept_rank.tolist()
    assert ranks[1] == 0
    assert ranks[3] > 40
    for steps in (1, 3):
        denoised, state = run(noisy, steps, svd="subspace", **options)
        assert state.diagnostics["kernel"].kept_rank.tolist() == ranks
        np.testing.assert_allclose(
            state.diagnostics["kernel"].top_over_edge, exact.diagnostics["kernel"].top_over_edge, rtol=0.02
        )
        for found, wanted in zip(denoised, expected, strict=True):
            assert np.vdot(found, wanted) / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.999


def test_the_search_starts_from_the_last_basis() -> None:
    noisy = spiked(240, 320, [[4.0, 3.0]]).astype(np.float32)
    _, state = run(noisy, svd="subspace")
    (start,) = state.starts.values()
    left = np.linalg.svd(noisy[0])[0][:, :2]
    np.testing.assert_allclose(np.linalg.norm(left.T @ np.asarray(start[0]), axis=1), 1.0, atol=1e-3)


def test_the_blend_is_the_one_of_least_estimated_risk() -> None:
    """The divergence from the whole Jacobian, a thousand columns, in float64."""
    rows, cols = 24, 40
    noisy = spiked(rows, cols, [[2.5, 1.6] + [0.7] * 18])[0]
    with jax.enable_x64(True):

        def shrink(matrix: jax.Array) -> jax.Array:
            transform = denoise_matrices(STD, rescale="none")
            return transform.update({"kernel": matrix}, transform.init({"kernel": matrix}))[0]["kernel"]

        denoised = np.asarray(shrink(jnp.asarray(noisy)))
        jacobian = jax.jit(jax.jacfwd(shrink))(jnp.asarray(noisy)).reshape(rows * cols, rows * cols)
        divergence = float(jnp.trace(jacobian))
        found, _ = run(jnp.asarray(noisy), rescale="none", blend="stein")
    distance = float(np.sum(np.square(denoised - noisy)))
    weight = STD**2 * (rows * cols - divergence) / distance
    assert 0.5 < weight < 0.99
    np.testing.assert_allclose(found, (1 - weight) * noisy + weight * denoised, rtol=0, atol=1e-9)


def test_a_refused_matrix_is_shrunken_as_a_whole_or_left_alone() -> None:
    weak = spiked(24, 40, [[0.9] * 20])[0]  # much energy, nothing above the edge
    gate = TracyWidom(1e-6)
    shrunken, state = run(jnp.asarray(weak, jnp.float32), rescale="none", blend="stein", gate=gate)
    assert state.diagnostics["kernel"].kept_rank.tolist() == [0]
    james_stein = 1 - STD**2 * weak.size / np.sum(weak**2)
    assert 0.1 < james_stein < 0.6
    np.testing.assert_allclose(shrunken, james_stein * weak, rtol=1e-4)
    for rescale in ("noisy_norm", "signal_norm"):
        kept, _ = run(jnp.asarray(weak, jnp.float32), rescale=rescale, blend="stein", gate=gate)
        np.testing.assert_array_equal(kept, weak.astype(np.float32))


@pytest.mark.parametrize("svd", ["gram", "subspace"])
def test_what_is_not_finite_comes_out_as_it_went_in(svd: Any) -> None:
    noisy = spiked(240, 260, [[3.0], [3.0]]).astype(np.float32)
    noisy[1, 2, 3] = np.nan
    denoised, state = run(noisy, svd=svd, blend="stein", rescale="none")
    np.testing.assert_array_equal(denoised[1], noisy[1])
    assert state.diagnostics["kernel"].kept_rank.tolist() == [1, 0]


@pytest.mark.parametrize("options", [{"svd": "subspace"}, {"blend": "stein"}])
def test_optshrink_needs_the_whole_spectrum(options: dict) -> None:
    with pytest.raises(ValueError, match=r"shrinker='optshrink' reads the whole spectrum.*shrinker='frobenius'"):
        denoise_matrices(STD, shrinker="optshrink", **options)
