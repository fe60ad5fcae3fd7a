"""Which leaves are matrices, and the way there and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt import denoise_matrices
from dp_rmt.denoising.matrix_view import (
    SMALLEST_DENOISED_SIDE,
    MatrixAxes,
    from_matrices,
    kernels_are_matrices,
    leaves_by_path,
    matrix_leaves,
    to_matrices,
)

pytestmark = pytest.mark.thorough


@st.composite
def leaf_and_axes(draw):
    """A shape of two to five axes, some of them rows, some columns, by positive or negative number."""
    ndim = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    order = draw(st.permutations(range(ndim)))
    num_rows = draw(st.integers(1, ndim - 1))
    num_cols = draw(st.integers(1, ndim - num_rows))
    named = [axis - ndim * draw(st.booleans()) for axis in order]
    return shape, MatrixAxes(tuple(named[:num_rows]), tuple(named[num_rows : num_rows + num_cols]))


@settings(max_examples=50, deadline=None)
@given(leaf_and_axes())
def test_there_and_back_is_the_identity(case):
    shape, axes = case
    leaf = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    matrices = to_matrices(leaf, axes)
    assert matrices.ndim == 3
    np.testing.assert_array_equal(from_matrices(matrices, axes, shape), leaf)


def test_entries_are_where_the_axes_say():
    """An attention kernel (layers, in, heads, dim): one matrix per layer, its columns the pairs (head, dim)."""
    leaf = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    matrices = to_matrices(leaf, MatrixAxes(rows=(1,), cols=(2, 3)))
    assert matrices.shape == (2, 3, 20)
    assert matrices[1, 2, 3 * 5 + 4] == leaf[1, 2, 3, 4]
    output_kernel = to_matrices(leaf[0], MatrixAxes(rows=(0, 1), cols=(2,)))
    assert output_kernel.shape == (1, 12, 5)
    assert output_kernel[0, 2 * 4 + 3, 1] == leaf[0, 2, 3, 1]
    assert to_matrices(leaf, MatrixAxes(rows=(-1,), cols=(0,))).shape == (12, 5, 2)


@pytest.mark.parametrize(
    "axes",
    [
        MatrixAxes(rows=(), cols=(1,)),
        MatrixAxes(rows=(0,), cols=()),
        MatrixAxes(rows=(0,), cols=(0,)),
        MatrixAxes(rows=(1,), cols=(-1,)),  # the same axis by two names
        MatrixAxes(rows=(0, 0), cols=(1,)),
    ],
)
def test_refuses_axes_that_are_no_matrix(axes):
    with pytest.raises(ValueError, match=r"each axis once; mend the matrix rule"):
        to_matrices(np.zeros((3, 4)), axes)


@pytest.mark.parametrize(
    ("path", "shape", "is_matrix"),
    [
        ("layers/query/kernel", (6, 64, 64), True),
        ("kernel", (4, 4), True),
        ("layers/query_lora/lora_a/kernel", (6, 64, 4), True),
        ("classifier/kernel", (64, 2), False),  # too thin
        ("kernel", (3, 100), False),
        ("kernel", (64,), False),
        ("query/bias", (6, 64), False),
        ("word_embeddings/embedding", (512, 64), False),
        ("my_kernel", (64, 64), False),
        ("kernel/scale", (64, 64), False),
    ],
)
def test_default_rule(path, shape, is_matrix):
    axes = kernels_are_matrices(path, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert axes == (MatrixAxes() if is_matrix else None)


@pytest.mark.parametrize(("rank", "at_worst", "at_best"), [(1, -0.01, 0.15), (2, -0.015, 0.07)])
def test_the_thinnest_matrices_gain(rank, at_worst, at_best):
    """By simulation, signals of 0.3 to 2.5 times the threshold."""
    gains = thin_gains(SMALLEST_DENOISED_SIDE, rank)
    assert gains.min() > at_worst
    assert gains.max() > at_best


def test_thinner_ones_would_lose():
    """A signal in both of two columns, at 1.2 and 1.5 times the threshold."""
    assert thin_gains(2, 2).min() < -0.015


def thin_gains(cols, rank, rows=384, number=600):
    """Mean cosine to the signal after denoising less that before, by strength of the signal."""
    rng = np.random.default_rng(0)
    strengths = np.array([0.3, 0.6, 0.9, 1.2, 1.5, 2.0, 2.5]) * (rows * cols) ** 0.25
    gains = []
    for strength in strengths:
        clean = np.zeros((rows, cols))
        np.fill_diagonal(clean[:rank, :rank], strength * 0.6 ** np.arange(rank))
        noisy = clean + rng.standard_normal((number, rows, cols))
        denoise = denoise_matrices(1.0, matrix_rule=lambda path, leaf: MatrixAxes(), svd="gram")
        leaf = jnp.asarray(noisy, jnp.float32)
        denoised, _ = denoise.update(leaf, denoise.init(leaf))
        cosines = [
            np.sum(x * clean, (1, 2)) / np.linalg.norm(x, axis=(1, 2)) / np.linalg.norm(clean)
            for x in (noisy, np.asarray(denoised))
        ]
        gains.append(np.mean(cosines[1] - cosines[0]))
    return np.array(gains)


def test_leaves_are_found_by_path_in_tree_order():
    tree = {"b": [jnp.zeros((9, 9)), {"kernel": jnp.zeros((9, 8))}], "a": {"kernel": jnp.zeros((2, 9, 9))}}
    assert [path for path, _ in leaves_by_path(tree)] == ["a/kernel", "b/0", "b/1/kernel"]
    assert list(matrix_leaves(tree)) == ["a/kernel", "b/1/kernel"]
    assert matrix_leaves(tree, lambda path, leaf: MatrixAxes((0,), (1,)) if leaf.ndim == 2 else None) == {
        path: MatrixAxes((0,), (1,)) for path in ("b/0", "b/1/kernel")
    }
