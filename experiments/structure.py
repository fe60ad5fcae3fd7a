"""Which matrices to denoise as one, and how to denoise LoRA factors: measured on gradients of PUBLIC data.

    python -m experiments.structure --config=configs/sst2_minilm.py --config.data.path=DIR \\
        --config.privacy.expected_batch_size=1024 --ranks=0,4,8,16

Trains the noisy arm of the config for some steps, once for each rank: with LoRA on every dense layer of the encoder and
a head, or (rank 0) what the config trains. Every candidate cleans the same noisy gradients, and the same exponential
averages of them (Adam's first moment, at its own noise level). Recorded is, for every matrix, the cosine to the clean
gradient of the step, and for a pair of factors also the cosine of the change of W, ``X B + A Z``, to the clean one's.

Clean gradients are raw private values: on private data this would break the guarantee. A record that is there already
is not made again. Prints all records of the folder as tables, means over the steps from --first_step on: before it, B
is little more than zero.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dp_rmt.denoising.gates import TracyWidom
from dp_rmt.denoising.gradient import TreeDenoiser
from dp_rmt.denoising.joins import JoinRule, reads_the_stream, shared_inputs
from dp_rmt.denoising.matrix_denoiser import MatrixDenoiser
from dp_rmt.denoising.matrix_view import MatrixAxes, MatrixRule
from dp_rmt.finetuning import command_line
from dp_rmt.models.encoder import ENCODER_PROJECTIONS
from dp_rmt.trees import leaves_by_path
from experiments import lora_pairs
from experiments.gradient_cosines import DECAY, first_moment_noise_std
from experiments.lora_pairs import Pair
from experiments.structure_table import print_table
from experiments.studies.records import five_digits, write_record
from experiments.studies.spectra.gradient_stream import GradientStream

Matrices = Mapping[str, Any]
"""The matrices of the layers by path; each leaf is (layers, rows, cols)."""
Candidate = Callable[[Matrices, Matrices, float], Matrices]
"""``(noisy, parameters, noise_std) -> cleaned``, all or some of the matrices."""

_WRITES_TO_THE_STREAM = ("output/kernel", "output_lora/lora_b/kernel")
_OUTSIDE_THE_STREAM = (
    "output_lora/lora_a/kernel",
    *(f"{name}_lora/lora_b/kernel" for name in ENCODER_PROJECTIONS if name != "output"),
)


def main(argv: list[str]) -> None:
    """Makes the records that are missing, and prints the table."""
    del argv
    values = flags.FLAGS
    folder = Path(values.results)
    names = ("arm", "seed", "num_steps", "lora_clip_norm", "lora_learning_rate")
    settings: dict[str, Any] = {name: values[name].value for name in names}
    for rank in map(int, values.ranks):
        try:
            stream = build(values.config, rank=rank, **settings)
        except (ValueError, FileNotFoundError) as error:
            command_line.stop(error)
        record(stream, folder / f"{stream.name}.json")
    print_table(folder, first_step=values.first_step)


def build(
    config: ConfigDict,
    *,
    rank: int,
    arm: str,
    seed: int,
    num_steps: int,
    lora_clip_norm: float = 1.0,
    lora_learning_rate: float = 5e-3,
) -> GradientStream:
    """The run of an arm, with LoRA on every dense layer if the rank is not 0; the base model is then frozen.

    Args:
      config: as `configs.base.get_config` builds it.
      rank: of LoRA with alpha = 2 rank, or 0.
      arm: of the config.
      seed: of sampling and noise.
      num_steps: how many to take.
      lora_clip_norm: in the place of the config's, if the rank is not 0: few parameters have small gradients.
      lora_learning_rate: in the place of the config's, too.

    Returns:
      A `GradientStream`.

    Raises:
      ValueError, FileNotFoundError: the message says what is wrong and what to do.
    """
    if rank == 0:
        return GradientStream.build(config, arm=arm, seed=seed, num_steps=num_steps)
    changed = ConfigDict(config.copy_and_resolve_references()).unlock()
    changed.model.tuning, changed.model.trainable = "lora", ".*"
    changed.model.lora.update({"rank": rank, "alpha": 2.0 * rank, "targets": ENCODER_PROJECTIONS})
    changed.privacy.l2_clip_norm, changed.optimizer.learning_rate = lora_clip_norm, lora_learning_rate
    stream = GradientStream.build(changed, arm=arm, seed=seed, num_steps=num_steps)
    return dataclasses.replace(stream, name=f"{stream.name}_lora{rank}")


def record(stream: GradientStream, path: Path) -> None:
    """Trains and measures, and writes the record after every step; does nothing if it is there, with all its steps."""
    made: dict[str, Any] = {"description": stream.description(), "decay": DECAY, "steps": []}
    if path.exists() and len(json.loads(path.read_text())["steps"]) >= stream.num_steps:
        return
    for row in measure(steps(stream), stream.run.loop.mechanism.noise_std):
        made["steps"].append(row)
        write_record(path, made)
        print(f"{path.stem}: step {row['step']}", flush=True)


def steps(stream: GradientStream) -> Iterator[tuple[Matrices, Matrices, Matrices]]:
    """``(parameters of LoRA, clean, noisy)`` of each step of the run; only the matrices of the layers."""
    loop, state = stream.run.loop, stream.run.state
    sampling = loop.mechanism.sampling(stream.run.sampling_seed)
    for step in range(stream.num_steps):
        # A copy: the step donates its state.
        factors = {path: np.array(leaf) for path, leaf in _layers(state.params).items() if "lora_" in path}
        state, _ = loop.train_step(state, loop.groups(sampling.indices(step)))
        clean, noisy = (_layers(optax.tree.get(state.noise, name)) for name in ("clean", "noisy"))
        yield factors, clean, noisy


def measure(gradients: Iterator[tuple[Matrices, Matrices, Matrices]], noise_std: float) -> Iterator[dict[str, Any]]:
    """A row for each step: ``{"step", "gradient": {candidate: {path: cosines}}, "first_moment": {...}}``.

    Args:
      gradients: parameters of LoRA, clean and noisy.
      noise_std: of one entry of the noisy gradient.

    Yields:
      Rows; cosines are those of the layers, in order. Of matrices that a candidate leaves alone, it has those of
      "separate".
    """
    average = optax.ema(DECAY, debias=True)
    average_std = first_moment_noise_std(noise_std, DECAY)
    state = None
    for step, (factors, clean, noisy) in enumerate(gradients):
        state = average.init(noisy) if state is None else state
        moment, state = average.update(noisy, state)
        row: dict[str, Any] = {"step": step + 1}
        for name, observed, std in (("gradient", noisy, noise_std), ("first_moment", moment, float(average_std(step)))):
            row[name] = {}
            for candidate, clean_up in candidates(bool(factors)).items():
                cleaned = clean_up(observed, factors, std)
                seen = {f"nonprivate/{path}": cosines for path, cosines in _cosines(cleaned, clean, factors).items()}
                row[name][candidate] = row[name].get("separate", {}) | seen
        yield row


@functools.cache
def candidates(of_lora: bool) -> dict[str, Candidate]:
    """What is compared; "separate" is each matrix alone."""

    def spectral(join: JoinRule | None = None, rule: MatrixRule = _all_matrices, only: Callable = bool) -> Candidate:
        denoiser = TreeDenoiser(MatrixDenoiser(gate=TracyWidom(0.01), svd="gram"), rule, join)
        apply = jax.jit(lambda noisy, std: denoiser(noisy, denoiser.init(noisy), std)[0])
        return lambda noisy, factors, std: apply({path: x for path, x in noisy.items() if only(path)}, std)

    joined: dict[str, Candidate] = {
        "noisy": lambda noisy, factors, std: noisy,
        "separate": spectral(),
        "shared inputs": spectral(shared_inputs, only=shared_inputs),
        "shared outputs": spectral(shared_outputs, residual_side, only=shared_outputs),
        "all layers": spectral(rule=residual_side_of_all_layers, only=faces_the_stream),
        "shared inputs of all layers": spectral(shared_inputs, residual_side_of_all_layers, only=shared_inputs),
        "all that reads the stream": spectral(reads_the_stream, residual_side_of_all_layers, only=reads_the_stream),
    }
    if not of_lora:
        return joined
    separate, rng = joined["separate"], np.random.default_rng(0)

    def of_pairs(estimate: Callable[[Pair, Pair, float], Pair]) -> Candidate:
        return lambda noisy, factors, std: _each_pair(lambda pair, ab: estimate(pair, ab, std), noisy, factors)

    consistent = of_pairs(lambda pair, ab, std: lora_pairs.consistent(pair, ab))
    return joined | {
        "consistent cores": lambda noisy, factors, std: separate(consistent(noisy, factors, std), factors, std),
        "joint fit": of_pairs(lora_pairs.joint_fit),
        "direction in W": of_pairs(lambda pair, ab, std: lora_pairs.tangent_denoised(pair, ab, std, rng)),
    }


def faces_the_stream(path: str) -> bool:
    """Whether one side of the matrix is the residual stream, which all layers read and write."""
    return not path.endswith(_OUTSIDE_THE_STREAM)


def shared_outputs(path: str) -> str | None:
    """Join rule: what writes into the residual stream of a layer, so that the gradients of its outputs are alike.

    >>> shared_outputs("layers/attention/output/kernel") == shared_outputs("layers/output/kernel")
    True
    """
    return "written" + path[path.rindex("output") + len("output") :] if path.endswith(_WRITES_TO_THE_STREAM) else None


def residual_side(path: str, leaf: jax.Array) -> MatrixAxes:
    """Matrix rule: the side of the residual stream is that of the rows."""
    del leaf
    return MatrixAxes((-1,), (-2,)) if path.endswith(_WRITES_TO_THE_STREAM) else MatrixAxes()


def residual_side_of_all_layers(path: str, leaf: jax.Array) -> MatrixAxes:
    """Matrix rule: the same, with all layers of a stacked leaf side by side as one matrix."""
    axes = residual_side(path, leaf)
    return MatrixAxes(axes.rows, (-3, *axes.cols))


def _all_matrices(path: str, leaf: jax.Array) -> MatrixAxes:
    del path, leaf
    return MatrixAxes()  # also where the rank is below `SMALLEST_DENOISED_SIDE`, which is to be measured


def _layers(tree: Any) -> Matrices:
    return {path: leaf for path, leaf in leaves_by_path(tree) if re.match("encoder/layers/.*kernel$", path)}


def _pairs(
    matrices: Mapping[str, Any], factors: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, str], list[tuple[Pair, Pair]]]]:
    """Of each adapted module the paths of its factors, and by layer its matrices and its parameters."""
    for path_a in factors:
        if path_a.endswith("lora_a/kernel"):
            paths = path_a, path_a.replace("lora_a/kernel", "lora_b/kernel")
            leaves = [np.asarray(tree[path], np.float64) for tree in (matrices, factors) for path in paths]
            yield paths, [(Pair(*layer[:2]), Pair(*layer[2:])) for layer in zip(*leaves)]


def _each_pair(estimate: Callable[[Pair, Pair], Pair], noisy: Matrices, factors: Matrices) -> Matrices:
    cleaned: dict[str, Any] = {}
    for paths, layers in _pairs(noisy, factors):
        estimates = [estimate(pair, ab) if ab.b.any() else pair for pair, ab in layers]
        cleaned |= {path: np.stack(leaf).astype(np.float32) for path, leaf in zip(paths, zip(*estimates))}
    return cleaned


def _cosines(cleaned: Mapping[str, Any], clean: Matrices, factors: Matrices) -> dict[str, list[float]]:
    """By path and layer; where all pairs are there, also the cosine of the change of W, as ".../product"."""
    cosines = {path: _cosine(np.asarray(leaf), np.asarray(clean[path])) for path, leaf in cleaned.items()}
    if cleaned.keys() >= factors.keys():
        changes = [
            {paths[0]: np.stack([pair.a @ b + a @ pair.b for pair, (a, b) in layers]) for paths, layers in found}
            for found in (_pairs(cleaned, factors), _pairs(clean, factors))
        ]
        for path, change in changes[0].items():
            cosines[path.replace("lora_a/kernel", "product")] = _cosine(change, changes[1][path])
    return {path: five_digits(values) for path, values in cosines.items()}


def _cosine(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Of each of (layers, rows, cols); 0 where one is zero."""
    x, g = x.astype(np.float64), g.astype(np.float64)
    norms = np.sqrt(np.sum(x * x, (1, 2)) * np.sum(g * g, (1, 2)))
    return np.sum(x * g, (1, 2)) / np.where(norms > 0, norms, 1.0)


if __name__ == "__main__":  # flags are defined here, so that other programs and tests can import the rest
    config_flags.DEFINE_config_file("config", None, "The experiment; its data must be public.")
    flags.DEFINE_list("ranks", ["0", "4", "8", "16"], "Of LoRA; 0 for what the config trains.")
    flags.DEFINE_string("arm", "noisy", "The arm of the config that gives the trajectory.")
    flags.DEFINE_integer("num_steps", 10, "How many steps of the schedule to take.", lower_bound=1)
    flags.DEFINE_integer("first_step", 4, "The first step in the means of the table.", lower_bound=1)
    flags.DEFINE_float("lora_clip_norm", 1.0, "With LoRA; about the median norm of a gradient for MiniLM on SST-2.")
    flags.DEFINE_float("lora_learning_rate", 5e-3, "With LoRA.")
    flags.DEFINE_integer("seed", 0, "Of sampling and noise: the data is public.")
    flags.DEFINE_string("results", "experiments/studies/structure/results", "Folder of the records.")
    flags.mark_flag_as_required("config")
    command_line.run(main)
