"""What the randomness of LoRA is worth, on real gradients of PUBLIC data (arXiv 2409.17538; arXiv 2601.21719).

    python -m experiments.studies.lora_noise.study --config=configs/e2e_stories260k.py --config.data.path=DIR \\
        --config.model.path=DIR
    python -m experiments.studies.lora_noise.study --config=configs/sst2_minilm.py --config.data.path=DIR

The study takes the per-example gradients of a batch, for an attention and a feed-forward matrix of the middle layer,
each clipped to the median norm. For ranks 1 to 64 it measures the variance of `G A A^T - G` against its formula, its
distance from the Gaussian, how well its scale is known, and the noise multiplier that it would amount to. It then
measures a membership attack on `G A A^T` without added noise, and what projection takes away from an attack once noise
is added. It writes a record, a picture and a report in plain words; `--report` makes the latter two from the record.
It looks at clean gradients, and is for public data only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import numpy as np
from absl import flags

from dp_rmt import accounting
from dp_rmt.auditing.membership import auc
from dp_rmt.finetuning import assemble, command_line
from dp_rmt.finetuning.settings import Settings
from dp_rmt.reporting import machine
from dp_rmt.reporting.records import five_digits, write_record
from dp_rmt.trees import leaves_by_path
from experiments.studies.lora_noise import laws
from experiments.studies.lora_noise import report as lora_noise_report

RANKS = (1, 2, 4, 8, 16, 32, 64)
MATRICES = ("attention/query/kernel", "layers/up/kernel", "layers/intermediate/kernel")
"""Ends of the paths of the matrices that are measured, where the model has them."""
NOISE_MULTIPLIERS = (0.5, 1.0, 2.0)
DELTA = 1e-3
"""The delta of the epsilons that are estimated by simulation: 50 of 50,000 draws lie beyond."""
ROWS = 16


def per_example_gradients(settings: Settings, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Gradients of single examples in the middle layer, path -> (batch, out, in), float64.

    Args:
      settings: settings of the experiment; its task's loss is differentiated at the pre-trained parameters.
      batch_size: number of random examples of the training data.
      seed: decides which examples.

    Raises:
      ValueError, FileNotFoundError: the message says what is wrong and what to do.
    """
    task = assemble.load_task(settings)
    rows = np.random.default_rng(seed).choice(task.num_examples, batch_size, replace=False)
    leaves = {path: leaf for path, leaf in leaves_by_path(task.params) if path.endswith(MATRICES)}
    if not leaves:
        raise ValueError(f"{settings.model.path}: no parameter's path ends in one of {', '.join(MATRICES)}")
    layer = len(next(iter(leaves.values()))) // 2

    def loss(chosen: Mapping[str, jax.Array], example: Any) -> jax.Array:
        params = _replaced(task.params, {path: leaves[path].at[layer].set(x) for path, x in chosen.items()})
        return task.losses(params, example)[0]

    gradient = jax.jit(jax.grad(loss))
    leaves = {path: jax.numpy.asarray(leaf) for path, leaf in leaves.items()}
    chosen = {path: leaf[layer] for path, leaf in leaves.items()}
    found = [gradient(chosen, {name: x[row : row + 1] for name, x in task.train.items()}) for row in rows]
    return {f"{path}[{layer}]": np.stack([np.asarray(g[path], float).T for g in found]) for path in chosen}


def clipped(gradients_BxMxN: np.ndarray) -> tuple[np.ndarray, float]:
    """The gradients clipped to their median norm, and that norm."""
    norms = np.linalg.norm(gradients_BxMxN, axis=(1, 2))
    clip_norm = float(np.median(norms))
    return gradients_BxMxN * np.minimum(1, clip_norm / np.maximum(norms, 1e-30))[:, None, None], clip_norm


def measure_noise(gradients_BxMxN: np.ndarray, rank: int, *, draws: int, rng: np.random.Generator) -> dict[str, Any]:
    """Variance, shape and scale of the noise of the largest rows of the mean gradient.

    Args:
      gradients_BxMxN: clipped gradients of single examples.
      rank: r.
      draws: number of draws of A.
      rng: the generator of the draws.
    """
    mean = gradients_BxMxN.mean(axis=0)
    largest = np.argsort(-np.linalg.norm(mean, axis=1))[:ROWS]
    rows = mean[largest].astype(np.float32)
    norms = np.linalg.norm(rows, axis=1)
    total = squares = np.zeros_like(rows, float)
    lengths, standardised, energies = [], [], []
    formula = laws.noise_variance(rows.astype(float), rank)
    done = 0
    while done < draws:  # a few at once: an A of MiniLM has up to 24,576 entries
        a = laws.projections(rows.shape[1], rank, min(50, draws - done), rng)
        noise = laws.row_noise(rows, a)
        total, squares = total + noise.sum(axis=0), squares + np.square(noise).sum(axis=0)
        energies.append(np.sum(np.square(noise), axis=(1, 2)) / formula.sum())
        lengths.append(np.linalg.norm(rows @ a, axis=2) / norms)
        # Only one entry of each row counts, because the entries of a row share A and are not independent.
        column = rng.integers(rows.shape[1], size=(len(a), len(rows), 1))
        picked = np.take_along_axis(noise, column, 2) / np.sqrt(np.take_along_axis(formula[None], column, 2))
        standardised.append(picked.ravel())
        done += len(a)
    measured = squares / draws - np.square(total / draws)
    rho = np.abs(rows / norms[:, None])
    sensitivity = np.linalg.norm(gradients_BxMxN[:, largest], axis=2).max(axis=0) / len(gradients_BxMxN)
    multiplier = np.sqrt(formula.mean(axis=1)) / sensitivity
    draws_of_all = np.sort(np.concatenate(standardised))
    empirical = np.abs(laws.special.ndtr(draws_of_all) - (np.arange(len(draws_of_all)) + 0.5) / len(draws_of_all)).max()
    return {
        "rank": rank,
        "variance_over_formula": _five(measured.sum() / formula.sum()),
        "variance_over_formula_error": _five(np.concatenate(energies).std() / np.sqrt(draws)),
        "kolmogorov_typical": _five(laws.kolmogorov_distance(float(np.median(rho)), rank)),
        "kolmogorov_worst": _five(laws.kolmogorov_distance(float(rho.max()), rank)),
        "kolmogorov_measured": _five(empirical),
        "kolmogorov_floor": _five(0.87 / np.sqrt(len(draws_of_all))),
        "one_over_sqrt_rank": _five(rank**-0.5),
        "scale_std": _five(np.concatenate(lengths).std()),
        "scale_std_expected": _five(laws.scale_std(rank)),
        "noise_multiplier_it_would_be": _five(np.median(multiplier)),
        "epsilon_it_would_be": _five(_gaussian_epsilon(float(np.median(multiplier)))),
    }


def attack(
    gradients_BxMxN: np.ndarray, rank: int, *, rows: int, trials: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Membership inference from `G A A^T` without added noise: the AUC of `symmetry_scores`.

    Args:
      gradients_BxMxN: clipped gradients of single examples.
      rank: r.
      rows: number of rows of the matrix that are released, the largest ones.
      trials: number of trials, each with its own example and A; in half of them the example is in the batch.
      rng: the generator of examples and A.
    """
    total = gradients_BxMxN.sum(axis=0)
    largest = np.argsort(-np.linalg.norm(total, axis=1))[:rows]
    scores: dict[bool, list[float]] = {True: [], False: []}
    for trial in range(trials):
        example = gradients_BxMxN[rng.integers(len(gradients_BxMxN))][largest]
        pair = laws.Neighbours(total[largest] - example, total[largest])
        a = rng.standard_normal((total.shape[1], rank)) / np.sqrt(rank)
        is_in = trial % 2 == 0
        truth = pair.with_example if is_in else pair.without
        scores[is_in].append(laws.symmetry_scores((truth @ a) @ a.T, pair))
    area = auc(np.array(scores[True]), np.array(scores[False]))
    return {"rank": rank, "rows": rows, "auc": five_digits(area)}


def amplification(
    gradients_BxMxN: np.ndarray, clip_norm: float, rank: int, multiplier: float, *, draws: int, rng: np.random.Generator
) -> dict[str, Any]:
    """What the best attack learns of one example from `G A + s N` with A secret, and from `G + s N` at the same s."""
    total = gradients_BxMxN.sum(axis=0)
    norms = np.linalg.norm(gradients_BxMxN, axis=(1, 2))
    example = gradients_BxMxN[int(np.argmax(norms))]
    std = multiplier * clip_norm
    pair = laws.Neighbours(total - example, total)
    losses = laws.projected_losses(pair, rank=rank, noise_std=std, draws=draws, rng=rng)
    mu = float(norms.max()) / std  # of the Gaussian mechanism, without projection
    return {
        "rank": rank,
        "noise_multiplier": multiplier,
        "auc_projected": _five(auc(losses.of_with, losses.of_without).value),
        "auc_full": _five(laws.special.ndtr(mu / np.sqrt(2))),
        "epsilon_projected": _five(laws.hockey_stick_epsilon(losses, DELTA)),
        "epsilon_full": _five(dp_accounting.get_epsilon_gaussian(1 / mu, DELTA)),
    }


def measure(
    gradients: Mapping[str, np.ndarray], *, ranks: tuple[int, ...], draws: int, trials: int, loss_draws: int, seed: int
) -> list[dict[str, Any]]:
    """All measurements of every matrix, as rows of a record."""
    tables = []
    for path, raw in gradients.items():
        rng = np.random.default_rng(seed)
        small, clip_norm = clipped(raw)
        all_rows, columns = raw.shape[1:]
        ranks_here = [rank for rank in ranks if rank <= columns]
        tables.append(
            {
                "matrix": path,
                "rows": all_rows,
                "columns": columns,
                "batch_size": len(raw),
                "clip_norm": _five(clip_norm),
                "noise": [measure_noise(small, rank, draws=draws, rng=rng) for rank in ranks_here],
                "attack": [
                    attack(small, rank, rows=rows, trials=trials, rng=rng)
                    for rank in (ranks_here[0], ranks_here[-1])
                    for rows in (1, 2, min(64, all_rows))
                ],
                "amplification": [
                    amplification(small, clip_norm, rank, z, draws=loss_draws, rng=rng)
                    for z in NOISE_MULTIPLIERS
                    for rank in ranks_here
                ],
            }
        )
        print(f"{path}: measured", file=sys.stderr, flush=True)
    return tables


def main(experiment: Settings, argv: list[str]) -> None:
    """Measures, or reads the record, and prints the report."""
    del argv
    values = flags.FLAGS
    name = f"{experiment.name}_seed{values.seed}"
    path = Path(values.results) / f"{name}.json"
    if not values.report:
        try:
            gradients = per_example_gradients(experiment, batch_size=values.batch_size, seed=values.seed)
        except (ValueError, FileNotFoundError) as error:
            command_line.stop(error)
        settings: Any = {"draws": values.draws, "trials": values.trials, "loss_draws": values.loss_draws}
        tables = measure(gradients, ranks=RANKS, seed=values.seed, **settings)
        model = experiment.model.path
        model = model if model.startswith("package:") else Path(model).name  # no folder of this machine
        record = {"config": experiment.name, "model": model, **settings}
        write_record(path, record | {"seed": values.seed, "machine": machine.description(), "matrices": tables})
    record = json.loads(path.read_text())
    print(lora_noise_report.write(record, path.with_suffix(".md")))
    lora_noise_report.figure(record, Path(values.images) / f"lora_noise_{name}.png")


def _replaced(params: Mapping[str, Any], leaves: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        name: _replaced(value, leaves, f"{prefix}{name}/")
        if isinstance(value, Mapping)
        else leaves.get(prefix + name, value)
        for name, value in params.items()
    }


def _gaussian_epsilon(noise_multiplier: float) -> float:
    """The epsilon of one Gaussian mechanism without subsampling, at delta = 1e-5."""
    return accounting.epsilon(
        noise_multiplier=noise_multiplier, delta=1e-5, sampling_probability=1.0, num_steps=1, accountant="rdp"
    )


def _five(value: float) -> float:
    return five_digits([float(value)])[0]


if __name__ == "__main__":
    flags.DEFINE_integer("batch_size", 32, "number of examples", lower_bound=2)
    flags.DEFINE_integer("draws", 2000, "draws of A, for the variance", lower_bound=50)
    flags.DEFINE_integer("trials", 1000, "trials of the attack without noise", lower_bound=10)
    flags.DEFINE_integer("loss_draws", 50_000, "draws of releases, for the epsilons with noise", lower_bound=1000)
    flags.DEFINE_string("images", "docs/images", "folder of the picture")
    flags.DEFINE_integer("seed", 0, "seed of the batch and all draws")
    flags.DEFINE_bool("report", False, "only make report and picture of a record that is there")
    flags.DEFINE_string("results", "experiments/studies/lora_noise/results", "where the records lie")
    command_line.run_with_settings(main)
