"""Gradients of a run that are looked at, their record, the theory's curve, and the figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.finetuning.settings import Settings
from dp_rmt.noise_addition import add_gaussian_noise, noise_key
from dp_rmt.random_matrix import marchenko_pastur
from dp_rmt.reporting.records import write_record
from dp_rmt.training.train_state import Transforms
from experiments.studies.spectra import figures as spectra_figures
from experiments.studies.spectra import record as spectra
from experiments.studies.spectra.gradient_stream import GradientStream, with_snapshots

SEED, STEPS = 5, 3
CHANGES = {"denoise": Settings().denoise, "train.learning_rate": 1e-2}


def kernels(tree: Any) -> dict[str, np.ndarray]:
    """Matrix leaves as (B, rows, cols), found without the code under test."""
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
    return {
        path: np.asarray(x, np.float64).reshape(-1, *x.shape[-2:])
        for path, x in leaves.items()
        if path.endswith("kernel") and min(x.shape[-2:]) >= 8
    }


@pytest.fixture(scope="module")
def observed(make_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three steps, with copies of their gradients, and the record that the experiment writes of them."""
    stream = GradientStream.build(make_config(CHANGES), arm="small", seed=SEED, num_steps=STEPS)
    gradients = []
    original = stream.steps

    def copying():
        for seen in original():
            gradients.append(jax.tree.map(np.array, seen._asdict()))
            yield seen

    object.__setattr__(stream, "steps", copying)
    path = tmp_path_factory.mktemp("spectra") / "record.json"
    for _ in spectra.record_run(stream, path, chosen={1, 3}):
        pass
    return SimpleNamespace(stream=stream, gradients=gradients, record=json.loads(path.read_text()))


@pytest.mark.slow
def test_what_is_recorded_is_the_clean_gradient_plus_the_very_noise(observed: SimpleNamespace) -> None:
    record, mechanism = observed.record, observed.stream.run.loop.mechanism
    noise, state = mechanism.noise(noise_key(SEED)), None
    assert [row["step"] for row in record["steps"]] == [1, 2, 3]
    assert [spectrum["step"] for spectrum in record["spectra"]] == [1, 3]
    for step, seen in enumerate(observed.gradients, start=1):
        state = noise.init(seen["clean"]) if state is None else state
        expected, state = noise.update(seen["clean"], state)
        spectrum = {s["step"]: s for s in record["spectra"]}.get(step)
        row = record["steps"][step - 1]
        index = 0
        for path, clean in kernels(seen["clean"]).items():
            for layer, (g, y, d) in enumerate(zip(clean, kernels(expected)[path], kernels(seen["denoised"])[path])):
                rows, cols = g.shape
                assert record["matrices"][index] == {"path": path, "layer": layer, "rows": rows, "cols": cols}
                values = np.linalg.svd(y, compute_uv=False) / mechanism.noise_std
                edge = np.sqrt(rows) + np.sqrt(cols)
                assert row["top_over_edge"][index] == pytest.approx(values[0] / edge, rel=1e-4)
                for stage, x in (("noisy", y), ("denoised", d)):
                    cosine = np.sum(x * g) / np.linalg.norm(x) / np.linalg.norm(g)
                    assert row[f"nonprivate/cosine_{stage}"][index] == pytest.approx(cosine, rel=1e-4, abs=1e-5)
                if spectrum is not None:
                    assert spectrum["noisy"][index] == pytest.approx(values, rel=1e-4, abs=1e-6)
                    clean_values = np.linalg.svd(g, compute_uv=False) / mechanism.noise_std
                    assert spectrum["nonprivate/clean"][index] == pytest.approx(clean_values, rel=1e-4, abs=1e-6)
                index += 1
        assert index == len(record["matrices"]) == len(row["top_over_edge"])


@pytest.mark.slow
def test_looking_changes_nothing() -> None:
    stages = Transforms(add_gaussian_noise(0.1, noise_key(SEED)), denoise_matrices(0.1, svd="gram"), optax.adam(1e-3))
    looking = with_snapshots(stages)
    gradient = {"kernel": jnp.outer(jnp.ones(12), jnp.ones(16)), "bias": jnp.ones(3)}
    seen = []
    for transforms in (stages, looking):
        noise, denoise = transforms.noise.init(gradient), transforms.denoise.init(gradient)
        for _ in range(2):
            noisy, noise = transforms.noise.update(gradient, noise)
            denoised, denoise = transforms.denoise.update(noisy, denoise)
        seen.append((noisy, denoised))
    jax.tree.map(np.testing.assert_array_equal, seen[0], seen[1])
    for name, expected in (("clean", gradient), ("noisy", seen[0][0]), ("denoised", seen[0][1])):
        jax.tree.map(np.testing.assert_array_equal, optax.tree.get((noise, denoise), name), expected)
    assert looking.optimizer is stages.optimizer
    other = dataclasses.replace(stages, published=lambda state, params: params, coordinates=lambda state: state)
    assert with_snapshots(other).coordinates is other.coordinates  # else it would clip other gradients than the run
    assert with_snapshots(other).published is other.published


@pytest.mark.slow
def test_a_record_names_no_folder_of_the_machine(observed: SimpleNamespace) -> None:
    data = observed.record["description"]["config"]["data"]
    assert "/" not in data["path"]
    assert data["cache_dir"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "arm", "message"),
    [
        ({"privacy.nonprivate_metrics": False}, "small", "as private as the data"),
        ({"privacy.epsilon": float("inf")}, "small", "without noise"),
        ({}, "denoised", "choose from small"),
        ({}, "small", "4 steps are asked for, but the run has 3"),
    ],
)
def test_what_makes_no_sense_is_refused(
    changes: dict[str, Any], arm: str, message: str, make_config: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        GradientStream.build(make_config(changes), arm=arm, seed=0, num_steps=4)


@pytest.mark.parametrize("shape", [(300, 300), (150, 600), (600, 150)])
@pytest.mark.parametrize("strength", [1.6, 2.5])
def test_the_theory_s_curve_goes_through_a_simulated_matrix(shape: tuple[int, int], strength: float) -> None:
    """Eight matrices of rank one; with `operator` for `frobenius` the curve would lie 0.1 to 0.4 higher."""
    rows, cols = shape
    rng = np.random.default_rng(0)
    threshold = marchenko_pastur.detection_threshold(rows=rows, cols=cols, noise_std=1.0)
    u, v = (rng.standard_normal((8, side)) for side in shape)
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    clean = strength * float(np.asarray(threshold)) * u[:, :, None] * v[:, None, :]
    noisy = {"kernel": jnp.asarray(clean + rng.standard_normal(clean.shape), jnp.float32)}
    denoise = denoise_matrices(1.0, svd="gram")
    denoised, state = denoise.update(noisy, denoise.init(noisy))
    predicted = spectra_figures.rank_one_cosines(
        np.asarray(state.diagnostics["kernel"].top_over_edge), rows=rows, cols=cols
    )
    for tree, cosines in zip((noisy, denoised), predicted):
        x = np.asarray(tree["kernel"], np.float64)
        seen = np.sum(x * clean, (1, 2)) / np.linalg.norm(x, axis=(1, 2)) / np.linalg.norm(clean, axis=(1, 2))
        assert seen.mean() == pytest.approx(cosines.mean(), abs=0.03)


@pytest.mark.slow
def test_figures_show_every_matrix_of_every_step(observed: SimpleNamespace, tmp_path: Path) -> None:
    record = observed.record
    by_edge = spectra_figures.draw_gain_by_edge([record, record])
    shown = sum(len(line.get_xdata()) for axes in by_edge.axes for line in axes.lines[:2])
    assert shown == 2 * STEPS * len(record["matrices"])
    by_step = spectra_figures.draw_gain_by_step([record])
    denoised, noisy = by_step.axes[0].lines
    assert noisy.get_ydata() == pytest.approx([np.mean(row["nonprivate/cosine_noisy"]) for row in record["steps"]])
    assert denoised.get_label() == "denoised"
    for number, figure in enumerate(
        (by_edge, by_step, *(spectra_figures.draw_spectrum(record, outliers=outliers) for outliers in (True, False)))
    ):
        figure.savefig(tmp_path / f"{number}.png")


def test_a_record_survives_being_written(tmp_path: Path) -> None:
    record = {"a": [[1.5, 2.0], [3.0]], "b": [{"c": {"d": []}}, {"c": {"d": [[], []]}}]}
    write_record(tmp_path / "folder" / "record.json", record)
    assert json.loads((tmp_path / "folder" / "record.json").read_text()) == record
