"""Where a run began: the noise and the sampler's seed of a run that has no checkpoint yet, as secret as a checkpoint.

Without it a run that is killed before its first checkpoint would begin again with other noise and spend the data twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dp_rmt.correlated_noise import with_history, without_history
from dp_rmt.data import fingerprint
from dp_rmt.files import write_atomically
from dp_rmt.training import processes
from dp_rmt.training.train_state import TrainState
from dp_rmt.trees import leaves_by_path

FILE = "start.json"
BEFORE_RUNS_HAD_IDS = "0" * 32
"""The id of a run whose checkpoints have no id."""


@dataclasses.dataclass(frozen=True)
class Start:
    """A run before its first update.

    Attributes:
      identity: what a checkpoint must agree on to be resumed (`Checkpoints`).
      run: the run's id.
      sampling_seed: seed of the sampler.
      noise: leaves of the noise's state, but for a history, which is all zeros before the first update.
      params: digest of the parameters.
    """

    identity: Mapping[str, str]
    run: str
    sampling_seed: int
    noise: list[Any]
    params: str

    def state(self, template: TrainState) -> TrainState:
        """The template's state with the noise of this run.

        Raises:
          ValueError: the parameters are not those that the run began with.
        """
        if _digest(template) != self.params:
            raise ValueError(
                "this run was stopped before its first checkpoint, and the parameters that it began with were others: "
                "the model's files have changed since. The same noise on other gradients would cancel out in the "
                "difference between the two, so put the model back as it was, or give a new --workdir"
            )
        leaves, structure = jax.tree.flatten(without_history(template.noise))
        noise = [_like(leaf, values) for leaf, values in zip(leaves, self.noise, strict=True)]
        return dataclasses.replace(template, noise=with_history(jax.tree.unflatten(structure, noise), template.noise))


def write(folder: Path, identity: Mapping[str, str], run: str, sampling_seed: int, state: TrainState) -> None:
    """Writes the start of a run into the folder of its checkpoints; all processes call it, the first one writes."""
    params = _digest(state)
    noise = [np.asarray(processes.to_host(leaf)).tolist() for leaf in jax.tree.leaves(without_history(state.noise))]
    if processes.is_first():
        record = Start(identity, run, sampling_seed, noise, params)
        write_atomically(folder / FILE, json.dumps(dataclasses.asdict(record)) + "\n")
    processes.wait_for_all("the start of the run is written")


def read(folder: Path) -> Start | None:
    """The start that is written in the folder, or None."""
    path = folder / FILE
    return Start(**json.loads(path.read_text())) if path.exists() else None


def remove(folder: Path) -> None:
    """Removes the start of a run; to be called once a checkpoint is there."""
    (folder / FILE).unlink(missing_ok=True)


def _digest(state: TrainState) -> str:
    """A digest of all parameters; only one leaf at a time is on the host."""
    digest = hashlib.sha256()
    for path, leaf in leaves_by_path({"params": state.params, "frozen": state.frozen}):
        digest.update(fingerprint({path: np.asarray(processes.to_host(leaf))}).encode())
    return digest.hexdigest()


def _like(leaf: Any, values: Any) -> Any:
    """The values as an array of the leaf's type, on its devices."""
    array = np.asarray(values, leaf.dtype)
    if not isinstance(leaf, jax.Array):
        return array
    return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])
