"""What denoising all matrices of a model costs: full decompositions beside the search for what stands above the noise.

    python -m experiments.benchmarks.denoiser --model=roberta_base

Times `dp_rmt.denoise_matrices` with each backend, in turns, on unit noise with one component in each matrix, of 1.1 to
4 times the detection threshold. "warm" starts from what earlier steps found, the same components in other noise.
Every result is compared with that of the exact backend. Prints a table, writes a JSON file under --results.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from dp_rmt import denoise_matrices
from dp_rmt.denoising import matrix_groups, matrix_view
from dp_rmt.denoising.gradient import DenoiseState
from dp_rmt.denoising.matrix_denoiser import Backend
from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from dp_rmt.random_matrix import marchenko_pastur, subspace
from dp_rmt.reporting import machine
from dp_rmt.trees import leaves_by_path
from experiments.benchmarks import rounds
from experiments.benchmarks.step.models import MODELS, make_workload

_MODEL = flags.DEFINE_enum("model", None, list(MODELS), "The shapes of its matrices.", required=True)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", None, "Instead of the model's own number.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds of timed updates.", lower_bound=1)
_RESULTS = flags.DEFINE_string("results", "experiments/benchmarks/results/denoiser", "Folder of the records.")

STRENGTHS = (1.1, 1.5, 2.0, 3.0, 4.0)
"""Of the components, in units of the detection threshold; the matrices of a leaf have them in turn."""
ARMS: dict[str, tuple[Backend, int]] = {
    "exact": ("exact", 0),
    "gram": ("gram", 0),
    "subspace, cold": ("subspace", 0),
    "subspace, warm": ("subspace", 2),
}
"""Backend, and how many steps came before the timed one."""

Tree = dict[str, Any]


def main(argv: list[str]) -> None:
    """Measures, prints the table, writes the record."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    try:
        record = profile(_MODEL.value, _REPEATS.value, num_layers=_NUM_LAYERS.value)
    except (ValueError, RuntimeError) as error:
        command_line.stop(error)
    device = re.sub(r"\W+", "-", record["machine"]["device_kind"]).lower()
    path = Path(_RESULTS.value) / f"{record['model']}-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(render(record))
    print(f"Record: {path}")


def profile(model: str, repeats: int, *, num_layers: int | None = None) -> dict[str, Any]:
    """Seconds, agreement with the exact backend and number of matrices not certified, for each arm."""
    shapes = matrix_shapes(model, num_layers=num_layers)
    last = updates(shapes, step=0)
    arms: dict[str, Any] = {}
    runs: dict[str, Callable[[], object]] = {}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    reference = None
    for name, (backend, steps_before) in ARMS.items():
        transform = denoise_matrices(1.0, svd=backend)
        update, state = jax.jit(transform.update), transform.init(shapes)
        for step in range(steps_before):
            _, state = jax.block_until_ready(update(updates(shapes, step=step + 1), state))
        denoised, seen = jax.block_until_ready(update(last, state))
        reference = reference or (denoised, seen)
        arms[name] = {"least_cosine": _least_cosines(denoised, *reference)}
        if backend == "subspace":
            arms[name]["not_certified"] = _not_certified(last, state)
        runs[name] = functools.partial(_run, update, last, state, cpu_seconds[name])
    seconds = rounds.alternate(runs, repeats)
    for name, arm in arms.items():
        for clock, measured in (("", seconds), ("cpu_", cpu_seconds)):
            arm[f"{clock}seconds_of_rounds"] = measured[name]
            arm[f"{clock}seconds"] = statistics.median(measured[name])
            arm[f"{clock}speed_up"] = rounds.median_ratio(measured["exact"], measured[name])
    groups = matrix_groups.matrix_groups(last)
    return {
        "model": model,
        "num_layers": num_layers,
        "matrices": {shape: sum(matrix.number for matrix in group) for shape, group in groups.items()},
        "repeats": repeats,
        "command": " ".join(
            ["python -m experiments.benchmarks.denoiser", *(a for a in sys.argv[1:] if "--res" not in a)]
        ),
        "machine": machine.description() | {"glibc_tunables": os.environ.get("GLIBC_TUNABLES", "")},
        "versions": machine.versions(("jax", "jaxlib", "numpy")),
        "arms": arms,
    }


def matrix_shapes(model: str, *, num_layers: int | None = None) -> Tree:
    """The leaves of a model that are matrices, by path, as shapes."""
    sizes: dict[str, Any] = {"batch_size": 1, "sequence_length": 1, "num_layers": num_layers}
    params = jax.eval_shape(lambda: make_workload(model, dtype="float32", **sizes).trainable)
    leaves = dict(leaves_by_path(params))
    return {path: leaves[path] for path in matrix_view.matrix_leaves(params)}


def updates(shapes: Tree, *, step: int) -> Tree:
    """Noisy matrices: at every step the same components, other noise."""
    tree = {}
    for number, (path, leaf) in enumerate(shapes.items()):
        rows, cols = leaf.shape[-2:]
        matrices = np.random.default_rng([number, step]).standard_normal(leaf.shape, np.float32).reshape(-1, rows, cols)
        length = _strengths(number, len(matrices)) * marchenko_pastur.detection_threshold(
            rows=rows, cols=cols, noise_std=1.0
        )
        rng = np.random.default_rng(number)
        left, right = (rng.standard_normal((len(matrices), side), np.float32) for side in (rows, cols))
        left *= (length / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1))[:, None]
        tree[path] = jnp.asarray((matrices + left[:, :, None] * right[:, None, :]).reshape(leaf.shape))
    return tree


def _strengths(number: int, count: int) -> np.ndarray:
    """Those of the matrices of a leaf: all in turn, beginning with another one in every leaf."""
    return np.resize(np.roll(STRENGTHS, -number), count).astype(np.float32)


def _least_cosines(denoised: Tree, expected: Tree, seen: DenoiseState) -> dict[str, float | None]:
    """By strength of the component, over the matrices that the exact backend denoised; None if there are none."""
    cosines: dict[str, list[float]] = {str(strength): [] for strength in STRENGTHS}
    for number, (path, leaf) in enumerate(denoised.items()):
        matrices = np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-2] * leaf.shape[-1])
        right = np.asarray(expected[path], np.float64).reshape(matrices.shape)
        cosine = np.sum(matrices * right, axis=1) / np.linalg.norm(matrices, axis=1) / np.linalg.norm(right, axis=1)
        is_denoised = np.asarray(seen.diagnostics[path].kept_rank) > 0
        for value, strength in zip(cosine[is_denoised], _strengths(number, len(cosine))[is_denoised], strict=True):
            cosines[f"{strength:.1f}"].append(float(value))
    return {strength: min(values, default=None) for strength, values in cosines.items()}


def _not_certified(tree: Tree, state: DenoiseState) -> int:
    """How many matrices are decomposed in full, after all."""
    total = 0
    for shape, group in matrix_groups.matrix_groups(tree).items():
        matrices = matrix_groups.stack(group, tree)
        cut = marchenko_pastur.bulk_edge(rows=matrices.shape[1], cols=matrices.shape[2], noise_std=1.0)
        key = jax.random.fold_in(jax.random.key(0), state.step)
        found = jax.jit(subspace.subspace_svd)(matrices, start=state.starts[shape], cut=cut, key=key)
        total += int(jnp.sum(~found.is_complete))
    return total


def _run(update: Callable[..., Any], tree: Tree, state: optax.OptState, cpu_seconds: list[float]) -> None:
    start = time.process_time()
    jax.block_until_ready(update(tree, state))
    cpu_seconds.append(time.process_time() - start)


def render(record: dict[str, Any]) -> str:
    """The record as a table."""
    host = record["machine"]
    shapes = ", ".join(f"{number} of {shape}" for shape, number in record["matrices"].items())
    lines = [f"{record['model']}: {shapes}", f"{host['device_kind']} ({host['cpu']}, {host['cores']} cores)", ""]
    rows = [["backend", "seconds", "exact/it", "CPU seconds", "exact/it", "not certified", "least cosine to exact"]]
    for name, arm in record["arms"].items():
        numbers = [f"{arm[key]:.3g}" for key in ("seconds", "speed_up", "cpu_seconds", "cpu_speed_up")]
        least = min((value for value in arm["least_cosine"].values() if value is not None), default=None)
        cosine = "-" if least is None else f"{least:.6f}"
        rows.append([name, *numbers, str(arm.get("not_certified", "-")), cosine])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
