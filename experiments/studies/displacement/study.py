"""Where in the spectrum lies what a run has learned? The study splits its displacement at the edge of its noise.

    python -m experiments.studies.displacement.study --config=configs/sst2_methods.py --config.data.path=DIR \\
        --arm=dp_adam --config.privacy.expected_batch_size=1024 --config.train.learning_rate=4e-3 \\
        --steps=6,12,18,24,30

One arm of the config trains as usual. At the chosen steps, every matrix of ``W_t - W_0`` is split into the part above
the bulk edge, by the Frobenius shrinker, and the rest. The noise level is that of the displacement's own bulk
(`dp_rmt.random_matrix.marchenko_pastur.estimate_noise_std`), because an adaptive optimizer has no other. The model is
then scored as it is, with only the part above, and with only the rest; other leaves, such as biases, stay as they are.
The record is written after every chosen step, and a line for each is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dp_rmt.denoising import matrix_view
from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.settings import Settings
from dp_rmt.random_matrix import marchenko_pastur, shrinkage, singular_values
from dp_rmt.reporting.records import five_digits, write_record
from dp_rmt.trees import leaves_by_path
from dp_rmt.types import Params
from experiments.studies.spectra.gradient_stream import GradientStream

PARTS = ("whole", "above", "below")
Scores = dict[str, float]


class Split(NamedTuple):
    """A displacement in two parts that add up to it.

    Attributes:
      above: parameters that moved only by the part above the edge; leaves that are no matrices are the run's.
      below: parameters that moved only by the rest.
      kept_rank: number of components above the edge of each matrix, in the order of the tree.
      top_over_edge: largest singular value of each matrix over the edge.
    """

    above: Params
    below: Params
    kept_rank: np.ndarray
    top_over_edge: np.ndarray


def main(settings: Settings, argv: list[str]) -> None:
    """Trains, and prints and records a row at each of the steps."""
    del argv
    try:
        chosen = {int(step) for step in flags.FLAGS.steps}
        stream = GradientStream.build(settings, arm=flags.FLAGS.arm, seed=flags.FLAGS.seed, num_steps=max(chosen))
    except (ValueError, FileNotFoundError) as error:
        command_line.stop(error)
    path = Path(flags.FLAGS.results) / f"{stream.name}.json"
    record: dict[str, Any] = {"description": stream.description(), "steps": []}
    for row in record_run(stream, chosen):
        record["steps"].append(row)
        write_record(path, record)
        scores = ", ".join(f"{name} {part}: {row[part][name]:.4f}" for name in row["whole"] for part in PARTS)
        print(f"step {row['step']}: y_1 / edge {row['top_over_edge']:.3f}, rank {row['kept_rank']:.2f}; {scores}")
    print(path)


def record_run(stream: GradientStream, chosen: Collection[int]) -> Iterator[dict[str, Any]]:
    """Trains, and yields a row at each of the chosen steps: means over the matrices, and scores of whole and parts."""
    start = jax.device_get(stream.run.published_params(stream.run.state))  # the run gives its own arrays away
    for gradients in stream.steps():
        if gradients.step not in chosen:
            continue
        split = split_displacement(gradients.params, start)
        parts = dict(zip(PARTS, (gradients.params, split.above, split.below), strict=True))
        yield {
            "step": gradients.step,
            "kept_rank": float(np.mean(split.kept_rank)),
            "top_over_edge": float(np.mean(split.top_over_edge)),
            "largest_top_over_edge": float(np.max(split.top_over_edge)),
            **{part: _scores(stream.run.loop.evaluators, params) for part, params in parts.items()},
        }


def split_displacement(params: Params, start: Params) -> Split:
    """Splits the displacement of the matrices from where they began.

    Args:
      params: parameters of the run.
      start: its parameters before the first step, the same tree.

    Returns:
      A `Split`; matrices that have not moved, such as frozen ones, are not counted.
    """
    matrices, began = matrix_view.matrix_leaves(params), dict(leaves_by_path(start))
    above, below, ranks, tops = [], [], [], []
    for path, leaf in leaves_by_path(params):
        if path not in matrices or not np.any(leaf != began[path]):
            above.append(leaf)
            below.append(leaf)
            continue
        moved = matrix_view.to_matrices(jnp.asarray(leaf) - began[path], matrices[path])
        kept, rank, top = _above_the_edge(moved)
        part = began[path] + matrix_view.from_matrices(kept, matrices[path], leaf.shape)
        above.append(part)
        below.append(leaf - (part - began[path]))
        ranks.append(rank)
        tops.append(top)
    structure = jax.tree.structure(params)
    trees = jax.tree.unflatten(structure, above), jax.tree.unflatten(structure, below)
    return Split(*trees, np.concatenate(ranks), np.concatenate(tops))


@jax.jit
def _above_the_edge(matrices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The matrices denoised at the level of their own bulk, (B, m, n); their ranks, (B,); y_1 over the edge, (B,)."""
    rows, cols = matrices.shape[1:]
    basis, values = singular_values.short_side_svd(matrices)
    noise_std = marchenko_pastur.estimate_noise_std(values, rows=rows, cols=cols)[:, None]
    shape: dict[str, Any] = {"rows": rows, "cols": cols, "noise_std": noise_std}
    shrunken = shrinkage.frobenius(values, **shape)
    kept = singular_values.scale_spectrum(matrices, basis, jnp.where(shrunken > 0, shrunken / values, 0.0))
    edge = jnp.asarray(marchenko_pastur.bulk_edge(**shape))
    return kept, jnp.sum(shrunken > 0, axis=1), values[:, 0] / edge[:, 0]


def _scores(evaluators: Mapping[str, Callable[[Params], Scores]], params: Params) -> Scores:
    return {
        f"{name}/{metric}": five_digits([value])[0]
        for name, evaluate in evaluators.items()
        for metric, value in evaluate(params).items()
    }


if __name__ == "__main__":
    flags.DEFINE_string("arm", "dp_adam", "The arm of the config that trains.")
    flags.DEFINE_list("steps", ["6", "12", "18", "24", "30"], "Steps at which the displacement is split.")
    flags.DEFINE_integer("seed", 0, "Seed of sampling and noise, which may be known because the data is public.")
    flags.DEFINE_string("results", "experiments/studies/displacement/results", "Folder of the records.")
    command_line.run_with_settings(main)
