"""One step, every mesh: the noise is bit for bit the same, parameters but for the order of sums, and memory is shared.

Differences come from float32 sums in another order, 1e-7 of gradients of size 1; Adam with eps = 1e-3 passes on up to
a thousand times that of the smallest of them (as in test_data_parallel).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.thorough


PROGRAM = Path(__file__).parent / "sharded_steps.py"
RTOL, ATOL = 1e-4, 2e-5
ONE = "1x1x1"
IN_CI = ("2x2x2",)
SLOW = ("2x1x1", "1x2x1", "1x1x2", "4x1x1", "1x4x1", "1x1x4", "8x1x1", "1x8x1", "1x1x8", "2x4x1")


def results_of(meshes, folder):
    out = folder / "results.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", str(PROGRAM), *meshes, str(out)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stderr
    found: dict[str, dict[str, np.ndarray]] = {mesh: {} for mesh in meshes}
    with np.load(out) as arrays:
        for name, array in arrays.items():
            mesh, path = name.split("/", 1)
            found[mesh][path] = array
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return results_of((ONE, *IN_CI), tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """``mesh -> its results``, each from a process of its own, and once."""
    return functools.cache(lambda mesh: results_of((mesh,), tmp_path_factory.mktemp(mesh))[mesh])


def assert_same_run(actual, expected):
    steps = [path for path in expected if path[0].isdigit()]
    assert {path.split("/")[0] for path in steps} == {"0", "1", "2"}
    assert any("kept_rank" in path and expected[path].any() for path in steps)
    assert all(np.isfinite(expected[f"{step}/metrics/advice/slope"]) for step in "12")
    for path in steps:
        np.testing.assert_allclose(actual[path], expected[path], rtol=RTOL, atol=ATOL, err_msg=path)


def assert_same_noise(actual, expected):
    paths = [path for path in expected if path.startswith("noise/")]
    assert len(paths) > 10
    for path in paths:
        assert np.ptp(expected[path]) > 0
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


@pytest.mark.parametrize("mesh", IN_CI)
def test_a_mesh_gives_the_result_of_one_device(mesh, quick):
    assert_same_run(quick[mesh], quick[ONE])
    assert_same_noise(quick[mesh], quick[ONE])


def test_the_optimizer_lies_as_its_parameters_do(quick):
    """And so does the last update; the compiled step leaves every leaf where it was put."""
    specs = json.loads(str(quick["2x2x2"]["specs"]))
    kernel = "encoder/layers/attention/query/kernel"
    moments = [
        path for path in specs if path.endswith(tuple(f"/{kept}/{kernel}" for kept in ("mu", "nu", "last_update")))
    ]
    assert len(moments) == 3
    assert {str(specs[path]) for path in (f"params/{kernel}", *moments)} == {"[None, 'fsdp', 'tensor']"}
    for path in ("params/encoder/embeddings/word_embeddings", "frozen/encoder/embeddings/token_type_embeddings"):
        assert specs[f"{path}/embedding"] == ["tensor", "fsdp"]
    assert not any(specs["step"] + specs["noise/key"])


def test_memory_is_shared(quick):
    """What is kept of each parameter is divided by four, but for biases, norms and the starts of searches."""
    (all_in_one, _), (divided, _) = quick[ONE]["bytes"], quick["2x2x2"]["bytes"]
    assert divided < 0.4 * all_in_one


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SLOW)
def test_any_mesh_gives_the_result_of_one_device(mesh, on, quick):
    assert_same_run(on(mesh), quick[ONE])
    assert_same_noise(on(mesh), quick[ONE])


@pytest.mark.slow
def test_fsdp_needs_a_fraction_of_what_copies_need(on):
    """Per device, as the compiler says: what comes in, and what the step needs besides."""
    (copied, beside_copied), (divided, beside_divided) = on("8x1x1")["bytes"], on("1x8x1")["bytes"]
    assert divided < 0.25 * copied
    assert beside_divided < 0.6 * beside_copied
