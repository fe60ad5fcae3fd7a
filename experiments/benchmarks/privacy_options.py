"""What each option of the guarantee costs beside plain DP-SGD, side by side in one process.

    python -m experiments.benchmarks.privacy_options --model=minilm --num_layers=1 --batch_size=64

The steps (clip, noise, Adam) of users with several rows, of a clip norm that follows a quantile, of noise from ChaCha20
and of correlated noise take turns with a plain one. Beside time there are the products of matrices, counted in the
program, the temporary memory of the compiled program, and what a checkpoint holds, which do not depend on the machine's
load. The noise alone is timed for each generator; rbg is XLA's own, whose bits depend on the backend, so that no run
may use it. Prints a table, writes a JSON file under --results.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags

from dp_rmt import accounting
from dp_rmt.accounting import Repetitions, Step, Truncation
from dp_rmt.clipping.execution import Execution
from dp_rmt.clipping.quantile import QuantileClipping
from dp_rmt.correlated_noise import square_root
from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import NOISE_SUPPORT, noise_key, normal_of_words, standard_normal
from dp_rmt.reporting import machine
from dp_rmt.training.private_scores import PrivateScores
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step
from experiments.benchmarks import rounds
from experiments.benchmarks.matrix_flops import matrix_flops
from experiments.benchmarks.step.models import make_workload

PLAIN = "plain"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "users of 2 rows": {"rows_per_user": 2},
    "users of 4 rows": {"rows_per_user": 4},
    "quantile": {"clip_quantile": QuantileClipping()},
    "chacha20": {"noise_generator": "chacha20"},
    **{f"correlated, {bands} bands": {"noise_strategy": square_root(bands)} for bands in (4, 8, 32)},
}
"""The options of `DPSGD` that a step is compiled with."""
LEAF = 1536, 384
"""The shape of the noise that is timed by itself: a matrix of MiniLM."""
SST2: dict[str, Any] = {"num_examples": 67_349, "expected_batch_size": 1024.0, "num_steps": 300, "l2_clip_norm": 0.1}
"""The run whose prices are computed."""


def main(argv: list[str]) -> None:
    """Measures, prints the table, writes the record."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    values = flags.FLAGS
    sizes: dict[str, Any] = {name: values[name].value for name in ("num_layers", "batch_size", "sequence_length")}
    try:
        record = {
            "model": values.model,
            **sizes,
            "machine": machine.description(),
            "steps": measure_steps(values.model, repeats=values.repeats, **sizes),
            "noise": measure_noise(values.repeats),
            "private_evaluation": measure_scores(values.repeats),
            "repeat_and_select": price_of_selection(),
        }
    except (ValueError, OSError) as error:
        command_line.stop(error)
    path = Path(values.results) / f"{'-'.join([values.model, *map(str, sizes.values())])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(render(record))
    print(f"Record: {path}")


def measure_steps(model: str, *, repeats: int, **sizes: int) -> dict[str, dict[str, float]]:
    """Each arm's seconds, products of matrices and bytes, with their ratios to the plain step.

    Args:
      model: a name in `experiments.benchmarks.step.models`.
      repeats: rounds.
      **sizes: those of `traced_step`.
    """
    runs, found = {}, {}
    for name, options in ARMS.items():
        traced, arguments = traced_step(model, options, **sizes)
        compiled = traced.lower().compile()
        found[name] = {
            "matrix_flops": float(matrix_flops(traced.jaxpr)),
            "temporary_bytes": float(compiled.memory_analysis().temp_size_in_bytes),
            "state_bytes": float(sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0]))),
        }
        runs[name] = functools.partial(_run, compiled, arguments)
        runs[name]()
    times = rounds.alternate(runs, repeats)
    for name, row in found.items():
        row["seconds"] = statistics.median(times[name])
        row["time_ratio"] = rounds.median_ratio(times[name], times[PLAIN])
        for quantity in ("matrix_flops", "temporary_bytes", "state_bytes"):
            row[f"{quantity}_ratio"] = row[quantity] / found[PLAIN][quantity]
    return found


def traced_step(
    model: str, options: Mapping[str, Any], *, num_layers: int, batch_size: int, sequence_length: int
) -> tuple[jax.stages.Traced, tuple[Any, ...]]:
    """A private step with Adam, traced, and its arguments.

    Args:
      model: a name in `experiments.benchmarks.step.models`.
      options: of `DPSGD`.
      num_layers: of the model, in the place of its own number.
      batch_size: examples, or users.
      sequence_length: tokens of a row.
    """
    rows = options.get("rows_per_user")
    size = batch_size * (rows or 1)
    workload = make_workload(
        model, batch_size=size, sequence_length=sequence_length, num_layers=num_layers, dtype="float32"
    )
    mechanism = DPSGD(
        num_examples=100 * batch_size,
        expected_batch_size=batch_size,
        num_steps=1,
        noise_multiplier=1.0,
        l2_clip_norm=0.1,
        max_batch_size=batch_size,
        **options,
    )
    noise = mechanism.noise(noise_key(0, mechanism.noise_generator))
    transforms = Transforms(noise, optax.identity(), optax.adam(1e-3))
    step = make_train_step(
        mechanism,
        lambda params, batch: workload.per_example_losses(params, {}, batch),
        transforms,
        execution=Execution("bookkeeping"),
        nonprivate_metrics=False,
    )
    shape = (batch_size,) if rows is None else (batch_size, rows)
    batch = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), workload.batch)
    state = TrainState.create(transforms, workload.trainable, workload.frozen)
    arguments = (state, [(batch, np.zeros(shape, bool))])
    return jax.jit(step).trace(*arguments), arguments


def measure_noise(repeats: int) -> dict[str, dict[str, float]]:
    """Nanoseconds of an entry's noise by each generator, and the ratio to Threefry's."""
    draws: dict[str, tuple[Any, Any]] = {
        "threefry2x32": (_of_words, noise_key(0)),
        "chacha20": (_of_words, noise_key(0, "chacha20")),
        "rbg": (_of_bits, jax.random.key(0, impl="rbg")),
    }
    runs = {}
    for name, (draw, key) in draws.items():
        runs[name] = functools.partial(_run, jax.jit(draw).lower(key).compile(), (key,))
        runs[name]()
    times = rounds.alternate(runs, repeats)
    return {
        name: {
            "nanoseconds_per_entry": 1e9 * statistics.median(seconds) / LEAF[0] / LEAF[1],
            "time_ratio": rounds.median_ratio(seconds, times["threefry2x32"]),
        }
        for name, seconds in times.items()
    }


def measure_scores(repeats: int) -> dict[str, float]:
    """What a private accuracy takes, and the noise that it has for ten evaluations at epsilon 1 together."""
    scores = PrivateScores(1.0, 1e-4, num_steps=9, eval_every=1, rows={"dev": 872}, content="a")
    _ = scores.noise_multiplier  # is found once, before the run
    release = functools.partial(scores.released, "dev", {"accuracy": 0.5}, step=1, key=b"key")
    seconds = rounds.alternate({"score": release}, max(repeats, 100))["score"]
    return {"microseconds_per_score": 1e6 * statistics.median(seconds), "rows_of_noise": scores.noise_multiplier}


def price_of_selection() -> dict[str, float]:
    """The epsilon of the best of a random number of runs, at the noise of one run of epsilon 3 on SST-2."""
    delta, repetitions = SST2["num_examples"] ** -1.1, Repetitions(6.0, 1.0)
    one = DPSGD.calibrated(epsilon=3.0, delta=delta, **SST2)
    truncation = Truncation(one.num_examples, one.truncation.max_batch_size)
    steps = {Step(one.noise_multiplier, one.sampling_probability, truncation): one.num_steps}
    best = accounting.epsilon_of_best(steps, repetitions, delta=delta, noise_support=NOISE_SUPPORT)
    return {"mean_number_of_runs": repetitions.mean, "epsilon_of_one": 3.0, "epsilon_of_best": best}


def render(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    quantities = {
        "time": "time",
        "matrix_flops": "matrix products",
        "temporary_bytes": "temporary memory",
        "state_bytes": "checkpoint",
    }
    lines = [
        "| step | " + " | ".join(f"{name} / plain" for name in quantities.values()) + " |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in record["steps"].items():
        ratios = (row[f"{quantity}_ratio"] for quantity in quantities)
        lines.append(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    lines += ["", "| noise | ns an entry | / Threefry |", "|---|--:|--:|"]
    for name, row in record["noise"].items():
        lines.append(f"| {name} | {row['nanoseconds_per_entry']:.0f} | {row['time_ratio']:.2f} |")
    scores, selection = record["private_evaluation"], record["repeat_and_select"]
    lines += [
        "",
        f"A private accuracy: {scores['microseconds_per_score']:.0f} microseconds; ten of them together at epsilon 1: "
        f"noise of {scores['rows_of_noise']:.1f} rows.",
        f"The best of {selection['mean_number_of_runs']:g} runs on average: {selection['mean_number_of_runs']:g} times "
        f"the time; at the noise of epsilon {selection['epsilon_of_one']:g}, "
        f"epsilon {selection['epsilon_of_best']:.2f}.",
    ]
    return "\n".join(lines)


def _of_words(key: jax.Array) -> jax.Array:
    return standard_normal(key, LEAF)


def _of_bits(key: jax.Array) -> jax.Array:
    high, low = jax.random.bits(key, (2, *LEAF))
    return normal_of_words(high, low)


def _run(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> None:
    """One call, to its end; returns nothing, so that it is freed."""
    jax.block_until_ready(compiled(*arguments))


if __name__ == "__main__":
    flags.DEFINE_string("model", "minilm", "A name in experiments.benchmarks.step.models.")
    flags.DEFINE_integer("num_layers", 1, "Layers of the model.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Examples, or users, in a step.", lower_bound=1)
    flags.DEFINE_integer("sequence_length", 32, "Tokens of a row.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Rounds.", lower_bound=1)
    flags.DEFINE_string("results", "experiments/benchmarks/results/privacy_options", "Folder of the records.")
    app.run(main)
