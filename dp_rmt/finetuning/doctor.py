"""What this machine has, and whether noise, clipping and accounting do on it what they should."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from dp_rmt import environment
from dp_rmt.accounting import calibrate_noise_multiplier, epsilon
from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad
from dp_rmt.models.layers import dense
from dp_rmt.noise_addition import NOISE_SUPPORT, add_gaussian_noise, noise_key, normal_of_words
from dp_rmt.reporting import machine
from dp_rmt.types import Batch, Params

PACKAGES = (
    "dp_rmt",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "dp-accounting",
    "numpy",
    "scipy",
    "orbax-checkpoint",
    "transformers",
)
"""The packages whose versions change what a run computes or reads."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one test found.

    Attributes:
      is_right: whether it is what theory says.
      text: the figure that was found beside the one that is right.
    """

    is_right: bool
    text: str


def examine() -> tuple[str, bool]:
    """The report on this machine as text, and whether all tests of it were passed."""
    lines = [*_machine(), "", "self-test"]
    passed = True
    for name, test in TESTS.items():
        start = time.perf_counter()
        finding = test()
        passed &= finding.is_right
        took = time.perf_counter() - start
        lines.append(f"  {'ok  ' if finding.is_right else 'FAIL'} {name}: {finding.text} ({took:.1f} s)")
    if passed:
        lines += ["", "All tests passed. A symptom that is left: docs/start/troubleshooting.md"]
    else:
        lines += [
            "",
            "A test FAILED: do not train on private data with this installation. Install the package anew in an empty "
            "environment; if it fails again, report this text.",
        ]
    return "\n".join(lines), passed


def _machine() -> list[str]:
    versions = machine.versions(PACKAGES)
    found = machine.description()
    devices, free = jax.devices(), machine.free_memory()
    missing = environment.unprepared()
    return [
        f"versions   {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"system     {platform.platform()}, {found['cores']} cores ({found['cpu']})",
        f"devices    {len(devices)} x {devices[0].device_kind} ({found['platform']})",
        f"memory     {'not known' if math.isinf(free) else f'{free / 1e9:.1f} GB free'}",
        f"products   float32 at precision {found['matmul_precision']}",
        f"XLA        {missing or 'its settings are right'}",
    ]


def sound_noise() -> Finding:
    """A million draws have mean 0 and the right deviation; the last of the 64-bit numbers is where the tail ends.

    The bounds are five standard errors, and the key is fixed, so that the same machine finds the same each time.
    """
    count, std = 1_000_000, 3.0
    add = add_gaussian_noise(std, noise_key(0))
    zeros = jnp.zeros(count)
    state = add.init(zeros)
    first, second = add.update(zeros, state)
    again, _ = add.update(zeros, state)
    other, _ = add.update(zeros, second)
    noise = np.asarray(first, np.float64) / std
    mean, deviation = float(noise.mean()), float(noise.std())
    end = float(normal_of_words(jnp.uint32(0xFFFFFFFF), jnp.uint32(0xFFFFFFFF)))
    shared = float(np.corrcoef(noise, np.asarray(other))[0, 1])
    is_right = (
        abs(mean) < 5 / math.sqrt(count)
        and abs(deviation - 1) < 5 / math.sqrt(2 * count)
        and abs(end - NOISE_SUPPORT) < 1e-2
        and bool((first == again).all())
        and abs(shared) < 5 / math.sqrt(count)
    )
    text = f"mean {mean:+.4f} (0), deviation {deviation:.4f} (1), ends at {end:.2f} ({NOISE_SUPPORT})"
    return Finding(is_right, f"{text}, correlation of two steps {shared:+.4f} (0)")


def sound_clipping() -> Finding:
    """The clipped gradient of a layer is that of NumPy in float64, by `vmap` and by the fast ways."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 16)) * 10.0 ** rng.uniform(-3, 3, size=(32, 1))
    y = rng.normal(size=(32, 8))
    layer = dense(8, dtype=jnp.float32, name="layer", lora=None, use_bias=False)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    params = {"params": {"kernel": jnp.zeros((16, 8))}}

    def losses(params: Params, batch: Batch) -> jax.Array:
        return -jnp.sum(layer.apply(params, batch["x"]) * batch["y"], axis=-1)

    each = -x[:, :, None] * y[:, None, :]
    norms = np.linalg.norm(each, axis=(1, 2), keepdims=True)
    right = (each * np.minimum(1, 1 / norms)).sum(axis=0)
    errors = {}
    ways = {"vmap": clipped_grad(losses, l2_clip_norm=1.0)} | {
        method: ghost_clipped_grad(losses, l2_clip_norm=1.0, method=method) for method in ("bookkeeping", "ghost")
    }
    for name, clipped in ways.items():
        gradient, _ = clipped(params, batch, is_padding_example=None)
        found = np.asarray(gradient["params"]["kernel"], np.float64)
        errors[name] = float(np.linalg.norm(found - right) / np.linalg.norm(right))
    largest = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    # Sums of 32 products in float32 are right to 1e-6 or so; a product in bfloat16 or tf32 has an error above 1e-4.
    return Finding(max(errors.values()) < 2e-5, f"relative error by {largest} (below 2e-5)")


def sound_accounting() -> Finding:
    """Epsilon of one full batch is the closed form of Balle & Wang (2018); calibration ends at or below its target."""
    delta = 1e-5

    def excess(value: float) -> float:
        return float(special.ndtr(0.5 - value) - math.exp(value) * special.ndtr(-0.5 - value) - delta)

    right = float(optimize.brentq(excess, 0.0, 20.0))
    found = epsilon(noise_multiplier=1.0, delta=delta, sampling_probability=1.0, num_steps=1)
    multiplier = calibrate_noise_multiplier(epsilon=3.0, delta=delta, sampling_probability=0.01, num_steps=200)
    reached = epsilon(noise_multiplier=multiplier, delta=delta, sampling_probability=0.01, num_steps=200)
    is_right = right <= found < right + 1e-3 and 2.99 < reached <= 3.0
    return Finding(is_right, f"epsilon {found:.4f} ({right:.4f}), calibrated to 3: {reached:.4f} (at most 3)")


TESTS: dict[str, Callable[[], Finding]] = {
    "noise": sound_noise,
    "clipping": sound_clipping,
    "accounting": sound_accounting,
}
"""The tests by the names under which they are reported."""
