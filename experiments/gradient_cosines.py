"""How close each way of cleaning a noisy gradient comes to the clean one, on the same gradients of PUBLIC data.

    python -m experiments.gradient_cosines --config=configs/sst2_minilm.py --config.data.path=DIR \\
        --config.privacy.expected_batch_size=1024 --num_steps=24

One arm of the config trains as ever; by default the noisy one, so that no candidate shapes the gradients it is judged
on. Every candidate is fed the noisy gradient of each step, with a state of its own. Recorded are, over all matrices,

- the mean cosine to the clean gradient of that step, and the worst difference to the noisy gradient's cosine;
- the mean cosine to the clean first moment, the exponential average of the clean gradients (decay 0.9), which is what
  Adam would step along without noise;
- the processor seconds of the candidate's update and of the training step: other jobs on the machine lengthen neither.

Clean gradients are raw private values: on private data this would break the guarantee. The record is written after
every step; `python -m experiments.gradient_cosines_table` prints it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import config_flags

from dp_rmt.baselines.filters import low_pass_filter
from dp_rmt.baselines.muon import private_muon
from dp_rmt.baselines.truncation import truncate_rank
from dp_rmt.denoising.gates import TracyWidom
from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.finetuning import command_line
from dp_rmt.training.train_step import matrix_cosines
from dp_rmt.types import Params
from experiments.studies.records import five_digits, write_record
from experiments.studies.spectra.gradient_stream import Gradients, GradientStream

DECAY = 0.9
"""Of the first moment; Adam's own."""
_KALMAN_GAIN = 0.7


def main(argv: list[str]) -> None:
    """Runs, and writes the record after every step."""
    del argv
    try:
        stream = GradientStream.build(
            flags.FLAGS.config, arm=flags.FLAGS.arm, seed=flags.FLAGS.seed, num_steps=flags.FLAGS.num_steps
        )
    except (ValueError, FileNotFoundError) as error:
        command_line.stop(error)
    path = Path(flags.FLAGS.results) / f"{stream.name}.json"
    record: dict[str, Any] = {"description": stream.description(), "decay": DECAY, "steps": []}
    noise_std = stream.run.loop.mechanism.noise_std
    for row in compare(stream.steps(), candidates(noise_std)):
        record["steps"].append(row)
        write_record(path, record)
        means = {name: seen["nonprivate/cosine"] for name, seen in row["candidates"].items()}
        print(f"step {row['step']}:", ", ".join(f"{name} {cosine:.3f}" for name, cosine in means.items()), flush=True)
    print(path)


def candidates(noise_std: float) -> dict[str, optax.GradientTransformation]:
    """What is compared, each at the settings of its source; fed with gradients of this noise level.

    Args:
      noise_std: of one entry of the noisy gradient.

    Returns:
      name -> what stands between noise and optimizer; "noisy" is first.
    """
    average = optax.ema(DECAY, debias=True)
    average_std = first_moment_noise_std(noise_std, DECAY)
    gate = TracyWidom(0.01)
    return {
        "noisy": optax.identity(),
        "exact": denoise_matrices(noise_std, svd="exact"),  # the paper's method
        "gram": denoise_matrices(noise_std, svd="gram"),
        "subspace": denoise_matrices(noise_std, svd="subspace"),
        "tracy_widom": denoise_matrices(noise_std, svd="gram", gate=gate),
        "stein": denoise_matrices(noise_std, svd="gram", gate=gate, blend="stein"),
        "hard_threshold": denoise_matrices(noise_std, svd="gram", shrinker="hard_threshold", rescale="none"),
        "truncate_rank": truncate_rank(),
        "average": average,
        "average_denoised": optax.chain(average, denoise_matrices(average_std, svd="gram")),
        "average_tracy_widom": optax.chain(average, denoise_matrices(average_std, svd="gram", gate=gate)),
        "average_stein": optax.chain(average, denoise_matrices(average_std, svd="gram", gate=gate, blend="stein")),
        "low_pass": low_pass_filter(),
        # The gradients of this run are not those at the point ahead, which makes the filter an average.
        "kalman_without_look_ahead": optax.ema(1 - _KALMAN_GAIN, debias=True),
        "muon": optax.chain(private_muon(1.0, optax.sgd(1.0)), optax.scale(-1.0)),
    }


def first_moment_noise_std(noise_std: float, decay: float) -> optax.Schedule:
    """Noise of one entry of the bias-corrected exponential average of t = step + 1 gradients.

    ``s sqrt((1 - b)(1 - b^(2 t)) / (1 + b)) / (1 - b^t)``: the weights ``(1 - b) b^i / (1 - b^t)`` have this root of
    their sum of squares.

    >>> schedule = first_moment_noise_std(2.0, 0.9)
    >>> print(f"{schedule(0):.4f}, {schedule(1):.4f}, {schedule(1000) / 2.0 * 19**0.5:.4f}")
    2.0000, 1.4161, 1.0000
    """

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        power = jnp.power(decay, jnp.asarray(step, jnp.float32) + 1)
        return noise_std * jnp.sqrt((1 - decay) * (1 - power**2) / (1 + decay)) / (1 - power)

    return schedule


def compare(
    gradients: Iterator[Gradients], candidates: dict[str, optax.GradientTransformation]
) -> Iterator[dict[str, Any]]:
    """Feeds the noisy gradients to every candidate; yields a row for each step.

    Args:
      gradients: of a run.
      candidates: by name; the first is what the worst matrix is compared with.

    Yields:
      ``{"step", "cpu_seconds" of the training step, "nonprivate/loss", "candidates": {name: {...}}}``.
    """
    # Weight decay is 0 in all of them, so that any tree of the right shapes does for the parameters.
    apply = {
        name: jax.jit(lambda updates, state, update=candidate.update: update(updates, state, updates))
        for name, candidate in candidates.items()
    }
    clean_average = optax.ema(DECAY, debias=True)
    average_step = jax.jit(lambda updates, state: clean_average.update(updates, state))
    states: dict[str, Any] = {}
    average_state = None
    since = time.process_time()
    for gradient in gradients:
        jax.block_until_ready(gradient.noisy)
        seconds = time.process_time() - since
        if average_state is None:
            average_state = clean_average.init(gradient.clean)
            states = {name: candidate.init(gradient.noisy) for name, candidate in candidates.items()}
        moment, average_state = average_step(gradient.clean, average_state)
        seen: dict[str, dict[str, float]] = {}
        reference = None
        for name, update in apply.items():
            taken, (cleaned, states[name]) = _timed(update, gradient.noisy, states[name])
            cosines = _cosines(cleaned, gradient.clean)
            reference = cosines if reference is None else reference
            numbers = [np.mean(cosines), np.min(cosines - reference), np.mean(_cosines(cleaned, moment)), taken]
            names = ("nonprivate/cosine", "nonprivate/worst_gain", "nonprivate/cosine_to_first_moment", "cpu_seconds")
            seen[name] = dict(zip(names, five_digits(numbers)))
        yield {
            "step": gradient.step,
            "cpu_seconds": five_digits([seconds])[0],
            "nonprivate/loss": five_digits([gradient.metrics["nonprivate/loss"]])[0],
            "candidates": seen,
        }
        since = time.process_time()


@jax.jit
def _matrix_cosines(updates: Params, reference: Params) -> jax.Array:
    return jnp.concatenate(list(matrix_cosines(updates, reference).values()))


def _cosines(updates: Params, reference: Params) -> np.ndarray:
    return np.asarray(_matrix_cosines(updates, reference), np.float64)


def _timed(update: Callable[..., Any], updates: Params, state: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = jax.block_until_ready(update(updates, state))
    return time.process_time() - start, result


if __name__ == "__main__":  # flags are defined here, so that other programs and tests can import the rest
    config_flags.DEFINE_config_file("config", None, "The experiment; its data must be public.")
    flags.DEFINE_string("arm", "noisy", "The arm of the config that gives the trajectory.")
    flags.DEFINE_integer("num_steps", 24, "How many steps of the schedule to take.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of sampling and noise: the data is public.")
    flags.DEFINE_string("results", "experiments/studies/gradient_cosines/results", "Folder of the records.")
    flags.mark_flag_as_required("config")
    command_line.run(main)
