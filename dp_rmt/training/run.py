"""A checked run: it trains in a folder, which it resumes, and writes down what it releases before that exists."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from dp_rmt.training import processes
from dp_rmt.training.checkpoint import Checkpoints, can_go_on
from dp_rmt.training.guarantee import Guarantee, check_unspent
from dp_rmt.training.ledger import Ledger, only_writer
from dp_rmt.training.metrics import MetricsWriter
from dp_rmt.training.train import AfterEvaluation, TrainLoop
from dp_rmt.training.train_state import TrainState
from dp_rmt.training.writers import Writers
from dp_rmt.types import Params

CHECKPOINTS = "checkpoints"

WriteResults = Callable[[int, Params, MetricsWriter], None]
"""``(updates done, all parameters, metrics)``"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked run, ready to train; made by `prepare_run`.

    Attributes:
      loop: the training loop.
      state: the state before the first step. Training gives its arrays away.
      fresh_state: makes the state before the first step again.
      guarantee: what the ledger and the statement say.
      identity: what a checkpoint must agree on to be resumed.
      sampling_seed: for a fresh run; a resumed one goes on with the seed in its checkpoint.
      checkpoint_options: options of `Checkpoints` that say what is kept.
    """

    loop: TrainLoop
    state: TrainState
    fresh_state: Callable[[], TrainState]
    guarantee: Guarantee
    identity: Mapping[str, str]
    sampling_seed: int
    checkpoint_options: Mapping[str, Any]

    @property
    def delta(self) -> float:
        """The delta of the guarantee."""
        return self.loop.delta

    def published_params(self, state: TrainState) -> Params:
        """All parameters of a state, trained and frozen, as they are evaluated and may be released."""
        return self.loop.published_params(state)

    def checkpoints(self, workdir: str | os.PathLike[str]) -> Checkpoints:
        """The checkpoints of this run in a folder; the folder is made if it is missing."""
        return Checkpoints(Path(workdir) / CHECKPOINTS, self.identity, **self.checkpoint_options)

    def check(self, workdir: str | os.PathLike[str]) -> None:
        """Makes sure, before training, that the folder is new or this run's; writes nothing.

        Args:
          workdir: the run's folder.

        Raises:
          ValueError: the checkpoints there belong to another run: other data, another mechanism, another identity.
          FileExistsError: the folder has the results or the ledger of a run, but nothing to go on from.
        """
        workdir = Path(workdir)
        folder = workdir / CHECKPOINTS
        if folder.is_dir():
            checkpoints = self.checkpoints(workdir)
            checkpoints.check()
            checkpoints.close()
            if can_go_on(folder):
                Ledger(workdir).check_run(checkpoints.run)
        if not can_go_on(folder):
            check_unspent(workdir, seeds_given=self.guarantee.seeds_given)

    def train(
        self,
        workdir: str | os.PathLike[str],
        *,
        until: int | None = None,
        write_results: WriteResults | None = None,
        after_evaluation: AfterEvaluation | None = None,
        writers: Writers | None = None,
    ) -> TrainState:
        """Trains to the end, from the last checkpoint in the folder if there is one, and writes what was released.

        The folder then holds `metrics.jsonl`, `privacy.json` and `privacy.md` (the statement), `ledger.jsonl` (what was
        released, written down before it exists) and `checkpoints/`, which has the key of the noise and is as secret as
        the data. If there are several processes, all train, each on its devices, and the first one writes.

        Args:
          workdir: the run's folder; made if it is missing.
          until: stop after so many updates; a later call goes on.
          write_results: called at the end by the first process, while no other process may touch the folder.
          after_evaluation: called by the first process once an evaluation, or a stop, is written down.
          writers: get the numbers of the metrics, too; closed at the end.

        Returns:
          The state after the last update; `published_params` has what may be released.

        Raises:
          ValueError: the checkpoints there belong to another run.
          FileExistsError: the folder has the results or the ledger of a run, but nothing to go on from.
          BlockingIOError: another process trains there.
        """
        workdir, writes = Path(workdir), processes.is_first()
        if writes:
            workdir.mkdir(parents=True, exist_ok=True)
        with only_writer(workdir) if writes else contextlib.nullcontext():
            state = self._train(workdir, writes, until, write_results, after_evaluation, writers)
        processes.wait_for_all("results are written")
        return state

    def trained_state(self, workdir: str | os.PathLike[str]) -> TrainState:
        """The state after the last update that was saved in the folder.

        Raises:
          FileNotFoundError: nothing has been trained there.
        """
        restored = None
        if can_go_on(Path(workdir) / CHECKPOINTS):
            checkpoints = self.checkpoints(workdir)
            restored = checkpoints.restore(self._initial())
            checkpoints.close()
        if restored is None or int(restored[0].step) == 0:
            raise FileNotFoundError(f"{workdir} holds no checkpoint: train the run first")
        return restored[0]

    def _train(
        self,
        workdir: Path,
        writes: bool,
        until: int | None,
        write_results: WriteResults | None,
        after_evaluation: AfterEvaluation | None,
        writers: Writers | None,
    ) -> TrainState:
        """The part of `train`, reading the checkpoint included, during which no other process may touch the folder."""
        mechanism = self.loop.mechanism
        state, seed = self._initial(), self.sampling_seed
        checkpoints = self.checkpoints(workdir)
        restored = checkpoints.restore(state)
        if restored is None and writes:
            check_unspent(workdir, seeds_given=self.guarantee.seeds_given)
        if restored is not None:
            state, seed = restored
            logging.info("%s: resumed at step %d of %d", self.loop.name, int(state.step), mechanism.num_steps)
        releases = metrics = None
        if writes:
            releases = self.guarantee.releases(workdir, run=checkpoints.run, steps_done=int(state.step))
            metrics = MetricsWriter(workdir / "metrics.jsonl", writers)
        with contextlib.nullcontext() if metrics is None else contextlib.closing(metrics):
            state = self.loop.run(
                state,
                mechanism.sampling(seed, self.loop.users),
                checkpoints,
                metrics,
                releases,
                until=until,
                after_evaluation=after_evaluation,
            )
            checkpoints.close()
            if write_results is not None:
                params = processes.to_host(self.published_params(state))
                if metrics is not None:
                    write_results(int(state.step), params, metrics)
        return state

    def _initial(self) -> TrainState:
        gone = any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state) if isinstance(leaf, jax.Array))
        return self.fresh_state() if gone else self.state
