"""Joined matrices and pairs of LoRA factors: the estimators, what they are fed with, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dp_rmt.denoising import matrix_groups
from dp_rmt.denoising.joins import reads_the_stream
from dp_rmt.random_matrix import marchenko_pastur
from experiments import lora_pairs, structure, structure_table
from experiments.lora_pairs import Pair

ROWS, COLS, RANK = 60, 40, 4


def gradients_of(g: np.ndarray, factors: Pair) -> Pair:
    return Pair(g @ factors.b.T, factors.a.T @ g)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def factors(rng: np.random.Generator) -> Pair:
    return Pair(rng.standard_normal((ROWS, RANK)) / ROWS**0.5, 0.3 * rng.standard_normal((RANK, COLS)) / COLS**0.5)


def with_noise(clean: Pair, std: float, rng: np.random.Generator) -> Pair:
    return Pair(*(matrix + std * rng.standard_normal(matrix.shape) for matrix in clean))


def test_the_consistent_pair_is_the_nearest_one(factors: Pair, rng: np.random.Generator) -> None:
    clean, other = (gradients_of(rng.standard_normal((ROWS, COLS)), factors) for _ in range(2))
    for found, expected in zip(lora_pairs.consistent(clean, factors), clean):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    removed = []
    for _ in range(200):
        noisy = with_noise(clean, 0.5, rng)
        found = lora_pairs.consistent(noisy, factors)
        np.testing.assert_allclose(factors.a.T @ found.a, found.b @ factors.b.T, rtol=0, atol=1e-12)
        difference = Pair(noisy.a - found.a, noisy.b - found.b)
        assert abs(np.sum(difference.a * other.a) + np.sum(difference.b * other.b)) < 1e-10  # orthogonal to all pairs
        removed.append(np.sum(difference.a**2) + np.sum(difference.b**2))
    # r^2 of r (m + n) dimensions: 200 draws of 16 squares, whose mean is known to 2.5%.
    assert np.mean(removed) == pytest.approx(RANK**2 * 0.5**2, rel=0.1)


def rank_one(rng: np.random.Generator) -> np.ndarray:
    u, v = rng.standard_normal(ROWS), rng.standard_normal(COLS)
    return np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))


def test_the_joint_fit_is_exact_without_noise_and_near_with_it(factors: Pair, rng: np.random.Generator) -> None:
    clean = gradients_of(5 * rank_one(rng) + 3 * rank_one(rng), factors)
    for found, expected in zip(lora_pairs.joint_fit(clean, factors, 1e-9), clean):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    noisy = with_noise(clean, 1e-2, rng)
    found = lora_pairs.joint_fit(noisy, factors, 1e-2)
    assert np.linalg.matrix_rank(found.a, tol=1e-6) <= 2 >= np.linalg.matrix_rank(found.b, tol=1e-6)

    def distance(pair: Pair) -> float:
        return float(sum(np.sum((x - y) ** 2) for x, y in zip(pair, noisy)))

    assert distance(found) < distance(clean)  # which is of rank two, too
    hidden = with_noise(clean, 10.0, rng)
    hidden = Pair(*(0.5 * matrix for matrix in hidden))  # below the edge of noise of 10
    assert lora_pairs.joint_fit(hidden, factors, 10.0) is hidden


def test_one_factor_shows_the_other_where_to_look(factors: Pair, rng: np.random.Generator) -> None:
    """A's gradient is at half the strength of B's and hidden by the noise, as where B is small; B's is not."""
    found = []
    for _ in range(20):
        g = rank_one(rng)
        clean = gradients_of(g, factors)
        ab = factors._replace(b=factors.b * 0.5 * np.linalg.norm(clean.b) / np.linalg.norm(clean.a))
        clean = gradients_of(g, ab)
        std = np.linalg.norm(clean.b) / 8
        noisy = with_noise(clean, std, rng)
        assert np.linalg.norm(clean.a, 2) < 0.5 * np.asarray(
            marchenko_pastur.bulk_edge(rows=ROWS, cols=RANK, noise_std=std)
        )
        found.append([cosine(pair.a, clean.a) for pair in (noisy, lora_pairs.joint_fit(noisy, ab, std))])
    # cos = l / sqrt(l^2 + d s^2) with l = 4 s and d = 60 * 4 entries of noise, or 60 in a known direction B v. That is
    # known as well as v is, B being random: cos_v^2 = (l^4 - t^4) / (l^2 (l^2 + s^2 n)), l = 8 s, t^4 = 4 * 40 s^4.
    cos_v = ((8**4 - 160) / (8**2 * (8**2 + 40))) ** 0.5
    noisy_cosine, fitted = np.mean(found, axis=0)
    assert noisy_cosine == pytest.approx(4 / np.hypot(4, 240**0.5), abs=0.03)
    assert fitted == pytest.approx(cos_v * 4 / np.hypot(4, 60**0.5), abs=0.04)


def test_the_denoised_direction_in_w_is_that_of_the_gradients(factors: Pair, rng: np.random.Generator) -> None:
    clean = gradients_of(5 * rank_one(rng), factors)
    for found, expected in zip(lora_pairs.tangent_denoised(clean, factors, 1e-9, rng), clean):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    std = 0.02 * np.linalg.norm(clean.a)
    noisy = with_noise(clean, std, rng)
    found = lora_pairs.tangent_denoised(noisy, factors, std, rng)
    assert cosine(found.a, clean.a) > cosine(noisy.a, clean.a) + 0.01


def lora_tree(rng: np.random.Generator, layers: int = 3) -> dict[str, np.ndarray]:
    sides = {f"attention/{name}": (64, 64) for name in ("query", "key", "value", "output")}
    sides |= {"intermediate": (64, 96), "output": (96, 64)}
    return {
        f"encoder/layers/{name}_lora/lora_{factor}/kernel": rng.standard_normal((layers, *shape)).astype(np.float32)
        for name, (rows, cols) in sides.items()
        for factor, shape in (("a", (rows, RANK)), ("b", (RANK, cols)))
    }


@pytest.mark.parametrize(
    ("rule", "join", "expected"),
    [
        (structure.residual_side_of_all_layers, None, {"64x12": 6}),
        (structure.residual_side_of_all_layers, reads_the_stream, {"64x48": 1, "64x12": 2}),
        (structure.residual_side, structure.shared_outputs, {"64x4": 12, "64x8": 3}),
    ],
)
def test_what_faces_the_residual_stream_stands_side_by_side(rule, join, expected, rng: np.random.Generator) -> None:
    facing = {path: leaf for path, leaf in lora_tree(rng).items() if structure.faces_the_stream(path)}
    assert len(facing) == 6  # A of query, key, value and intermediate, B of the two outputs
    groups = matrix_groups.matrix_groups(facing, rule, join)
    assert {shape.split()[0]: sum(m.number for m in group) for shape, group in groups.items()} == expected
    writes = rule("layers/output_lora/lora_b/kernel", jnp.zeros((3, RANK, 64)))
    assert writes.rows == (-1,)


def signals_in_one_direction(num_steps: int) -> Iterator[tuple[dict, dict, dict]]:
    """Six layers whose matrices are below the edge one by one, with one left singular vector; noise of 1."""
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal(64), rng.standard_normal((6, 64))
    left, right = left / np.linalg.norm(left), right / np.linalg.norm(right, axis=1, keepdims=True)
    threshold = float(np.asarray(marchenko_pastur.detection_threshold(rows=64, cols=64, noise_std=1.0)))
    signal = (0.9 * threshold * left[:, None] * right[:, None, :]).astype(np.float32)
    clean = {f"encoder/layers/attention/{name}/kernel": signal for name in ("query", "key", "value")}
    for _ in range(num_steps):
        yield {}, clean, {p: g + rng.standard_normal(g.shape).astype(np.float32) for p, g in clean.items()}


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    return list(structure.measure(signals_in_one_direction(3), 1.0))


def test_layers_that_share_a_direction_find_it_together(measured: list[dict[str, Any]]) -> None:
    def mean(row: dict[str, Any], kind: str, candidate: str) -> float:
        return structure_table.mean_cosine([row[kind][candidate]], "kernel")

    first, last = measured[0], measured[-1]
    # cos = l / sqrt(l^2 + m n s^2) with l = 0.9 t.
    assert mean(first, "gradient", "noisy") == pytest.approx(0.9 * 8 / np.hypot(0.9 * 8, 64), rel=0.15)
    assert first["gradient"]["noisy"] == first["first_moment"]["noisy"]
    for kind, row in (("gradient", first), ("first_moment", last)):
        assert mean(row, kind, "all layers") > mean(row, kind, "separate") + 0.1
        assert mean(row, kind, "shared inputs of all layers") > mean(row, kind, "all layers")
    assert last["gradient"]["shared outputs"] == last["gradient"]["separate"]  # there are none
    assert mean(last, "first_moment", "noisy") > 1.3 * mean(last, "gradient", "noisy")


def test_the_change_of_w_is_that_of_both_factors(rng: np.random.Generator) -> None:
    factors = lora_tree(rng)
    clean, noisy = lora_tree(rng), lora_tree(rng)
    (row,) = structure.measure(iter([(factors, clean, noisy)]), 1.0)
    module = "encoder/layers/attention/key_lora"
    a, b, ga, gb, ya, yb = (
        np.float64(tree[f"{module}/lora_{name}/kernel"][1]) for tree in (factors, clean, noisy) for name in "ab"
    )
    seen = row["gradient"]["noisy"]
    assert seen[f"nonprivate/{module}/product"][1] == pytest.approx(cosine(ya @ b + a @ yb, ga @ b + a @ gb), abs=1e-4)
    assert seen[f"nonprivate/{module}/lora_b/kernel"][1] == pytest.approx(cosine(yb, gb), abs=1e-4)
    assert {"consistent cores", "joint fit", "direction in W"} <= row["gradient"].keys()


def test_a_run_with_lora_is_recorded_and_printed(
    make_config: Callable[..., ConfigDict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its clean gradients are pairs: the two cores agree."""
    stream = structure.build(make_config(), rank=2, arm="small", seed=0, num_steps=2)
    pairs = 0
    for step, (factors, clean, _) in enumerate(structure.steps(stream)):
        assert len(factors) == 12
        assert {path for path, leaf in factors.items() if not leaf.any()} == (
            {path for path in factors if "lora_b" in path} if step == 0 else set()
        )
        for _, layers in structure._pairs(clean, factors):
            for pair, ab in layers:
                scale = np.linalg.norm(ab.a) * np.linalg.norm(pair.b) * np.linalg.norm(ab.b)
                np.testing.assert_allclose(ab.a.T @ pair.a, pair.b @ ab.b.T, rtol=0, atol=1e-4 * scale)
                pairs += 1
    assert pairs == 2 * 2 * 6

    row = {"step": 4} | {
        kind: {"noisy": {f"nonprivate/layers/{name}_lora/product": [0.25, cosine] for name in ("query", "output")}}
        for kind, cosine in (("gradient", 0.35), ("first_moment", 0.75))
    }
    path = tmp_path / f"{stream.name}.json"
    path.write_text(json.dumps({"steps": [row, row]}))
    structure.record(stream, path)  # it is there already
    columns = {"all": "product", "query": "query"}
    rows = list(structure_table.rows(json.loads(path.read_text()), columns, first_step=2))
    assert rows == [["gradient", "noisy", "0.300", "0.300"], ["first moment", "noisy", "0.500", "0.500"]]
