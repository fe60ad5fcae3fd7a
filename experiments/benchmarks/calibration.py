r"""How much noise each library adds for one promise, by its own calibration with its own defaults.

    python -m experiments.benchmarks.calibration --epsilon=3 --delta=1e-5

The promise is (epsilon, delta) after num_steps Poisson samples. More noise than another library's means a looser
accountant or a wider tolerance; the last column says what the noise costs by dp_rmt's "pld". Peers need
``pip install -e ".[peers,peers-torch]"``; one that is not installed is left out. Prints a table, writes a JSON file
under --results.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from dp_rmt.accounting import calibrate_noise_multiplier, epsilon
from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from dp_rmt.reporting import machine
from third_party.peers import JAX_PEERS, OPACUS, NotInstalledError, require

PACKAGES = ("dp-accounting", "jax-privacy", "opacus", "numpy", "scipy")


class Promise(NamedTuple):
    """What every library is asked for."""

    epsilon: float
    delta: float
    num_examples: int
    expected_batch_size: int
    num_steps: int

    @property
    def sampling_probability(self) -> float:
        return self.expected_batch_size / self.num_examples


def ours(promise: Promise, accountant: Any) -> float:
    """The noise multiplier of dp_rmt, of batches that are never truncated, as the others have them."""
    return calibrate_noise_multiplier(
        epsilon=promise.epsilon,
        delta=promise.delta,
        sampling_probability=promise.sampling_probability,
        num_steps=promise.num_steps,
        accountant=accountant,
    )


def of_jax_privacy(promise: Promise, accountant: str) -> float:
    """That of jax_privacy's `accounting.calibrate_noise_multiplier`."""
    require(JAX_PEERS["jax_privacy"])
    from jax_privacy import accounting

    config = {"pld": accounting.PldAccountantConfig, "rdp": accounting.RdpAccountantConfig}[accountant]()
    return accounting.calibrate_noise_multiplier(
        target_epsilon=promise.epsilon,
        accountant=accounting.DpsgdTrainingAccountant(config),
        batch_sizes=promise.expected_batch_size,
        num_updates=promise.num_steps,
        num_samples=promise.num_examples,
        target_delta=promise.delta,
    )


def of_opacus(promise: Promise, accountant: str) -> float:
    """That of Opacus' `get_noise_multiplier`."""
    require(OPACUS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, and of orders that lie at the end of their range
        from opacus.accountants.utils import get_noise_multiplier

        return get_noise_multiplier(
            target_epsilon=promise.epsilon,
            target_delta=promise.delta,
            sample_rate=promise.sampling_probability,
            steps=promise.num_steps,
            accountant=accountant,
        )


ARMS: Mapping[str, tuple[Callable[[Promise, str], float], str]] = {
    "dp_rmt, pld (default)": (ours, "pld"),
    "dp_rmt, rdp": (ours, "rdp"),
    "jax_privacy, pld": (of_jax_privacy, "pld"),
    "jax_privacy, rdp": (of_jax_privacy, "rdp"),
    "Opacus, prv (default of make_private_with_epsilon)": (of_opacus, "prv"),
    "Opacus, rdp (default of get_noise_multiplier)": (of_opacus, "rdp"),
}


def measured(promise: Promise) -> dict[str, dict[str, float]]:
    """The noise multiplier of every arm whose library is installed, and what it costs by "pld"."""
    found = {}
    for name, (calibrate, accountant) in ARMS.items():
        try:
            noise_multiplier = calibrate(promise, accountant)
        except NotInstalledError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        costs = epsilon(
            noise_multiplier=noise_multiplier,
            delta=promise.delta,
            sampling_probability=promise.sampling_probability,
            num_steps=promise.num_steps,
        )
        found[name] = {"noise_multiplier": noise_multiplier, "epsilon_by_pld": costs}
    return found


def main(argv: list[str]) -> None:
    """Calibrates, prints the table, writes the record."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    values = flags.FLAGS
    promise = Promise(values.epsilon, values.delta, values.num_examples, values.expected_batch_size, values.num_steps)
    given = [argument for argument in sys.argv[1:] if "--results" not in argument]
    arms = measured(promise)
    record = {
        "promise": promise._asdict(),
        "command": " ".join(["python -m experiments.benchmarks.calibration", *given]),
        "versions": machine.versions(PACKAGES),
        "arms": arms,
    }
    path = Path(values.results) / f"epsilon{promise.epsilon:g}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    for name, found in arms.items():
        print(f"{found['noise_multiplier']:.4f}  epsilon by pld {found['epsilon_by_pld']:.3f}  {name}")
    print(f"Record: {path}")


if __name__ == "__main__":
    flags.DEFINE_float("epsilon", 3.0, "The promise.", lower_bound=0.0)
    flags.DEFINE_float("delta", 1e-5, "The promise.", 0.0, 1.0)
    flags.DEFINE_integer("num_examples", 67_349, "Of the data; SST-2's.", lower_bound=1)
    flags.DEFINE_integer("expected_batch_size", 1000, "Of a Poisson sample.", lower_bound=1)
    flags.DEFINE_integer("num_steps", 202, "Poisson samples.", lower_bound=1)
    flags.DEFINE_string("results", "experiments/benchmarks/results/calibration", "Folder of the records.")
    command_line.run(main)
