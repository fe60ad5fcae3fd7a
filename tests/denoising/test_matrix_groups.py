"""Groups of equal-shaped matrices, and leaves joined side by side."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt import denoise_matrices
from dp_rmt.denoising import matrix_groups
from dp_rmt.denoising.joins import shared_inputs
from dp_rmt.denoising.matrix_view import MatrixAxes
from dp_rmt.trees import leaves_by_path


def tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def kernel(*shape):
        return {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)}

    attention = {"query": kernel(3, 16, 12), "key": kernel(3, 16, 8), "value": kernel(3, 16, 8)}
    attention["output"] = kernel(3, 12, 16)
    mlp = {"gate": kernel(3, 16, 24), "up": kernel(3, 16, 24), "down": kernel(3, 24, 16)}
    return {"layers": {"attention": attention, **mlp}, "head": kernel(16, 24), "bias": jnp.zeros(5)}


@pytest.mark.parametrize("join", [None, shared_inputs])
def test_stacking_loses_nothing(join) -> None:
    params = tree()
    leaves = {"/".join(path.split("/")): leaf for path, leaf in leaves_by_path(params)}
    groups = matrix_groups.matrix_groups(params, join=join)
    restored = {}
    for group in groups.values():
        stacked = matrix_groups.stack(group, leaves)
        assert stacked.shape == (sum(m.number for m in group), group[0].rows, group[0].cols)
        restored |= matrix_groups.unstack(group, stacked)
    assert restored.keys() == {path for path in leaves if path != "bias"}
    for path, leaf in restored.items():
        np.testing.assert_array_equal(leaf, leaves[path])


def test_equal_shapes_are_one_group() -> None:
    groups = matrix_groups.matrix_groups(tree())
    members = {shape: [matrix.name for matrix in group] for shape, group in groups.items()}
    assert members["16x24 float32"] == ["head/kernel", "layers/gate/kernel", "layers/up/kernel"]
    assert members["16x8 float32"] == ["layers/attention/key/kernel", "layers/attention/value/kernel"]
    assert sum(m.number for m in groups["16x24 float32"]) == 7


def test_shared_inputs_stand_side_by_side() -> None:
    params = tree()
    groups = matrix_groups.matrix_groups(params, join=shared_inputs)
    (joined,) = groups["16x28 float32"]
    assert joined.name == "layers/attention/qkv/kernel"
    leaves = dict(leaves_by_path(params))
    attention = params["layers"]["attention"]
    expected = np.concatenate([attention[name]["kernel"] for name in ("key", "query", "value")], axis=2)
    np.testing.assert_array_equal(matrix_groups.stack([joined], leaves), expected)
    assert [m.name for m in groups["16x48 float32"]] == ["layers/gate_up/kernel"]


@pytest.mark.slow
def test_blocks_of_one_input_help_each_other() -> None:
    """Three blocks with one signal direction in the rows, each below its own edge, stand above it together."""
    rng = np.random.default_rng(0)
    rows, cols, std = 32, 32, 0.1
    left = rng.standard_normal(rows) / np.sqrt(rows)
    clean, noisy = {}, {}
    for name in ("query", "key", "value"):
        right = rng.standard_normal(cols)
        clean[name] = 0.9 * std * np.sqrt(rows) * np.outer(left, right / np.linalg.norm(right))
        noisy[name] = {"kernel": jnp.asarray(clean[name] + std * rng.standard_normal((rows, cols)), jnp.float32)}

    def cosine(join) -> float:
        denoise = denoise_matrices(std, join=join)
        out, _ = denoise.update(noisy, denoise.init(noisy))
        a, b = (np.concatenate([t[n]["kernel"] if k else t[n] for n in clean]) for k, t in enumerate((clean, out)))
        return float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))

    assert cosine(shared_inputs) > cosine(None) + 0.1


def test_what_cannot_be_joined_is_named() -> None:
    params = {"query": {"kernel": jnp.zeros((16, 8))}, "key": {"kernel": jnp.zeros((8, 8))}}
    expected = r"joined as 'qkv/kernel': key/kernel is 1 of 8 x 8 float32, query/kernel is 1 of 16"
    with pytest.raises(ValueError, match=expected):
        matrix_groups.matrix_groups(params, join=shared_inputs)


def test_axes_of_the_matrix_rule_are_kept() -> None:
    params = {"query": {"kernel": jnp.arange(2.0 * 16 * 4 * 8).reshape(2, 16, 4, 8)}}
    groups = matrix_groups.matrix_groups(params, lambda path, leaf: MatrixAxes(rows=(1,), cols=(2, 3)))
    ((shape, group),) = groups.items()
    leaves = dict(leaves_by_path(params))
    assert shape == "16x32 float32"
    np.testing.assert_array_equal(
        matrix_groups.unstack(group, matrix_groups.stack(group, leaves))["query/kernel"], params["query"]["kernel"]
    )
