"""The leading singular values and vectors against NumPy's SVD in double precision: above all, nothing is missed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.random_matrix import marchenko_pastur, shrinkage, singular_values, subspace
from dp_rmt.random_matrix.subspace import SubspaceSVD, initial_start, subspace_svd

pytestmark = pytest.mark.thorough

SIDE = 168  # the smallest searched in a Krylov space are a little smaller; all else here is as for 768
# Rounding of a float32 Gram matrix, see `_ROUNDING`: values this near to the cut may fall on either side.
AT_THE_CUT = 1e-5

_jitted = jax.jit(subspace_svd)


def decompose(matrices, cut, *, start=None, seed=0) -> SubspaceSVD:
    matrices = jnp.asarray(matrices)
    if start is None:
        start = initial_start(*matrices.shape, dtype=matrices.dtype)
    return jax.tree.map(np.asarray, _jitted(matrices, start=start, cut=cut, key=jax.random.key(seed)))


def edge(rows, cols):
    return marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=1.0)


def spiked(count, rows, cols, strengths, *, seed=0, dtype=np.float32):
    """Unit noise and components of so many times the detection threshold, in directions without preference."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((count, rows, len(strengths))))[0]
    right = np.linalg.qr(rng.standard_normal((count, cols, len(strengths))))[0]
    signal = left * (np.asarray(strengths) * (rows * cols) ** 0.25) @ np.swapaxes(right, 1, 2)
    return (signal + rng.standard_normal((count, rows, cols))).astype(dtype)


def with_values(values, *, seed=0, cols=SIDE, dtype=np.float32):
    """One matrix (1, R, cols) with these singular values, 0 elsewhere."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((SIDE, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((cols, len(values))))[0]
    return (left * np.asarray(values) @ right.T).astype(dtype)[None]


def bulk(number=SIDE - 40, top=0.9):
    return list(np.linspace(0.1, top, number))


def exact(matrices):
    """Left singular vectors and values of the shorter side first."""
    matrices = np.asarray(matrices, np.float64)
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else np.swapaxes(matrices, 1, 2)
    return np.linalg.svd(wide, full_matrices=False)[:2]


def check_honest(matrices, found, cut):
    """Wherever it says that all are there, they are, and nothing else is."""
    values = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)
    for mine, true, is_complete in zip(found.values, values, found.is_complete, strict=True):
        if is_complete:
            assert np.sum(true > cut * (1 + AT_THE_CUT)) <= np.sum(mine > cut) <= np.sum(true > cut * (1 - AT_THE_CUT))
            kept = mine[mine > cut]
            np.testing.assert_allclose(kept, true[: len(kept)], rtol=1e-3)


@pytest.mark.parametrize(
    ("rows", "cols"), [(SIDE, SIDE), (SIDE, 300), (300, SIDE), (200, 215), (20, 30), (30, 20), (1, 9)]
)
def test_values_and_vectors_above_the_cut(rows, cols):
    matrices = spiked(3, rows, cols, [8, 5, 3, 2][: min(rows, 4)])
    cut, short = edge(rows, cols), min(rows, cols)
    found = decompose(matrices, cut)
    basis, values = exact(matrices)
    number = min(short, 32) if short >= SIDE else short
    assert found.basis.shape == (3, short, number)
    assert found.values.shape == (3, number)
    assert found.start.shape == (3, short, min(8, short))
    assert found.is_complete.all()
    check_honest(matrices, found, cut)
    assert (np.diff(found.values, axis=1) <= 0).all()
    identity = np.tile(np.eye(number), (3, 1, 1))
    np.testing.assert_allclose(np.swapaxes(found.basis, 1, 2) @ found.basis, identity, atol=1e-5)
    for i in range(3):
        kept = np.sum(values[i] > cut)
        np.testing.assert_allclose(found.values[i, :kept], values[i, :kept], rtol=1e-5)
        cosines = np.abs(np.sum(found.basis[i, :, :kept] * basis[i, :, :kept], axis=0))
        assert kept == 0 or cosines.min() > 0.999


@pytest.mark.parametrize("strength", [1.1, 1.5, 2.0, 3.0, 4.0])
def test_what_is_denoised_is_as_if_decomposed_in_full(strength):
    # The smallest cosine that the certificate lets through; at 1.1 the spike stands among the largest noise values.
    rows, cols = 224, 320
    matrices = jnp.asarray(spiked(12, rows, cols, [strength]))
    found = decompose(matrices, edge(rows, cols))
    denoised = {}
    for name, svd in (("subspace", found), ("exact", singular_values.short_side_svd(matrices))):
        shrunken = shrinkage.frobenius(svd.values, rows=rows, cols=cols, noise_std=1.0)
        weights = jnp.where(shrunken > 0, shrunken / svd.values, 0.0)
        denoised[name] = np.asarray(singular_values.scale_spectrum(matrices, svd.basis, weights)).reshape(12, -1)
    norms = {name: np.linalg.norm(matrix, axis=1) for name, matrix in denoised.items()}
    has_signal = norms["exact"] > 0
    assert has_signal.sum() >= 6
    assert found.is_complete.sum() >= 11
    compared = has_signal & found.is_complete
    products = np.sum(denoised["subspace"] * denoised["exact"], axis=1)[compared]
    assert (products > 0.999 * (norms["subspace"] * norms["exact"])[compared]).all()


@pytest.mark.parametrize("strengths", [[], [1.5], [4, 3, 2, 1.5, 1.1], list(np.linspace(1.2, 5, 20))])
def test_it_hardly_ever_has_to_give_up(strengths):
    rows, cols = SIDE, 192
    matrices = spiked(200, rows, cols, strengths)
    found = decompose(matrices, edge(rows, cols))
    assert found.is_complete.sum() >= 198  # of 768 x 768 and 768 x 3072, less than one in a thousand was given up
    check_honest(matrices, found, edge(rows, cols))


SPECTRA = {
    "one in a thin bulk": [3.0, *bulk()],
    "nothing above the cut": bulk(),
    "more than are returned": [*np.linspace(1.1, 5, 40), *bulk()],
    "more than the space has dimensions": np.linspace(1.1, 5, 140),
    "equal values, fewer than the block": [2.0] * 5 + bulk(),
    "equal values, more than the block": [2.0] * 20 + bulk(),
    "equal values, more than the space": [2.0] * 150,
    "equal values at the top and others above the cut": [5.0] * 12 + [1.5, 1.4, 1.3] + bulk(),
    "low rank": [3.0, 2.0, 0.5],
    "a large one over a small one": [40.0, 1.05, *bulk()],
    "a huge one over a small one": [3000.0, 1.05, *bulk()],
    "crowded at the cut": [*np.linspace(1.0, 1.02, 30), *bulk(number=100, top=0.999)],
    "one just above the cut": [1.0 + 3e-5, *bulk(top=0.999)],
    "one just below the cut": [1.0 - 3e-5, *bulk(top=0.999)],
}
MUST_SUCCEED = {"one in a thin bulk", "nothing above the cut", "equal values, fewer than the block", "low rank"} | {
    "a large one over a small one"
}
MUST_FAIL = {"more than are returned", "more than the space has dimensions", "a huge one over a small one"} | {
    "equal values, more than the space"
}


@pytest.mark.parametrize("name", SPECTRA)
def test_it_never_says_all_when_some_are_missing(name):
    matrices = with_values(SPECTRA[name])
    found = decompose(matrices, 1.0)
    check_honest(matrices, found, 1.0)
    if name in MUST_SUCCEED | MUST_FAIL:
        assert bool(found.is_complete[0]) == (name in MUST_SUCCEED)


@settings(max_examples=25, deadline=None)
@given(
    top=st.lists(st.sampled_from([0.99, 1.01, 1.1, 1.5, 2.0, 7.0, 30.0]), max_size=45),
    below=st.sampled_from([0.0, 0.5, 0.95, 0.999]),
    seed=st.integers(0, 99),
)
def test_it_is_honest_whatever_the_spectrum(top, below, seed):
    matrices = with_values([*top, *np.linspace(0, below, SIDE - len(top))], seed=seed)
    check_honest(matrices, decompose(matrices, 1.0, seed=seed), 1.0)


def test_a_direction_that_the_search_never_sees_is_noticed():
    # G is diagonal and the block is 0 at the signal's coordinate: so is every G^i X.
    values = np.linspace(0, 0.9, SIDE)
    values[7] = 3.0
    matrix, cut = jnp.diag(jnp.asarray(values, jnp.float32))[None], jnp.ones(1)
    block = np.random.default_rng(0).standard_normal((8, SIDE)).astype(np.float32)
    search = jax.jit(lambda block: subspace._decompose(matrix, initial_start(1, SIDE, SIDE), cut, block))
    seen = search(block)
    assert seen.is_complete[0]
    np.testing.assert_allclose(seen.values[0, 0], 3.0, rtol=1e-6)
    block[:, 7] = 0.0
    blind = search(block)
    assert blind.values[0, 0] < 1
    assert not blind.is_complete[0]


def test_kept_pairs_must_have_converged():
    # A kept vector that leans into the bulk by sin^2; p = 0.001 of it may be missing.
    squares = np.linspace(0, 0.8, SIDE)
    squares[0] = 2.0
    gram = jnp.diag(jnp.asarray(squares, jnp.float32))[None]
    certificate = jax.jit(subspace._holds_all)
    for other in (3, SIDE // 2, SIDE - 1):
        for missing, holds in ((0.0, True), (1e-4, True), (1e-2, False), (0.1, False)):
            vector = np.zeros(SIDE)
            vector[[0, other]] = np.sqrt([1 - missing, missing])
            ritz_value = 2.0 * (1 - missing) + squares[other] * missing
            pair = jnp.full((1, 1), ritz_value, jnp.float32), jnp.asarray(vector, jnp.float32)[None, None]
            assert bool(certificate(gram, *pair, jnp.ones(1))[0]) == holds, (other, missing)


def test_a_value_that_is_seen_below_the_cut_but_stands_above_it_is_missed():
    squares = np.zeros(SIDE)
    squares[0] = 1.05
    vector = np.zeros(SIDE)
    vector[:2] = np.sqrt([0.7, 0.3])  # its Ritz value is 0.735
    pair = jnp.full((1, 1), 0.735, jnp.float32), jnp.asarray(vector, jnp.float32)[None, None]
    gram = jnp.diag(jnp.asarray(squares, jnp.float32))[None]
    assert not subspace._holds_all(gram, *pair, jnp.ones(1))[0]
    assert subspace._holds_all(gram, *pair, jnp.full(1, 1.06))[0]


def test_nothing_finite_is_needed_and_neighbours_are_safe():
    matrices = spiked(6, SIDE, SIDE, [3.0])
    clean = decompose(matrices, edge(SIDE, SIDE))
    spoilt = matrices.copy()
    spoilt[0, 3, 4], spoilt[1, 0, 0], spoilt[2, :, :], spoilt[3] = np.nan, np.inf, 1e30, 0.0
    found = decompose(spoilt, edge(SIDE, SIDE))
    np.testing.assert_array_equal(found.is_complete, [False, False, False, True, True, True])
    np.testing.assert_array_equal(found.values[3], 0.0)
    for field in ("basis", "values", "start"):
        np.testing.assert_array_equal(getattr(found, field)[4:], getattr(clean, field)[4:])
    assert np.isfinite(found.start).all()
    again = decompose(matrices, edge(SIDE, SIDE), start=found.start, seed=1)  # the next step is none the worse
    assert again.is_complete.all()
    check_honest(matrices, again, edge(SIDE, SIDE))


def test_rows_are_orthonormal_or_zero_where_the_rank_is_low():
    # A wrong second copy of a direction would double its Ritz value.
    for values in ([], [3.0], [3.0] * 8, [2.0] * 60):
        matrix = np.zeros((1, SIDE, SIDE), np.float32)
        matrix[0, range(len(values)), range(len(values))] = values
        found = decompose(matrix, 1.0)
        gram = found.basis[0].T @ found.basis[0]
        np.testing.assert_allclose(gram, np.diag(np.round(np.diagonal(gram))), atol=1e-5)
        assert (np.diagonal(gram)[found.values[0] > 0] > 0.5).all()
        assert found.values.max() <= max(values, default=0) * (1 + 1e-5)
        check_honest(matrix, found, 1.0)


def test_one_cut_for_each_matrix():
    matrices = np.repeat(with_values([4.0, 2.0, *bulk()]), 4, axis=0)
    found = decompose(matrices, jnp.array([1.0, 3.0, 5.0, 0.0]))
    np.testing.assert_array_equal(found.is_complete, [True, True, True, False])  # more than 32 exceed 0
    np.testing.assert_allclose(found.values[:, :2], np.tile([4.0, 2.0], (4, 1)), rtol=1e-5)


def test_a_start_near_the_answer_saves_passes(monkeypatch):
    matrices = jnp.asarray(spiked(8, SIDE, SIDE, [2.0, 1.8]))
    full = decompose(matrices, edge(SIDE, SIDE))
    assert full.is_complete.all()
    # The next step has the same signal in other noise: with all passes a start is no worse than none.
    following = spiked(8, SIDE, SIDE, [2.0, 1.8]) + spiked(8, SIDE, SIDE, [], seed=1)
    found = decompose(following, np.sqrt(2) * edge(SIDE, SIDE), start=full.start, seed=1)
    assert found.is_complete.all()
    check_honest(following, found, np.sqrt(2) * edge(SIDE, SIDE))
    # With few passes it is better.
    monkeypatch.setattr(subspace, "_num_passes", lambda rows, cols: 3)
    monkeypatch.setattr(subspace, "_WORTHWHILE", 0)
    few = jax.jit(lambda *args, **kwargs: subspace_svd(*args, **kwargs))  # traced anew
    cold, warm = (
        few(matrices, start=start, cut=edge(SIDE, SIDE), key=jax.random.key(3))
        for start in (initial_start(8, SIDE, SIDE), full.start)
    )
    assert cold.is_complete.sum() <= 2
    assert warm.is_complete.sum() >= 6


def test_batches_of_any_size_agree():
    matrices = spiked(5, SIDE, 200, [3.0])
    whole = decompose(matrices, edge(SIDE, 200))
    alone = decompose(matrices[2:3], edge(SIDE, 200))
    np.testing.assert_allclose(alone.values[0], whole.values[2], rtol=1e-5)
    # What a GPU runs: all matrices in each operation.
    fresh = jax.random.normal(jax.random.key(0), (8, SIDE)) * SIDE**-0.5
    start, squared_cut = initial_start(5, SIDE, 200), jnp.full(5, edge(SIDE, 200) ** 2)
    together = jax.jit(subspace._decompose)(jnp.asarray(matrices), start, squared_cut, fresh)
    np.testing.assert_array_equal(together.is_complete, whole.is_complete)
    np.testing.assert_allclose(together.values, whole.values, rtol=1e-4)


@pytest.mark.parametrize(("rows", "cols"), [(SIDE, 180), (20, 30)])
def test_double_precision_is_kept(rows, cols):
    with jax.enable_x64(True):
        matrices = spiked(2, rows, cols, [300.0, 5.0], dtype=np.float64)  # too large a range for float32
        run = jax.jit(functools.partial(subspace_svd, cut=edge(rows, cols), key=jax.random.key(0)))
        found = run(jnp.asarray(matrices), start=initial_start(2, rows, cols, dtype=jnp.float64))
        assert {found.basis.dtype, found.values.dtype, found.start.dtype} == {np.dtype(np.float64)}
        assert found.is_complete.all()
        np.testing.assert_allclose(found.values[:, :2], exact(matrices)[1][:, :2], rtol=1e-10)
        single = run(jnp.asarray(matrices, jnp.float32), start=initial_start(2, rows, cols))
        assert single.values.dtype == np.float32
        assert not single.is_complete.any()


def test_low_precision_is_raised():
    matrices = jnp.asarray(spiked(1, 20, 30, [3.0]), jnp.bfloat16)
    assert decompose(matrices, edge(20, 30)).values.dtype == np.float32


def test_bad_shapes_are_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="three axes"):
        subspace_svd(jnp.ones((3, 4)), start=initial_start(1, 3, 4), cut=1.0, key=key)
    with pytest.raises(ValueError, match=r"start \(1, 4, 4\) does not fit .* it must be \(2, 3, K\)"):
        subspace_svd(jnp.ones((2, 3, 4)), start=initial_start(1, 4, 4), cut=1.0, key=key)
    with pytest.raises(ValueError, match="one for each of the 2 matrices"):
        subspace_svd(jnp.ones((2, 3, 4)), start=initial_start(2, 3, 4), cut=jnp.ones(3), key=key)
