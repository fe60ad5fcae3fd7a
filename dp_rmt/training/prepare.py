"""The middle door: a model and data of one's own, trained with everything that the guarantee needs around the step.

`prepare_run` checks all that can be wrong before the first step. The program, `dp_rmt.finetuning`, goes through it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from dp_rmt.batch_selection import fresh_seed
from dp_rmt.clipping.execution import AUTO, Execution
from dp_rmt.mechanism import DPSGD
from dp_rmt.training import processes
from dp_rmt.training import run_checks as checks
from dp_rmt.training.guarantee import NOTHING_MORE, About, Guarantee
from dp_rmt.training.identity import facts_of_run
from dp_rmt.training.microbatches import microbatch_size_on
from dp_rmt.training.partitioning import data_mesh, init_state, jit_train_step
from dp_rmt.training.private_scores import PrivateScores
from dp_rmt.training.run import Run
from dp_rmt.training.sharding_rules import Rules
from dp_rmt.training.task import Task
from dp_rmt.training.train import TrainLoop
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.trees import split_params

COPIED: Rules = (("", PartitionSpec()),)
"""Every device has all parameters."""

MakeTransforms = Callable[[DPSGD, int, Mesh], Transforms]
"""``(mechanism, noise_seed, mesh) -> Transforms``"""


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
    checks.check_numbers(name, task, mechanism, delta)
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
