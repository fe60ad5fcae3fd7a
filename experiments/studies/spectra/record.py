"""Records the singular values of clean and noisy gradients along a run on PUBLIC data.

    python -m experiments.studies.spectra.record --config=configs/sst2_minilm.py --config.data.path=DIR --steps=1,4,8

The run is an ordinary one of one arm of the config. At every step y_1 / e and the cosines to the clean gradient before
and after denoising are recorded for every matrix. At the chosen steps all singular values are recorded, too. On private
data this would break the guarantee: clean values are functions of raw gradients, and no noise protects them.

The record is written after every step; `python -m experiments.studies.spectra.figures` draws it. Its matrices are the
rows of ``matrices``, and all lists with a value for each matrix have that order. Singular values are in units of
``noise_std``, the standard deviation of one entry of the noise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dp_rmt.denoising import matrix_view
from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.settings import Settings
from dp_rmt.random_matrix import marchenko_pastur
from dp_rmt.reporting.records import five_digits, write_record
from dp_rmt.training.train_step import matrix_cosines
from dp_rmt.trees import leaves_by_path
from dp_rmt.types import Params
from experiments.studies.spectra.gradient_stream import Gradients, GradientStream


def main(settings: Settings, argv: list[str]) -> None:
    """Runs, and writes the record after every step."""
    del argv
    try:
        chosen = _chosen_steps()
        num_steps = flags.FLAGS.last_step or max(chosen)
        stream = GradientStream.build(settings, arm=flags.FLAGS.arm, seed=flags.FLAGS.seed, num_steps=num_steps)
    except (ValueError, FileNotFoundError) as error:
        command_line.stop(error)
    path = Path(flags.FLAGS.results) / f"{stream.name}.json"
    for row in record_run(stream, path, chosen=chosen):
        noisy, denoised = (np.mean(row[f"nonprivate/cosine_{stage}"]) for stage in ("noisy", "denoised"))
        print(f"step {row['step']}: cosine {noisy:.3f} noisy, {denoised:.3f} denoised", flush=True)
    print(path)


def record_run(stream: GradientStream, path: Path, *, chosen: Collection[int]) -> Iterator[dict[str, Any]]:
    """Trains, and writes the record.

    Args:
      stream: the run.
      path: the file of the record, which is written anew after every step.
      chosen: steps whose spectra are recorded.

    Yields:
      The `summary` of each step.
    """
    record: dict[str, Any] = {"description": stream.description(), "matrices": [], "steps": [], "spectra": []}
    noise_std = stream.run.loop.mechanism.noise_std
    for gradients in stream.steps():
        record["matrices"] = record["matrices"] or matrices_of(gradients.clean)
        record["steps"].append(summary(gradients, noise_std))
        if gradients.step in chosen:
            record["spectra"].append(spectra(gradients, noise_std))
        write_record(path, record)
        yield record["steps"][-1]


def matrices_of(tree: Params) -> list[dict[str, Any]]:
    """Path, layer and shape of every matrix of a tree, in the order of the records."""
    return [
        {"path": path, "layer": layer, "rows": matrices.shape[1], "cols": matrices.shape[2]}
        for path, matrices in _matrices(tree).items()
        for layer in range(len(matrices))
    ]


def summary(gradients: Gradients, noise_std: float) -> dict[str, Any]:
    """Cosines to the clean gradient and y_1 / e of every matrix in one update, and the loss.

    Args:
      gradients: clean, noisy and denoised.
      noise_std: standard deviation of one entry of the noise; positive.

    Returns:
      A row of the record.
    """
    edges = [
        marchenko_pastur.bulk_edge(rows=matrix["rows"], cols=matrix["cols"], noise_std=1.0)
        for matrix in matrices_of(gradients.noisy)
    ]
    largest = [values[0] for values in singular_values(gradients.noisy, noise_std)]
    return {
        "step": gradients.step,
        "nonprivate/loss": five_digits([gradients.metrics["nonprivate/loss"]])[0],
        "nonprivate/cosine_noisy": _cosines(gradients.noisy, gradients.clean),
        "nonprivate/cosine_denoised": _cosines(gradients.denoised, gradients.clean),
        "top_over_edge": five_digits(value / edge for value, edge in zip(largest, edges)),
    }


def spectra(gradients: Gradients, noise_std: float) -> dict[str, Any]:
    """All singular values of every matrix in one update, clean and noisy, in units of noise_std, descending."""
    return {
        "step": gradients.step,
        "noisy": [five_digits(values) for values in singular_values(gradients.noisy, noise_std)],
        "nonprivate/clean": [five_digits(values) for values in singular_values(gradients.clean, noise_std)],
    }


def singular_values(tree: Params, noise_std: float) -> list[np.ndarray]:
    """The singular values of every matrix of a tree over noise_std, descending, in double precision."""
    return [
        np.linalg.svd(matrix, compute_uv=False) / noise_std
        for matrices in _matrices(tree).values()
        for matrix in matrices
    ]


def _matrices(tree: Params) -> dict[str, np.ndarray]:
    """The matrices of every matrix leaf, (B, rows, cols) by path, in double precision."""
    leaves = dict(leaves_by_path(tree))
    return {
        path: np.asarray(matrix_view.to_matrices(leaves[path], axes), np.float64)
        for path, axes in matrix_view.matrix_leaves(tree).items()
    }


def _cosines(updates: Params, clean: Params) -> list[float]:
    return five_digits(np.concatenate(jax.device_get(list(matrix_cosines(updates, clean).values()))))


def _chosen_steps() -> set[int]:
    given = flags.FLAGS.steps
    if not given or not all(step.isdecimal() and int(step) > 0 for step in given):
        raise ValueError(f"--steps={','.join(given)}: give numbers of updates, from 1, such as --steps=1,4,8")
    return {int(step) for step in given}


if __name__ == "__main__":  # flags are defined here, so that other programs and tests can import the rest
    flags.DEFINE_string("arm", "denoised", "The arm of the config whose run is observed.")
    flags.DEFINE_list("steps", ["1", "4", "8"], "Steps at which all singular values are recorded.")
    flags.DEFINE_integer("last_step", None, "The last step of the run; by default the last of --steps.")
    flags.DEFINE_integer("seed", 0, "Seed of sampling and noise, which may be known because the data is public.")
    flags.DEFINE_string("results", "experiments/studies/spectra/results", "Folder of the records.")
    command_line.run_with_settings(main)
