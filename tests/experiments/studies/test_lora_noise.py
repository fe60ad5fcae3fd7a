"""The noise of LoRA: its variance, its law, the attack on it; and the measurement from gradients to the report."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from experiments.studies.lora_noise import laws
from experiments.studies.lora_noise import report as lora_noise_report
from experiments.studies.lora_noise import study as lora_noise


@pytest.fixture(scope="module")
def gradients():
    """Twelve examples of a few tokens each, of a layer with 10 outputs and 14 inputs."""
    rng = np.random.default_rng(0)
    return np.einsum("btm,btn->bmn", rng.standard_normal((12, 5, 10)), rng.standard_normal((12, 5, 14)))


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_variance_is_the_formula_s(rank):
    """40,000 draws of A, entry by entry; the variance of a square is at most 14 sigma^4 (rank 1): 5 errors are 10%."""
    rng = np.random.default_rng(1)
    rows = np.array([[3.0, 0.0, -1.0], [0.1, 0.2, 0.3]])
    noise = laws.row_noise(rows.astype(np.float32), laws.projections(3, rank, 40_000, rng))
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=5 * np.sqrt(laws.noise_variance(rows, rank).max() / 40_000))
    np.testing.assert_allclose(noise.var(axis=0), laws.noise_variance(rows, rank), rtol=0.1)


@pytest.mark.parametrize(("rank", "rho"), [(1, 0.0), (4, 0.6), (16, 1.0)])
def test_kolmogorov_distance_is_that_of_simulated_noise(rank, rho):
    """20,000 draws of A know the distance to 0.0087 (one in 10,000: 2.2 / sqrt(n) = 0.016)."""
    rng = np.random.default_rng(2)
    row = np.array([[rho, np.sqrt(1 - rho**2), 0, 0]])
    noise = laws.row_noise(row.astype(np.float32), laws.projections(4, rank, 20_000, rng))[:, 0, 0]
    measured = stats.kstest(noise / np.sqrt((1 + rho**2) / rank), "norm").statistic
    assert laws.kolmogorov_distance(rho, rank) == pytest.approx(measured, abs=0.016)


def test_distance_falls_like_one_over_rank_and_like_its_root_for_an_entry_that_stands_out():
    typical = [laws.kolmogorov_distance(0.0, rank) * rank for rank in (16, 64, 256)]
    assert typical == pytest.approx([typical[-1]] * 3, rel=0.05)
    outstanding = [laws.kolmogorov_distance(0.9, rank) * np.sqrt(rank) for rank in (16, 64, 256)]
    assert outstanding == pytest.approx([outstanding[-1]] * 3, rel=0.05)


def test_lengths_keep_their_scale_as_said():
    rng = np.random.default_rng(3)
    for rank in (1, 8):
        lengths = np.linalg.norm(laws.projections(6, rank, 20_000, rng).sum(axis=1), axis=1) / np.sqrt(6)
        assert lengths.std() == pytest.approx(laws.scale_std(rank), rel=0.03)
    assert laws.scale_std(200) == pytest.approx(1 / np.sqrt(400), rel=0.01)


@pytest.mark.parametrize("rank", [1, 14, 40])
def test_the_attack_without_noise_tells_all_but_from_one_row(gradients, rank):
    rng = np.random.default_rng(4)
    assert lora_noise.attack(gradients, rank, rows=10, trials=100, rng=rng)["auc"][0] > 0.99
    assert lora_noise.attack(gradients, rank, rows=2, trials=100, rng=rng)["auc"][0] > 0.99
    assert lora_noise.attack(gradients, rank, rows=1, trials=100, rng=rng)["auc"][0] == pytest.approx(0.5, abs=0.01)


def test_privacy_losses_of_projected_releases_are_those_of_their_densities(gradients):
    """Against releases that are really made, and their densities; and as likelihood ratios change the measure."""
    rng, rank, std = np.random.default_rng(5), 3, 2.0
    pair = laws.Neighbours(gradients[1:].sum(axis=0), gradients.sum(axis=0))
    losses = laws.projected_losses(pair, rank=rank, noise_std=std, draws=20_000, rng=rng)
    made = {}
    for name, g in zip(("without", "with"), pair):
        a = rng.standard_normal((4000, 14, rank)) / np.sqrt(rank)
        made[name] = g @ a + std * rng.standard_normal((4000, 10, rank))
    density = [stats.multivariate_normal(np.zeros(10), g @ g.T / rank + std**2 * np.eye(10)) for g in pair]
    for name, found in (("with", losses.of_with), ("without", losses.of_without)):
        columns = np.swapaxes(made[name], 1, 2)
        direct = np.sum(density[1].logpdf(columns) - density[0].logpdf(columns), axis=1)
        assert stats.ks_2samp(direct, found).pvalue > 1e-4
    below = losses.of_without < 0
    assert np.mean(np.exp(losses.of_without) * below) == pytest.approx(np.mean(losses.of_with < 0), abs=0.02)
    assert losses.of_with.mean() > 0 > losses.of_without.mean()


def test_columns_beyond_the_gradients_tell_nothing(gradients):
    """A matrix with many more rows than columns: the same losses from its column space alone."""
    rng = np.random.default_rng(6)
    tall = rng.standard_normal((60, 10)) @ gradients[:3, :, :4]
    pair = laws.Neighbours(tall[1:].sum(axis=0), tall.sum(axis=0))
    turned = laws.Neighbours(*(np.pad(g, ((0, 0), (0, 60))) for g in pair))  # so wide that nothing is left out
    settings = {"rank": 2, "noise_std": 5.0, "draws": 4000}
    found = [laws.projected_losses(p, rng=np.random.default_rng(7), **settings) for p in (pair, turned)]
    np.testing.assert_allclose(np.sort(found[0].of_with), np.sort(found[1].of_with), rtol=1e-6, atol=1e-6)


def test_hockey_stick_epsilon_is_the_gaussian_mechanism_s():
    """A million draws; at delta = 0.01 ten thousand lie beyond."""
    rng, mu = np.random.default_rng(8), 1.0
    z = rng.standard_normal((2, 1_000_000))
    releases = laws.Releases(mu * z[0] + mu**2 / 2, mu * z[1] - mu**2 / 2)
    epsilon = laws.hockey_stick_epsilon(releases, 0.01)
    exact = stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    assert exact == pytest.approx(0.01, rel=0.05)
    assert laws.hockey_stick_epsilon(laws.Releases(np.zeros(5), np.zeros(5)), 0.01) == 0


def test_from_gradients_to_the_report(gradients, tmp_path):
    matrices = lora_noise.measure(
        {"layer/query/kernel[0]": gradients}, ranks=(1, 4, 64), draws=100, trials=10, loss_draws=1000, seed=0
    )
    record = json.loads(json.dumps({"model": "tiny", "config": "tiny", "matrices": matrices}))
    (matrix,) = record["matrices"]
    assert [row["rank"] for row in matrix["noise"]] == [1, 4]  # 64 is more than the matrix has columns
    for row in matrix["noise"]:
        assert abs(row["variance_over_formula"] - 1) < 5 * row["variance_over_formula_error"]
    shown = lora_noise_report.write(record, tmp_path / "report.md")
    assert "LoRA alone carries no guarantee" in shown
    assert (tmp_path / "report.md").read_text() == shown
    lora_noise_report.figure(record, tmp_path / "images" / "figure.png")
    assert (tmp_path / "images" / "figure.png").stat().st_size > 10_000


def test_the_multiplier_grows_with_the_batch_and_falls_with_the_rank(gradients):
    """Twice the same examples: the same mean gradient, half of the sensitivity."""
    rng = np.random.default_rng(9)
    once, twice = (
        lora_noise.measure_noise(g, 4, draws=50, rng=rng)["noise_multiplier_it_would_be"]
        for g in (gradients, np.concatenate([gradients, gradients]))
    )
    assert twice == pytest.approx(2 * once, rel=1e-4)
    more = lora_noise.measure_noise(gradients, 16, draws=50, rng=rng)["noise_multiplier_it_would_be"]
    assert more == pytest.approx(once / 2, rel=1e-4)
