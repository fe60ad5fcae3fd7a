"""The denoiser's profiler on tiny models: the command, its record, its table, and the matrices that it makes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from dp_rmt.random_matrix import marchenko_pastur
from experiments.benchmarks import denoiser

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def commands(run_side_by_side: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Two commands, run side by side."""
    arguments = {"good": ["--model=tiny", "--repeats=2"], "unknown_model": ["--model=huge"]}
    return run_side_by_side(["-W", "error", "-m", "experiments.benchmarks.denoiser"], "--results", arguments)


def test_a_record_holds_all_rounds_and_what_follows_from_them(commands: dict[str, Any]) -> None:
    ended = commands["good"]
    assert ended.code == 0, ended.stderr
    (path,) = ended.folder.iterdir()
    assert path.name == "tiny-cpu.json"
    record = json.loads(path.read_text())
    assert record["matrices"] == {"16x16 float32": 9, "16x32 float32": 2, "32x16 float32": 2}
    assert record["command"] == "python -m experiments.benchmarks.denoiser --model=tiny --repeats=2"
    assert list(record["arms"]) == ["exact", "gram", "subspace, cold", "subspace, warm"]
    exact = record["arms"]["exact"]
    for name, arm in record["arms"].items():
        for clock in ("", "cpu_"):
            seconds = arm[f"{clock}seconds_of_rounds"]
            assert len(seconds) == 2
            assert min(seconds) > 0
            assert arm[f"{clock}seconds"] == statistics.median(seconds)
            ratios = [a / b for a, b in zip(exact[f"{clock}seconds_of_rounds"], seconds)]
            assert arm[f"{clock}speed_up"] == pytest.approx(statistics.median(ratios))
        assert list(arm["least_cosine"]) == ["1.1", "1.5", "2.0", "3.0", "4.0"]
        cosines = [cosine for cosine in arm["least_cosine"].values() if cosine is not None]
        assert len(cosines) >= 4
        assert min(cosines) > 0.9999  # all backends decompose matrices of 16 x 16 in full
        assert ("not_certified" in arm) == name.startswith("subspace")
        assert arm.get("not_certified", 0) == 0


def test_the_table_has_a_row_for_each_backend(commands: dict[str, Any]) -> None:
    lines = commands["good"].stdout.splitlines()
    assert lines[0] == "tiny: 9 of 16x16 float32, 2 of 16x32 float32, 2 of 32x16 float32"
    assert lines[3].split()[:3] == ["backend", "seconds", "exact/it"]
    assert [line.split()[0] for line in lines[4:8]] == ["exact", "gram", "subspace,", "subspace,"]
    assert len({len(line) for line in lines[3:8]}) == 1  # columns stand below each other


def test_an_unknown_model_ends_in_one_line(commands: dict[str, Any]) -> None:
    ended = commands["unknown_model"]
    assert ended.code != 0
    assert "--model=huge: value should be one of <roberta_base|" in ended.stderr
    assert not ended.folder.exists()


def test_components_stay_and_noise_changes_from_step_to_step() -> None:
    shapes = {
        "a/kernel": jax.ShapeDtypeStruct((5, 40, 60), np.float32),
        "b/kernel": jax.ShapeDtypeStruct((30, 20), np.float32),
    }
    first, second, again = (denoiser.updates(shapes, step=step) for step in (0, 1, 0))
    for path, leaf in first.items():
        assert leaf.shape == shapes[path].shape
        np.testing.assert_array_equal(leaf, again[path])
    # Of the average of many steps the components are left, in units of the threshold.
    mean = np.mean([denoiser.updates(shapes, step=step)["a/kernel"] for step in range(100)], axis=0)
    threshold = marchenko_pastur.detection_threshold(rows=40, cols=60, noise_std=1.0)
    found = np.linalg.svd(mean, compute_uv=False)[:, 0] / threshold
    np.testing.assert_allclose(found, denoiser.STRENGTHS, rtol=0.06)
    difference = np.asarray(second["a/kernel"]) - np.asarray(first["a/kernel"])
    assert np.std(difference) == pytest.approx(2**0.5, rel=0.05)
