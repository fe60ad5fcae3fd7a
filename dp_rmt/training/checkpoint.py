"""Checkpoints that refuse to continue another experiment: for privacy, not for tidiness."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from dp_rmt.training.train_state import TrainState


class Checkpoints:
    """The checkpoints of one run: state, sampler seed, and the identity of the experiment (Orbax, atomic).

    A run resumed with the same noise key on OTHER batches would let an observer subtract two updates and cancel the
    noise. The identity therefore holds everything that the batches and the noise depend on, and `restore` refuses
    to go on where it differs.

    Args:
      directory: where they lie; made on the first save.
      identity: JSON-able facts about data, sampling, clipping, noise and model.
      max_to_keep: older checkpoints are deleted.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, Any], *, max_to_keep: int = 2):
        self._directory = Path(directory).absolute()
        self._identity = json.loads(json.dumps(dict(identity)))  # as it will be read: tuples become lists
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: TrainState, *, sampling_seed: int) -> None:
        """Saves in the background; a step that is there already is left as it is.

        Args:
          step: number of updates done.
          state: the state after them.
          sampling_seed: of `PoissonSampling`, kept secret with the noise key.
        """
        meta = {"identity": self._identity, "sampling_seed": str(sampling_seed)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        if step not in self._manager.all_steps():
            self._manager.save(step, args=items)

    def restore(self, template: TrainState) -> tuple[TrainState, int] | None:
        """The newest checkpoint, or None where there is none.

        Args:
          template: a state with the structure, shapes and shardings to restore.

        Returns:
          ``(state, sampling_seed)``.

        Raises:
          ValueError: the checkpoint belongs to another experiment; the differences are listed.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        meta = self._meta(step)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        return self._manager.restore(step, args=items).state, int(meta["sampling_seed"])

    def check(self) -> None:
        """Makes sure that the newest checkpoint, if there is one, can be resumed; reads nothing big.

        Raises:
          ValueError: as `restore`.
        """
        step = self._manager.latest_step()
        if step is not None:
            self._meta(step)

    def close(self) -> None:
        """Waits for saves that are under way."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _meta(self, step: int) -> Mapping[str, Any]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        self._check_identity(meta["identity"])
        return meta

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        names = sorted({*saved, *self._identity})
        differences = [
            f"  {name}: checkpoint {saved.get(name)!r}, now {self._identity.get(name)!r}"
            for name in names
            if saved.get(name) != self._identity.get(name)
        ]
        if differences:
            raise ValueError(
                f"the checkpoint in {self._directory} belongs to another experiment:\n" + "\n".join(differences) + "\n"
                "Going on would reuse its noise on other batches or gradients, which lets the noise cancel out and "
                "breaks the privacy guarantee. Give a new --workdir, or restore the settings above."
            )
