"""Checkpoints that refuse to continue another experiment: for privacy, not for tidiness."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from absl import logging

from dp_rmt.extras import extra
from dp_rmt.files import damage, make_private_folder, write_digests
from dp_rmt.noise_addition import NOISE_LAWS
from dp_rmt.training import processes, run_start
from dp_rmt.training.identity import differences
from dp_rmt.training.train_state import TrainState

with extra("finetune"):
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

_GOODNESS = "goodness"


class Checkpoints:
    """The checkpoints of one run: state, sampler seed, run id, and the identity of the experiment (Orbax, atomic).

    A run resumed with the same noise key on OTHER batches would let an observer subtract two updates and cancel the
    noise. The identity therefore holds everything that the batches and the noise depend on, and `restore` refuses
    to go on where it differs. It holds nothing of devices: a run goes on with another mesh or number of processes.

    `run` is the run's random id, that of the restored checkpoint or a new one. It says which run a ledger belongs to.

    Digests of all files are saved with each checkpoint. A checkpoint whose files have changed since is put aside, and
    the one before it is restored.

    Args:
      directory: the folder of the checkpoints. It is made with mode 0700, or closed to others if it is open to them,
        because the key of the noise is in it. All processes of a run must see it.
      identity: JSON-able facts about data, sampling, clipping, noise and model; what the noise is made of is added.
        None reads a state that nobody goes on from, of whichever run.
      keep: how many of the newest checkpoints are kept; older ones are deleted once the next is saved.
      keep_best: how many of those with the best scores are kept, too. A run then evaluates before it saves, and a run
        that is killed in an evaluation goes on from the checkpoint before.
      score: name of the score that decides which are the best, such as "eval/dev/accuracy".
      best_is: "max" or "min".

    Raises:
      ValueError: fewer than one checkpoint is to be kept, or the best are to be kept and no score is named.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: Mapping[str, Any] | None,
        *,
        keep: int = 2,
        keep_best: int = 0,
        score: str | None = None,
        best_is: Literal["max", "min"] = "max",
    ):
        if keep < 1 or keep_best < 0 or (keep_best and score is None) or best_is not in ("max", "min"):
            raise ValueError(
                f"keep={keep} must be at least 1, keep_best={keep_best} at least 0, with a score (not {score!r}) if it "
                f"is not 0, and best_is={best_is!r} 'max' or 'min'"
            )
        self.run = secrets.token_hex(16)
        self._directory = Path(directory).absolute()
        facts: dict[str, Any] = dict(identity or {})
        facts["noise"] = NOISE_LAWS[facts.get("noise_generator", "threefry2x32")]  # a repeated step repeats its noise
        self._identity = json.loads(json.dumps(facts))  # as it will be read: tuples become lists
        self._only_reads = identity is None
        self._score = score if keep_best else None
        self._saving: int | None = None
        self._sign = 1 if best_is == "max" else -1
        policies: list[Any] = [preservation.LatestN(keep)]
        if keep_best:
            policies.append(preservation.BestN(get_metric_fn=_goodness, n=keep_best))
        make_private_folder(self._directory)  # before anything is in it
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy(policies),
            best_fn=_goodness if keep_best else None,  # without it Orbax saves no metrics
            create=True,
            cleanup_tmp_directories=True,  # what a killed process left behind
            async_options=ocp.AsyncOptions(post_finalization_callback=self._before_commit),
        )
        self._manager = _Manager(self._directory, options=options)

    @property
    def keeps_best(self) -> bool:
        """Whether a checkpoint must be told its scores as it is saved."""
        return self._score is not None

    def begin(self, state: TrainState, *, sampling_seed: int) -> None:
        """Writes down, before the first update, what batches and noise depend on; the first checkpoint removes it.

        A run that is killed before its first checkpoint then begins again with the same noise on the same batches, so
        that nothing more is spent. Parameters are not saved: they are those that the run is built with.

        Args:
          state: the state before the first update.
          sampling_seed: as in `save`.
        """
        if self._manager.latest_step() is None:
            run_start.write(self._directory, self._identity, self.run, sampling_seed, state)

    def save(
        self, step: int, state: TrainState, *, sampling_seed: int, scores: Mapping[str, float] | None = None
    ) -> None:
        """Saves a checkpoint in the background; a step that is saved already is left as it is.

        Args:
          step: number of updates done.
          state: the state after them.
          sampling_seed: of `PoissonSampling`, kept secret with the noise key.
          scores: of the evaluation at this step; None or empty if there was none.

        Raises:
          OSError: this checkpoint, or the last one in the background, could not be written, as on a full disk.
          ValueError: the score that decides which are the best is not among the scores.
        """
        meta = {"identity": self._identity, "sampling_seed": str(sampling_seed), "run": self.run}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        metrics = self._metrics(scores or {})
        self.wait()
        if step in self._manager.all_steps():
            return
        self._saving = step
        try:
            self._manager.save(step, args=items, metrics=metrics, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)

    def wait(self) -> None:
        """Waits for a save that is under way.

        Raises:
          OSError: the checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)
        if processes.is_first() and _committed(self._directory):
            run_start.remove(self._directory)

    def restore(self, template: TrainState) -> tuple[TrainState, int] | None:
        """The newest intact checkpoint, or the start of a run that has no checkpoint yet; None where no run has begun.

        Damaged checkpoints after it are put aside as ``STEP.damaged``, and the log says so.

        Args:
          template: a state with the structure, shapes and shardings to restore, on any mesh. A run without a
            checkpoint begins with its parameters.

        Returns:
          ``(state, sampling_seed)``.

        Raises:
          ValueError: the checkpoint belongs to another experiment (the differences are listed), or all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            start = self._start()
            return None if start is None else (start.state(template), start.sampling_seed)
        found = self._newest_intact(steps)
        self._put_aside([step for step in steps if step > found])
        meta = self._meta(found)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        return self._manager.restore(found, args=items).state, int(meta["sampling_seed"])

    def check(self) -> None:
        """Makes sure that the newest checkpoint, or the start of a run, can be resumed if there is one.

        It reads no parameters.

        Raises:
          ValueError: the checkpoint belongs to another experiment.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            if damage(self._folder(step), "meta/*") is None:
                self._meta(step)
                return
        self._start()

    def close(self) -> None:
        """Waits for saves that are under way.

        Raises:
          OSError: as `wait`.
        """
        self.wait()
        self._manager.close()

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _temporary(self) -> Path | None:
        """The folder of the checkpoint that is being saved; Orbax renames it once it is whole."""
        return next(iter(self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")), None)

    def _before_commit(self) -> None:
        if processes.is_first():
            folder = self._temporary()
            assert folder is not None, f"Orbax saves step {self._saving} in {self._directory} under another name"
            write_digests(folder)

    def _metrics(self, scores: Mapping[str, float]) -> dict[str, float] | None:
        """What Orbax sorts by; a checkpoint without a score, or with a NaN, comes after all others."""
        if self._score is None:
            return None
        if scores and self._score not in scores:
            raise ValueError(f"there is no score {self._score!r} to keep the best by, only {', '.join(sorted(scores))}")
        goodness = self._sign * scores.get(self._score, math.nan)
        return {_GOODNESS: -math.inf if math.isnan(goodness) else goodness}

    def _failed(self, error: Exception) -> NoReturn:
        """Frees the disk space that the failed save has taken, and says where the run stands."""
        if processes.is_first() and (folder := self._temporary()) is not None:
            shutil.rmtree(folder, ignore_errors=True)
        left = _committed(self._directory)
        last = f"the last good one is step {left[-1]}" if left else "there is no other"
        raise OSError(
            f"the checkpoint of step {self._saving} could not be written to {self._directory}; {last}. Free space (or "
            f"mend what is said below) and run the same command again: it goes on from there. {_last_line(error)}"
        ) from error

    def _newest_intact(self, steps: list[int]) -> int:
        """The first of the steps whose files are as they were saved; the first process looks, for all."""
        found = -1
        if processes.is_first():
            for step in steps:
                problem = damage(self._folder(step))
                if problem is None:
                    found = step
                    break
                logging.warning("the checkpoint %s is damaged (%s): taking the one before", self._folder(step), problem)
        found = processes.of_first(found + 1) - 1
        if found < 0:
            raise ValueError(
                f"every checkpoint in {self._directory} is damaged (steps {', '.join(map(str, steps))}): put back a "
                "copy, or start over with a new --workdir"
            )
        return found

    def _put_aside(self, steps: list[int]) -> None:
        """Renames checkpoints, so that these steps can be saved again."""
        if not steps:
            return
        if processes.is_first():
            for step in steps:
                aside = self._directory / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                self._folder(step).rename(aside)
        processes.wait_for_all("damaged checkpoints put aside")
        self._manager.reload()

    def _meta(self, step: int) -> Mapping[str, Any]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        self._check_identity(meta["identity"])
        self.run = meta.get("run", run_start.BEFORE_RUNS_HAD_IDS)
        return meta

    def _start(self) -> run_start.Start | None:
        start = run_start.read(self._directory)
        if start is not None:
            self._check_identity(start.identity)
            self.run = start.run
        return start

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        if self._only_reads:
            return
        found = differences(saved, self._identity)
        if found:
            raise ValueError(
                f"the checkpoint in {self._directory} belongs to another experiment:\n" + "\n".join(found) + "\n"
                "Going on would reuse its noise on other batches or gradients, which lets the noise cancel out and "
                "breaks the privacy guarantee. Give a new --workdir, or restore the settings above."
            )


def can_go_on(directory: str | os.PathLike[str]) -> bool:
    """Whether the folder of a run's checkpoints has one, or the start of a run."""
    folder = Path(directory)
    return bool(_committed(folder)) or (folder / run_start.FILE).exists()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which leaves preemption to the training loop (`dp_rmt.training.preemption`).

    JAX's service agrees on the step to stop at by the last number that each process has asked about. Orbax would ask
    about older steps, from a thread of its own.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def _committed(folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole, which Orbax has renamed to their step."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def _goodness(metrics: Mapping[str, float]) -> float:
    return metrics[_GOODNESS]


def _last_line(error: BaseException) -> str:
    """The last line of the first cause: errors of Orbax and tensorstore have many lines, with the reason at the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
