"""Candidates on the same gradients: what their cosines are, what the claims are, and the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.denoising.first_moment import scale_by_denoised_adam
from dp_rmt.random_matrix import marchenko_pastur
from experiments import gradient_cosines, gradient_cosines_table
from experiments.studies.spectra.gradient_stream import Gradients

ROWS, COLS, STD = 48, 96, 0.1
THRESHOLD = float(np.asarray(marchenko_pastur.detection_threshold(rows=ROWS, cols=COLS, noise_std=STD)))


def gradients(strength: float, num_steps: int, seed: int = 0) -> Iterator[Gradients]:
    """Four constant matrices of rank one, of a strength in units of the detection threshold, in fresh noise."""
    rng = np.random.default_rng(seed)
    u, v = (rng.standard_normal((4, side)) for side in (ROWS, COLS))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    clean = strength * THRESHOLD * u[:, :, None] * v[:, None, :]
    for step in range(1, num_steps + 1):
        noisy = clean + STD * rng.standard_normal(clean.shape)
        trees = [{"kernel": jnp.asarray(x, jnp.float32), "bias": jnp.ones(3)} for x in (clean, noisy)]
        yield Gradients(step, trees[0], trees[1], trees[1], {"nonprivate/loss": 1.0}, trees[0])


def cosine(a: Any, b: Any) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sum(a * b, (1, 2)) / np.sqrt(np.sum(a * a, (1, 2)) * np.sum(b * b, (1, 2)))


def test_cosines_of_candidates_whose_answer_is_known() -> None:
    seen = list(gradients(1.0, 3))
    clean, noisy = seen[0].clean, [one.noisy for one in seen]
    oracle = optax.stateless(lambda updates, params: clean)
    given = {"noisy": optax.identity(), "oracle": oracle, "opposite": optax.scale(-2.0)}
    rows = list(gradient_cosines.compare(iter(seen), given))
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, updates in zip(rows, noisy):
        expected = cosine(updates["kernel"], clean["kernel"])
        found = {name: row["candidates"][name] for name in given}
        assert found["oracle"]["nonprivate/cosine"] == pytest.approx(1.0, abs=1e-5)
        assert found["noisy"]["nonprivate/cosine"] == pytest.approx(expected.mean(), rel=1e-4)
        assert found["noisy"]["nonprivate/worst_gain"] == 0
        assert found["opposite"]["nonprivate/cosine"] == pytest.approx(-expected.mean(), rel=1e-4)
        assert found["opposite"]["nonprivate/worst_gain"] == pytest.approx(-2 * expected.max(), rel=1e-4)


def test_the_clean_first_moment_is_adam_s() -> None:
    """Fed with clean gradients that change, the average is the clean first moment, and no more the clean gradient."""
    rng = np.random.default_rng(1)
    trees = [{"kernel": jnp.asarray(rng.standard_normal((1, 16, 16)), jnp.float32)} for _ in range(3)]
    metrics = {"nonprivate/loss": 1.0}
    seen = [Gradients(step, tree, tree, tree, metrics, tree) for step, tree in enumerate(trees, start=1)]
    given = {"noisy": optax.identity(), "average": optax.ema(gradient_cosines.DECAY)}
    *_, last = gradient_cosines.compare(iter(seen), given)
    moment = sum(0.9**age * 0.1 * tree["kernel"] for age, tree in enumerate(reversed(trees)))
    expected = float(cosine(moment, trees[-1]["kernel"])[0])
    assert last["candidates"]["average"]["nonprivate/cosine_to_first_moment"] == pytest.approx(1.0, abs=1e-5)
    assert last["candidates"]["average"]["nonprivate/cosine"] == pytest.approx(expected, rel=1e-3)
    assert last["candidates"]["noisy"]["nonprivate/cosine_to_first_moment"] == pytest.approx(expected, rel=1e-3)
    assert expected < 0.8


@pytest.fixture(scope="module")
def below_the_edge() -> list[dict[str, Any]]:
    """All candidates where one gradient shows nothing, at 0.6 of the threshold, and the average of a few does."""
    given = gradient_cosines.candidates(STD)
    return list(gradient_cosines.compare(gradients(0.6, 15), given))


def test_averages_show_what_single_gradients_hide(below_the_edge: list[dict[str, Any]]) -> None:
    last = {name: seen["nonprivate/cosine"] for name, seen in below_the_edge[-1]["candidates"].items()}
    # cos = l / sqrt(l^2 + m n s^2), with the noise of the average lower by a factor of sqrt(19).
    signal, noise = 0.6 * THRESHOLD, STD * np.sqrt(ROWS * COLS)
    assert last["noisy"] == pytest.approx(signal / np.hypot(signal, noise), rel=0.3)
    assert last["average"] == pytest.approx(signal / np.hypot(signal, noise / np.sqrt(19)), rel=0.25)
    assert last["average_denoised"] > 0.7 > 2 * last["average"]
    assert last["exact"] < 0.3
    assert last["low_pass"] > 1.5 * last["noisy"]


def test_backends_agree_and_every_candidate_points_uphill(below_the_edge: list[dict[str, Any]]) -> None:
    for row in below_the_edge:
        seen = {name: numbers["nonprivate/cosine"] for name, numbers in row["candidates"].items()}
        assert seen["gram"] == pytest.approx(seen["exact"], abs=1e-4)
        assert seen["subspace"] == pytest.approx(seen["exact"], abs=1e-3)
        assert all(0 < value <= 1 for value in seen.values())


def test_the_noise_of_the_average_is_that_of_the_first_moment() -> None:
    schedule = gradient_cosines.first_moment_noise_std(STD, 0.9)
    adam = scale_by_denoised_adam(STD, b1=0.9)
    average = optax.ema(0.9, debias=True)
    noise = {"kernel": jnp.zeros((100, 100))}
    adam_state, average_state = adam.init(noise), average.init(noise)
    for step in range(6):
        noise = {"kernel": STD * jax.random.normal(jax.random.key(step), (100, 100))}
        _, adam_state = adam.update(noise, adam_state)
        averaged, average_state = average.update(noise, average_state)
        assert schedule(step) == pytest.approx(float(adam_state.mu_variance**0.5) / (1 - 0.9 ** (step + 1)), rel=1e-5)
        # 10,000 numbers: their standard deviation is known to 0.7%.
        assert float(averaged["kernel"].std()) == pytest.approx(float(schedule(step)), rel=0.03)


def test_a_row_of_the_table(below_the_edge: list[dict[str, Any]]) -> None:
    record = json.loads(json.dumps({"description": {"batch_size": 64}, "steps": below_the_edge}))
    batch, name, mean, first, last, worst, moment, seconds, share = gradient_cosines_table.row(record, "average")
    cosines = [row["candidates"]["average"]["nonprivate/cosine"] for row in below_the_edge]
    assert (batch, name) == ("64", "average")
    expected = [np.mean(cosines), cosines[0], cosines[-1]]
    assert [float(mean), float(first), float(last)] == pytest.approx(expected, abs=1e-3)
    assert worst.startswith(("+", "-"))
    assert float(moment) == pytest.approx(float(mean), abs=0.01)  # the signal is constant
    assert float(seconds) >= 0
    assert share.endswith("%")
