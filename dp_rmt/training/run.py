"""The middle door: a model and data of one's own, trained with everything that the guarantee needs around the step.

`prepare_run` checks all that can be wrong before the first step; `Run.train` trains in a folder, which it resumes. The
program (`dp_rmt.finetuning`) goes through the same door.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh, PartitionSpec

from dp_rmt.batch_selection import fresh_seed
from dp_rmt.clipping.execution import AUTO, Execution
from dp_rmt.mechanism import DPSGD
from dp_rmt.training import processes
from dp_rmt.training import run_checks as checks
from dp_rmt.training.checkpoint import Checkpoints, can_go_on
from dp_rmt.training.guarantee import NOTHING_MORE, About, Guarantee, check_delta, check_unspent
from dp_rmt.training.identity import facts_of_run
from dp_rmt.training.ledger import Ledger, only_writer
from dp_rmt.training.metrics import MetricsWriter
from dp_rmt.training.microbatches import microbatch_size_on
from dp_rmt.training.partitioning import data_mesh, init_state, jit_train_step
from dp_rmt.training.private_scores import PrivateScores
from dp_rmt.training.sharding_rules import Rules
from dp_rmt.training.task import Task
from dp_rmt.training.train import AfterEvaluation, TrainLoop
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.training.writers import Writers
from dp_rmt.trees import split_params
from dp_rmt.types import Params

CHECKPOINTS = "checkpoints"
COPIED: Rules = (("", PartitionSpec()),)
"""Every device has all parameters."""

MakeTransforms = Callable[[DPSGD, int, Mesh], Transforms]
"""``(mechanism, noise_seed, mesh) -> Transforms``"""
WriteResults = Callable[[int, Params, MetricsWriter], None]
"""``(updates done, all parameters, metrics)``"""


@dataclasses.dataclass(frozen=True)
class Seeds:
    """The seeds of a run; a seed of None is drawn from the operating system's entropy, as private data needs it.

    Whoever knows the seeds can subtract the noise. The run's statement warns where they were given.

    Attributes:
      sampling: seed of the batches, in [0, 2^128).
      noise: seed of the noise, in [0, 2^128); it must differ from that of sampling.
    """

    sampling: int | None = None
    noise: int | None = None

    @property
    def are_given(self) -> bool:
        """Whether one of the seeds does not come from the system's entropy."""
        return (self.sampling, self.noise) != (None, None)


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


def prepare_run(
    task: Task,
    mechanism: DPSGD,
    transforms: MakeTransforms,
    *,
    delta: float,
    name: str = "train",
    mesh: Mesh | None = None,
    rules: Rules = COPIED,
    execution: Execution = AUTO,
    seeds: Seeds = Seeds(),
    learning_rate: Callable[[int], Any] | None = None,
    eval_every: int = 20,
    checkpoint_every: int = 50,
    checkpoints: Mapping[str, Any] | None = None,
    nonprivate_metrics: bool = True,
    identity: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    about: About = NOTHING_MORE,
    private_scores: PrivateScores | None = None,
) -> Run:
    """Puts a private run together from data, a loss, a mechanism and what follows the clipped gradient.

    Formal guarantee: the parameters that `Run.train` publishes are (epsilon, delta)-differentially private, as `DPSGD`
    says, for neighbours that differ by one row of `task.train`, or by all rows of one of `task.users`. Epsilon is at
    every moment what the statement in the run's folder says. This holds if the run draws its seeds itself, if its
    checkpoints, its ledger and the metrics named ``nonprivate/...`` stay secret, and if the private data has no other
    way into parameters, loss and transforms.

    A run is resumed with the noise that it has already released. If it went on with other data or another loss, that
    noise would cancel out. A checkpoint whose identity differs is therefore refused. The identity holds all numbers of
    the mechanism, delta, the execution as it was given, and the fingerprint of the training data. It cannot look into
    functions: say in `identity` what they depend on, such as the name of the model and the learning rate.

    Args:
      task: data, loss and parameters; with `users` where the unit of privacy is a user.
      mechanism: the mechanism, for as many examples as the task has, or users.
      transforms: ``(mechanism, noise_seed, mesh) -> Transforms``. Its noise must be
        ``mechanism.noise(noise_key(noise_seed))``, because the seed is the run's, and a secret.
      delta: of the guarantee; well below 1 / N.
      name: name of the run, shown at the progress bar.
      mesh: devices, see `dp_rmt.training.partitioning.make_mesh`; by default the examples are divided over all of them.
      rules: how parameters are divided over the devices; by default every device has all of them.
      execution: how gradients are computed; "auto" microbatches are found by compiling.
      seeds: give them for public data only.
      learning_rate: ``step -> rate``, to be reported in the metrics.
      eval_every: updates from one evaluation to the next; the last one is always evaluated.
      checkpoint_every: updates from one checkpoint to the next; the last one is always saved.
      checkpoints: options of `dp_rmt.training.checkpoint.Checkpoints`, such as ``{"keep": 3}``.
      nonprivate_metrics: also write ``nonprivate/...`` metrics, which are computed from raw values.
      identity: facts that a checkpoint must agree on beside those named above; compared as strings.
      facts: what is known before the first step, for the metrics' first line; not from private data.
      about: what the statement says of model and task.
      private_scores: gives the scores of all evaluators their noise; its numbers are those of the run. None where the
        evaluation data is public.

    Returns:
      A `Run`.

    Raises:
      ValueError: the numbers do not fit the data, the noise of the transforms is not the run's, or the clipping
        method does not fit the model; the message says what to do.

    >>> import os, tempfile
    >>> import numpy as np, optax
    >>> from dp_rmt.noise_addition import noise_key
    >>> from dp_rmt.training.train_state import Transforms
    >>> x = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    >>> losses = lambda params, batch: (batch["x"] @ params["w"] - batch["y"]) ** 2
    >>> task = Task({"x": x, "y": x.sum(1)}, losses, {"w": np.zeros(4, np.float32)})
    >>> dpsgd = DPSGD(num_examples=200, expected_batch_size=50, num_steps=3, noise_multiplier=2.0, l2_clip_norm=1.0)
    >>> def transforms(mechanism, noise_seed, mesh):
    ...     return Transforms(mechanism.noise(noise_key(noise_seed)), optax.identity(), optax.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     state = prepare_run(task, dpsgd, transforms, delta=1e-4).train(workdir)
    ...     int(state.step), sorted(os.listdir(workdir))
    (3, ['checkpoints', 'ledger.jsonl', 'metrics.jsonl', 'privacy.json', 'privacy.md'])
    """
    mechanism.check_users(task.users)
    if mechanism.num_examples != task.num_units:
        raise ValueError(
            f"the mechanism accounts for {mechanism.num_examples:,} examples and the task has {task.num_examples:,}: "
            "give num_examples=task.num_examples"
        )
    if mechanism.noise_multiplier > 0:
        check_delta(delta, mechanism.num_examples, unit=mechanism.unit)
        checks.warn_of_large_delta(name, mechanism, delta)
    if private_scores is not None:
        checks.check_private_scores(private_scores, mechanism.num_steps, eval_every, task)
    checks.warn_of_unprepared_process()
    mesh = data_mesh() if mesh is None else mesh
    microbatch_size = microbatch_size_on(mesh, execution, task, mechanism)
    sampling_seed, noise_seed = (
        processes.of_first(fresh_seed()) if seed is None else seed for seed in (seeds.sampling, seeds.noise)
    )
    stages = transforms(mechanism, noise_seed, mesh)
    params, frozen = split_params(task.params, task.trainable)

    def fresh_state() -> TrainState:
        return init_state(stages, params, frozen, mesh, rules)[0]

    state, shardings = init_state(stages, params, frozen, mesh, rules)
    checks.check_noise(state, mechanism, noise_seed)
    checks.warn_of_nothing_to_denoise(name, state)
    train_step = make_train_step(
        mechanism,
        task.losses,
        stages,
        execution=Execution(execution.clipping_method, microbatch_size),
        nonprivate_metrics=nonprivate_metrics,
        layout=shardings.params,
    )
    loop = TrainLoop(
        train_step=jit_train_step(train_step, mesh, shardings),
        mechanism=mechanism,
        delta=delta,
        arrays=task.train,
        users=task.users,
        lengths=task.lengths,
        evaluators=task.evaluators,
        learning_rate=learning_rate,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        published_params=stages.published_params,
        microbatch_size=microbatch_size,
        name=name,
        mesh=mesh,
        private_scores=private_scores,
        facts=facts or {},
    )
    checks.trace_step(loop, state, execution)
    guarantee = Guarantee(
        mechanism=mechanism,
        delta=delta,
        train_data=task.fingerprint,
        seeds_given=seeds.are_given,
        nonprivate_metrics=nonprivate_metrics,
        evaluation_data=tuple(task.evaluators),
        about=about,
        private_scores=private_scores,
    )
    names = facts_of_run(guarantee, execution, mesh, identity or {})
    return Run(loop, state, fresh_state, guarantee, names, sampling_seed, dict(checkpoints or {}))
