"""Whatever reads the residual stream, in all layers, denoised as one matrix."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt import denoise_matrices
from dp_rmt.denoising import matrix_groups
from dp_rmt.denoising.joins import layers_side_by_side, reads_the_stream
from dp_rmt.random_matrix import marchenko_pastur
from dp_rmt.trees import leaves_by_path

STREAM = {"matrix_rule": layers_side_by_side, "join": reads_the_stream}
READERS = ("attention/query", "attention/key", "attention/value", "gate", "up")
WRITERS = ("attention/output", "down")


def nested(leaves: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(leaf, jnp.float32)
    return tree


def stacked(layers: int = 4, width: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = [f"decoder/layers/{name}/kernel" for name in (*READERS, *WRITERS)]
    return {name: rng.standard_normal((layers, width, width)) for name in names}


def test_the_readers_are_one_matrix_and_the_writers_as_many_as_layers() -> None:
    groups = matrix_groups.matrix_groups(nested(stacked()), layers_side_by_side, reads_the_stream)
    found = {shape.split()[0]: [(m.name, m.number) for m in group] for shape, group in groups.items()}
    assert found == {
        "32x640": [("decoder/residual_stream/kernel", 1)],
        "32x32": [("decoder/layers/attention/output/kernel", 4), ("decoder/layers/down/kernel", 4)],
    }


@pytest.mark.thorough
def test_scanned_and_unrolled_layers_give_the_same() -> None:
    of_stack = stacked()
    of_layers = {path.replace("layers/", f"layers_{i}/"): leaf[i] for path, leaf in of_stack.items() for i in range(4)}

    def denoised(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        denoise = denoise_matrices(0.9, **STREAM)
        tree = nested(leaves)
        out = denoise.update(tree, denoise.init(tree))[0]
        return {path: np.asarray(leaf) for path, leaf in leaves_by_path(out)}

    together, apart = denoised(of_stack), denoised(of_layers)
    assert not np.allclose(together["decoder/layers/gate/kernel"], of_stack["decoder/layers/gate/kernel"], rtol=0.1)
    for path, leaf in apart.items():
        layer = int(path.split("layers_")[1].split("/")[0])
        expected = together[path.replace(f"layers_{layer}/", "layers/")][layer]
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=2e-5 * np.linalg.norm(expected))


@pytest.mark.thorough
@pytest.mark.parametrize("svd", ["gram", pytest.param("subspace", marks=pytest.mark.slow)])
def test_a_direction_that_all_layers_share_shows_though_each_is_below_the_edge(svd: str) -> None:
    rng, width, std = np.random.default_rng(1), 32, 0.1
    limit = float(np.asarray(marchenko_pastur.detection_threshold(rows=width, cols=width, noise_std=std)))
    left = rng.standard_normal(width)
    clean, noisy = {}, {}
    for path in stacked(width=width):
        right = rng.standard_normal((4, width))
        signal = left[:, None] / np.linalg.norm(left) * (right / np.linalg.norm(right, axis=1, keepdims=True))[:, None]
        clean[path] = 0.9 * limit * signal * (1 if "down" not in path and "output" not in path else 0)
        noisy[path] = clean[path] + std * rng.standard_normal(clean[path].shape)

    def cosine(**options) -> float:
        denoise = denoise_matrices(std, svd=svd, **options)
        tree = nested(noisy)
        out = dict(leaves_by_path(denoise.update(tree, denoise.init(tree))[0]))
        a, b = (np.concatenate([np.ravel(tree[path]) for path in clean if clean[path].any()]) for tree in (clean, out))
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert cosine(**STREAM) > cosine() + 0.2
