"""What the device computes beside what its machine's CPU computes: clipping, noise, denoising, the whole step.

    python -m experiments.benchmarks.gpu.against_cpu --results=DIR

Each check has a value, what is allowed and why. A check that fails is written down like the others: the record is what
was asked for. cuDNN's attention is compared with the plain path on the device itself, and skipped where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags

import dp_rmt
from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from dp_rmt.noise_addition import noise_key
from dp_rmt.reporting import machine
from dp_rmt.types import Params
from experiments.benchmarks.step.models import MODELS, Workload, make_workload
from experiments.benchmarks.step.programs import make_step, relative_error
from experiments.benchmarks.update import NOISY, make_update

_MODEL = flags.DEFINE_enum("model", "llama3_2_1b", list(MODELS), "A decoder; two of its layers are used.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Examples.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("sequence_length", 256, "Tokens of each.", lower_bound=1)
_RESULTS = flags.DEFINE_string("results", None, "Folder of the record.", required=True)

CLIP_NORM = 0.1
# Sums of float32 products in another order, through a dozen operations in a row.
ROUNDING = 1e-4
# bfloat16 has 8 bits; cuDNN keeps the attention weights in other bits than XLA.
BFLOAT16 = 0.1
NOISE_SHAPES = ((7,), (384, 1536), (1000, 3, 17))

Check = dict[str, Any]


def main(argv: list[str]) -> None:
    """Runs every check, prints a line for each, and writes the record."""
    del argv
    checks: dict[str, Check] = {"noise_bits": noise_bits()}
    with jax.default_matmul_precision("highest"):  # else float32 products are TF32 on a GPU
        checks |= gradients(_workload("float32"))
    checks["flash_attention"] = flash_attention()
    for name, check in checks.items():
        print(f"{name}: {check}", flush=True)
    record = {
        "passed": all(check["passed"] is not False for check in checks.values()),
        "model": _MODEL.value,
        "machine": machine.description(),
        "checks": checks,
    }
    folder = Path(_RESULTS.value)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "against_cpu.json", json.dumps(record, indent=1) + "\n")


def noise_bits() -> Check:
    """How many entries of the noise differ from the CPU's, and by how much: none may, or a run could not move."""
    zeros = {str(number): np.zeros(shape, np.float32) for number, shape in enumerate(NOISE_SHAPES)}
    noise = dp_rmt.add_gaussian_noise(1.0, noise_key(3))

    def two_steps(zeros: Params) -> Params:
        first, state = noise.update(zeros, noise.init(zeros))
        return first, noise.update(zeros, state)[0]

    here, there = _on_both(two_steps, zeros)
    pairs = list(zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True))
    different = sum(int((a.view(np.int32) != b.view(np.int32)).sum()) for a, b in pairs)
    return {
        "value": different,
        "allowed": 0,
        "passed": different == 0,
        "of": sum(a.size for a, _ in pairs),
        "largest_difference": max(float(np.abs(a - b).max()) for a, b in pairs),
    }


def gradients(workload: Workload) -> dict[str, Check]:
    """Clipped sums of each method, a denoised matrix of each backend, and a whole private update."""
    checks: dict[str, Check] = {}

    def clipped(arm: str) -> Callable[..., Params]:
        def sum_and_norms(trainable: Params, frozen: Params, batch: Any) -> Params:
            losses = lambda params, examples: workload.per_example_losses(params, frozen, examples)  # noqa: E731
            return make_step(arm, losses, CLIP_NORM, None)(trainable, batch)[0]

        return sum_and_norms

    arguments = (workload.trainable, workload.frozen, workload.batch)
    for arm in ("vmap", "ghost", "bookkeeping"):
        here, there = _on_both(clipped(arm), *arguments)
        checks[f"clipped_{arm}"] = _compared(here, there, ROUNDING)
        total, bound = float(optax.tree.norm(here)), CLIP_NORM * _BATCH_SIZE.value * (1 + ROUNDING)
        checks[f"sensitivity_{arm}"] = {"value": total, "allowed": bound, "passed": total <= bound}
    matrices = spiked_matrices()
    for backend in ("exact", "gram", "subspace"):
        denoiser = dp_rmt.denoise_matrices(1.0, svd=backend)
        denoise = lambda tree, denoiser=denoiser: denoiser.update(tree, denoiser.init(tree))[0]  # noqa: E731
        checks[f"denoised_{backend}"] = _compared(
            *_on_both(denoise, matrices), 1e-3
        )  # the search ends at a residual of 1e-3
    update, state = make_update(workload, NOISY, l2_clip_norm=CLIP_NORM, microbatch_size=None)
    noisy = _on_both(lambda *given: update(*given)[0], *arguments, state)
    checks["noisy_update"] = _compared(*noisy, 1e-2)  # Adam divides
    return checks


def spiked_matrices() -> Params:
    """Unit noise with a component three times as strong as what can be detected."""
    rng = np.random.default_rng(0)
    rows, cols = 96, 256
    left, right = (rng.standard_normal(size) for size in (rows, cols))
    strength = 3 * (rows * cols) ** 0.25 / np.linalg.norm(left) / np.linalg.norm(right)
    return {"kernel": np.float32(rng.standard_normal((rows, cols)) + strength * np.outer(left, right))}


def flash_attention() -> Check:
    """The clipped sum with cuDNN's attention, in bfloat16, beside the plain path's."""
    if jax.default_backend() != "gpu":
        return {"value": None, "allowed": BFLOAT16, "passed": None, "skipped": "cuDNN needs an NVIDIA GPU"}
    sums = []
    for flash in (True, False):
        workload = _workload("bfloat16", flash_attention=flash)

        def losses(params: Params, examples: Any, workload: Workload = workload) -> jax.Array:
            return workload.per_example_losses(params, workload.frozen, examples)

        step = jax.jit(make_step("bookkeeping", losses, CLIP_NORM, None))
        sums.append(step(workload.trainable, workload.batch)[0])
    error = relative_error(*sums)
    return {"value": error, "allowed": BFLOAT16, "passed": error <= BFLOAT16}


def _workload(dtype: str, **options: Any) -> Workload:
    sizes: dict[str, Any] = {"batch_size": _BATCH_SIZE.value, "sequence_length": _LENGTH.value, "num_layers": 2}
    return make_workload(_MODEL.value, dtype=dtype, **sizes, **options)


def _compared(here: Params, there: Params, allowed: float) -> Check:
    """Relative difference of the device's result from the CPU's."""
    error = relative_error(here, there)
    return {"value": error, "allowed": allowed, "passed": error <= allowed}


def _on_both(function: Callable[..., Params], *arguments: Any) -> tuple[Params, Params]:
    """The function's results on the device and on the CPU."""
    compiled, results = jax.jit(function), []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            results.append(jax.device_get(compiled(*jax.device_put(jax.device_get(arguments), device))))
    return results[0], results[1]


if __name__ == "__main__":
    command_line.run(main)
