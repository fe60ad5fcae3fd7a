"""One device equals eight: the same program, in processes of their own, under jit, pmap and shard_map.

The reference runs here, on one device. Results differ by the order of float32 sums over the examples, 1e-7 of gradients
of size 1, which three steps of Adam with eps = 1e-3 pass on as less than 1e-5 of the parameters; the noise does not
differ.
"""

from __future__ import annotations

import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.thorough


PROGRAM = Path(__file__).parent / "three_steps.py"
RTOL, ATOL = 1e-4, 1e-5
TIMEOUT = 240  # seconds; it takes about ten


@pytest.fixture(scope="module")
def on_one_device():
    """Results by kind, computed here and once."""
    if jax.device_count() != 1:
        pytest.skip(f"the reference needs a process with one device, this one has {jax.device_count()}")
    kinds, known = runpy.run_path(str(PROGRAM))["KINDS"], {}

    def results(kind):
        if kind not in known:
            known[kind] = kinds[kind]()
        return known[kind]

    return results


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory):
    """Results of all kinds, by ``KIND/step/path``."""
    out = tmp_path_factory.mktemp("eight") / "results.npz"
    kinds = [kind for names in PAIRS.values() for kind in names]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", str(PROGRAM), *kinds, str(out)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert finished.returncode == 0, finished.stderr
    with np.load(out) as results:
        assert results["num_devices"] == 8
        return dict(results)


# Kind on one device -> what must give the same on eight.
PAIRS = {
    "jit": ("jit", "pmap", "shard_map"),
    "jit_ghost": ("jit_ghost",),
    "jit_whitened": ("jit_whitened",),
    "jit_noise": ("jit_noise", "pmap_noise"),
}


@pytest.mark.parametrize(
    ("one", "eight"), [(one, kind) for one in ("jit", "jit_ghost", "jit_whitened") for kind in PAIRS[one]]
)
def test_eight_devices_give_the_result_of_one(one, eight, on_one_device, on_eight_devices):
    reference = on_one_device(one)
    assert {path.split("/")[0] for path in reference} == {"0", "1", "2"}
    for path, expected in reference.items():
        actual = on_eight_devices[f"{eight}/{path}"]
        np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL, err_msg=path)


@pytest.mark.parametrize("eight", PAIRS["jit_noise"])
def test_noise_is_bit_for_bit_the_same_and_added_once(eight, on_one_device, on_eight_devices):
    """Samples of padding alone and plain SGD: the parameters move by the noise."""
    reference = on_one_device("jit_noise")
    kernels = [reference[f"{step}/params/in/kernel"] for step in range(3)]
    assert all((a != b).all() for a, b in itertools.pairwise(kernels))
    for path, expected in reference.items():
        np.testing.assert_array_equal(on_eight_devices[f"{eight}/{path}"], expected, err_msg=path)


def test_the_samples_are_worth_dividing(on_one_device):
    """Clipped and not clipped examples, a NaN, padding; the denoiser at work."""
    metrics = on_one_device("jit")
    assert 0 < metrics["0/metrics/nonprivate/clipped_fraction"] < 1
    assert sum(metrics[f"{step}/metrics/nonprivate/nonfinite_examples"] for step in range(3)) > 0
    assert 10 < metrics["0/metrics/nonprivate/batch_size"] < 32
    assert sum(metrics[f"{step}/metrics/denoise/kept_rank/in/kernel"].sum() for step in range(3)) > 0
