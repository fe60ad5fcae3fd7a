"""The training loop: sample, step, report, evaluate, checkpoint; and what ends it early."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dp_rmt.batch_selection import PoissonSampling, UserSampling
from dp_rmt.data.batches import gather_batch
from dp_rmt.data.length_groups import rows_of_groups
from dp_rmt.extras import extra
from dp_rmt.mechanism import DPSGD
from dp_rmt.reporting.numbers import number
from dp_rmt.training.checkpoint import Checkpoints
from dp_rmt.training.metrics import MetricsWriter, read_metrics
from dp_rmt.training.preemption import Preempted, Preemption
from dp_rmt.training.private_scores import PrivateScores, secret_of
from dp_rmt.training.processes import of_first, to_devices
from dp_rmt.training.releases import Releases
from dp_rmt.training.train_state import TrainState
from dp_rmt.training.train_step import TrainStep
from dp_rmt.types import Params

with extra("finetune"):
    import tqdm

AfterEvaluation = Callable[[int], None]
"""``(updates done)``"""
EPSILON_POINTS = 20
"""The number of steps at which a run computes epsilon, about: a computation takes up to a second. Updates are announced
in as many stretches (`dp_rmt.training.releases`), each up to the next of these steps."""
_SECONDS = "seconds"
"""What the line of an update has, and that of an evaluation has not."""


@dataclasses.dataclass(frozen=True)
class TrainLoop:
    """Everything that stays the same during a run.

    Attributes:
      train_step: the compiled step, ``(state, groups) -> (state, metrics)``.
      mechanism: gives epsilon and the number of steps.
      delta: the delta of the privacy guarantee.
      arrays: tokenised training data.
      users: the number of each row's user, where the unit of privacy is a user.
      lengths: sequence lengths of the groups that a batch is split into; empty for data that is not split.
      evaluators: name -> function of all parameters that gives scores.
      learning_rate: the schedule, for the metrics; None leaves it out.
      eval_every: steps between evaluations; the last step is always evaluated.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      published_params: gives all parameters of a state as they are evaluated (`Transforms.published_params`).
      microbatch_size: of the step. Batches are filled up to whole microbatches; None for the whole batch.
      name: shown at the progress bar.
      private_scores: gives the scores their noise; None where the evaluation data is public.
      facts: what is known before the first step, for the metrics.
      mesh: the mesh of the step; it is used where there are several processes, each of which reads its own rows.
    """

    train_step: TrainStep
    mechanism: DPSGD
    delta: float
    arrays: Mapping[str, np.ndarray]
    lengths: tuple[int, ...]
    evaluators: Mapping[str, Callable[[Params], dict[str, float]]]
    learning_rate: Callable[[int], Any] | None
    eval_every: int
    checkpoint_every: int
    published_params: Callable[[TrainState], Params]
    microbatch_size: int | None = None
    name: str = "train"
    mesh: Mesh | None = None
    users: np.ndarray | Sequence[Any] | None = None
    private_scores: PrivateScores | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(
        self,
        state: TrainState,
        sampling: PoissonSampling | UserSampling,
        checkpoints: Checkpoints,
        metrics: MetricsWriter | None,
        releases: Releases | None,
        *,
        until: int | None = None,
        after_evaluation: AfterEvaluation | None = None,
    ) -> TrainState:
        """Trains from the state's step to the last, or to an earlier one.

        Step t + 1 is dispatched before the metrics of step t are read, so reading never makes the device wait; reading
        them then keeps at most two steps in flight.

        Args:
          state: fresh or restored.
          sampling: the Poisson sampler of examples or users, made of the run's own seed.
          checkpoints: where to save.
          metrics: where to write. With None, as in all processes but the first, nothing is written or shown.
          releases: told of every update before it is computed. It is None in all processes but the first; they cannot
            go on without the first.
          until: stop after so many updates, evaluated and saved as the last one would be; schedules and noise stay
            those of the whole run, which a later call continues.
          after_evaluation: called where `metrics` are written, once an evaluation is, or a stop is saved.

        Returns:
          The state after the last step taken.

        Raises:
          Preempted: SIGTERM or Ctrl-C came; the step under way was finished and saved, and the next call makes the
            evaluation that is due. It ends the program if nobody catches it.
          OSError: something could not be written, such as a checkpoint on a full disk.
        """
        num_steps, first = self.mechanism.num_steps, int(state.step)
        last = num_steps if until is None else min(until, num_steps)
        if metrics is not None:
            metrics.truncate_after(first if first > 0 else -1)  # before the first checkpoint: start over
        shown = {"total": last, "initial": first, "desc": self.name, "unit": "step", "disable": metrics is None}
        pending = None
        if first == 0:
            checkpoints.begin(state, sampling_seed=sampling.seed)
        with tqdm.tqdm(**shown) as bar, Preemption() as preemption:
            reporter = _Reporter(self, metrics, bar, after_evaluation)
            if first == 0:
                reporter.facts(self.facts)
            if self._evaluates_after(first, last) and reporter.lacks_evaluation(first):
                reporter.evaluation(first, self._evaluate(state))
            for step in range(first, last):
                if releases is not None and (step == first or step % self.epsilon_every == 0):
                    bound = min(last, (step // self.epsilon_every + 1) * self.epsilon_every)
                    releases.announce(bound, then=min(last, bound + self.epsilon_every))
                state, step_metrics = self.train_step(state, self.groups(sampling.indices(step)))
                if pending is not None:
                    reporter.training(*pending)
                pending = step + 1, step_metrics
                stops = preemption.came(step)
                evaluates = self._evaluates_after(step + 1, last)
                saves = step + 1 == last or stops or (step + 1) % self.checkpoint_every == 0
                scores: dict[str, float] | None = None
                if evaluates or saves:  # what is written must not lag behind what is saved
                    reporter.training(*pending)
                    pending = None
                if evaluates and checkpoints.keeps_best:
                    scores = self._evaluate(state)
                    reporter.evaluation(step + 1, scores)
                if saves:  # before an evaluation of minutes, in which the machine may be taken away
                    checkpoints.save(step + 1, state, sampling_seed=sampling.seed, scores=scores)
                if stops:
                    break
                if evaluates and scores is None:
                    reporter.evaluation(step + 1, self._evaluate(state))
            done = int(state.step)
            checkpoints.wait()
            if releases is not None:
                releases.stopped(done)
            if preemption.was_noticed:
                reporter.stopped(done)
                raise Preempted(self.name, done, num_steps, preemption.by)
        return state

    def _evaluates_after(self, step: int, last: int) -> bool:
        return step == last or step % self.eval_every == 0

    @property
    def epsilon_every(self) -> int:
        """Updates from one computed epsilon to the next."""
        return max(1, math.ceil(self.mechanism.num_steps / EPSILON_POINTS))

    def groups(self, indices: np.ndarray) -> Any:
        """The batch of these examples, or of users with their rows, as `train_step` takes it; -1 stands for padding.

        A single process gets NumPy arrays, which the compiled step puts on the devices. Several processes get global
        arrays.
        """
        size = self.microbatch_size
        missing = -len(indices) % (size or 1)
        filled = np.append(indices, np.full((missing, *indices.shape[1:]), -1, indices.dtype), axis=0)
        rows = rows_of_groups(self.arrays, filled, lengths=self.lengths, microbatch_size=size)
        if self.mesh is not None and jax.process_count() > 1:
            return to_devices(rows, self.mesh)
        return tuple(gather_batch(arrays, members) for arrays, members in rows)

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        params = self.published_params(state)
        return {
            f"eval/{name}/{metric}": value
            for name, evaluate in self.evaluators.items()
            for metric, value in self._released(name, evaluate(params), state).items()
        }

    def _released(self, name: str, scores: Mapping[str, float], state: TrainState) -> Mapping[str, float]:
        if self.private_scores is None:
            return scores
        return self.private_scores.released(name, scores, step=int(state.step), key=secret_of(state.noise))


class _Reporter:
    """Writes metrics.jsonl and moves the progress bar."""

    def __init__(
        self,
        loop: TrainLoop,
        metrics: MetricsWriter | None,
        bar: tqdm.tqdm,
        after_evaluation: AfterEvaluation | None,
    ):
        self._loop, self._metrics, self._bar = loop, metrics, bar
        self._after_evaluation = after_evaluation
        self._shown: dict[str, str] = {}
        self._seconds: collections.deque[float] = collections.deque(maxlen=20)  # of the last steps
        self._compiles = True  # the first step does
        self._since = time.monotonic()

    def facts(self, facts: Mapping[str, Any]) -> None:
        if self._metrics is not None and facts:
            self._append(0, facts)

    def training(self, step: int, values: Mapping[str, Any]) -> None:
        values = jax.device_get(dict(values))  # waits for this step, while the next one runs
        if self._metrics is None:
            return
        now = time.monotonic()
        schedule = self._loop.learning_rate
        line: dict[str, Any] = {} if schedule is None else {"learning_rate": float(schedule(step - 1))}
        line[_SECONDS] = now - self._since
        self._since = now
        self._show_progress(line[_SECONDS], values)
        if step % self._loop.epsilon_every == 0 or step == self._loop.mechanism.num_steps:
            epsilon = self._loop.mechanism.epsilon(step, self._loop.delta)
            line["epsilon"] = epsilon if math.isfinite(epsilon) else None
            self._shown["epsilon"] = number(epsilon, "up")
        self._append(step, {**line, **values})
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(self._shown)

    def _show_progress(self, seconds: float, values: Mapping[str, Any]) -> None:
        """The training loss, and the speed in examples of the EXPECTED batch. The loss and the size are raw values."""
        if "nonprivate/loss" in values:
            self._shown["nonprivate/loss"] = f"{float(values['nonprivate/loss']):.4f}"
        if not self._compiles:
            self._seconds.append(seconds)
            rate = self._loop.mechanism.expected_batch_size * len(self._seconds) / max(sum(self._seconds), 1e-9)
            self._shown["examples/s"] = number(rate)
        self._compiles = False

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the run ended after it had saved this step, and before it had evaluated it; all processes ask."""
        written = [] if self._metrics is None else read_metrics(self._metrics.path)
        is_there = any(line["step"] == step and _SECONDS not in line for line in written if line["step"] > 0)
        return not of_first(int(is_there))

    def stopped(self, step: int) -> None:
        """The run ends before its time, and all is saved."""
        if self._metrics is not None:
            self._metrics.flush()
            self._tell(step)

    def _tell(self, step: int) -> None:
        if self._after_evaluation is not None:
            self._after_evaluation(step)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        if self._metrics is None:
            return
        self._append(step, scores)
        self._shown |= {name.removeprefix("eval/"): f"{value:.4f}" for name, value in scores.items()}
        self._bar.set_postfix(self._shown)
        self._metrics.flush()
        self._tell(step)
        self._since = time.monotonic()  # evaluation is not a part of a step's time

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        assert self._metrics is not None
        try:
            self._metrics.append(step, values)
        except OSError as error:
            raise OSError(
                f"{self._metrics.path} could not be written: {error}. The checkpoints are as they were: free space (or "
                "mend this) and run the same command again: it goes on from the last of them"
            ) from error
