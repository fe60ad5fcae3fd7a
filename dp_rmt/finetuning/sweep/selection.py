"""Repeat and select: what the best of a random number of jobs costs, before the first, and what leaves after the last.

The theorems of Papernot & Steinke 2022 are about the winner alone. The number of jobs, the other models, the table and
the names and dates that tell how many there were are not covered, so the released folder has none of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_rmt.accounting import Repetitions, Step
from dp_rmt.files import write_atomically
from dp_rmt.finetuning import assemble
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.plan import build_mechanism
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.sweep.arm_folders import ArmFolder, arms_of, spent_by
from dp_rmt.finetuning.sweep.jobs import Job, Sweep
from dp_rmt.finetuning.sweep.privacy import Choice, best_of, cost_of_choosing, name_of
from dp_rmt.finetuning.workdir import is_secret
from dp_rmt.reporting.model_card import FILE as CARD
from dp_rmt.reporting.numbers import number
from dp_rmt.reporting.privacy_files import write_privacy
from dp_rmt.reporting.privacy_statement import PrivacyStatement

RELEASE = "release"
"""The only part of a sweep's folder that may leave the house."""


@dataclasses.dataclass(frozen=True)
class Price:
    """What publishing the winner will cost.

    Attributes:
      epsilon: of the winner, by Rényi divergences.
      epsilon_of_one: of one job, by the same accountant.
      delta: of all.
      evaluation_epsilon: of each row of the evaluation data, if that is private; else None.
      text: all this in words.
    """

    epsilon: float
    epsilon_of_one: float
    delta: float
    evaluation_epsilon: float | None
    text: str


class _CountedError(Exception):
    """Stops the loading of a task where the number of its examples is known."""


def num_examples_of(settings: Settings) -> int:
    """The rows that a run with these settings trains on; reads its data, and no model."""
    if settings.synthetic is not None:
        return settings.synthetic.num_private_train

    def planned(num_examples: int, notes: Sequence[str]) -> None:
        del notes
        raise _CountedError(num_examples)

    try:
        return assemble.load_task(settings, planned=planned).num_examples
    except _CountedError as counted:
        return int(counted.args[0])


def price(sweep: Sweep, num_examples: Callable[[Settings], int] = num_examples_of) -> Price:
    """The price of a sweep's winner, from the settings of its jobs alone.

    Args:
      sweep: a sweep with `REPETITIONS` and at least one job.
      num_examples: the number of training examples by settings; called once for all jobs on the same data.

    Returns:
      A `Price`. It does not depend on the number of jobs that was drawn.

    Raises:
      ValueError: a job is not private, gives a seed, or differs from the others in noise, sampling, steps or data, so
        that the jobs are no independent draws from one mechanism.
    """
    assert sweep.repetitions is not None
    known: dict[Any, int] = {}
    found: dict[tuple[frozenset[tuple[Step, int]], frozenset[tuple[Step, int]], float], str] = {}
    for job in sweep.changes:
        steps, of_scores, deltas = Counter[Step](), Counter[Step](), set()
        for settings in arm_settings(sweep.settings(job)).values():
            _check_seeds(job, settings)
            key = settings.data, settings.synthetic
            if key not in known:
                known[key] = num_examples(settings)
            mechanism, delta = build_mechanism(settings, known[key])
            if mechanism.noise_multiplier == 0:
                raise ValueError(f"job {job!r} has no noise (config.privacy.epsilon=inf), so that no winner is private")
            if mechanism.num_groups > 1:
                raise ValueError(
                    f"job {job!r} has correlated noise (config.privacy.noise_bands={mechanism.num_groups}), for which "
                    "the price of choosing a winner is not derived: with REPETITIONS leave it at 1"
                )
            step = Step(mechanism.noise_multiplier, mechanism.sampling_probability, mechanism.truncation)
            steps[step] += mechanism.num_steps
            if (scores := assemble.private_scores(settings, mechanism.num_steps, delta)) is not None:
                of_scores.update(scores.steps)
            deltas.add(delta)
        found.setdefault((frozenset(steps.items()), frozenset(of_scores.items()), min(deltas)), job)
    if len(found) != 1 or len(known) != 1:
        names = ", ".join(repr(job) for job in found.values())
        raise ValueError(
            f"the jobs {names} differ in noise, sampling, steps or data: with REPETITIONS every job has to be a draw "
            "from one and the same mechanism. Let sweep() change what costs no privacy, such as the learning rate"
        )
    ((steps_of_job, steps_of_scores, delta),) = found
    epsilon, once = best_of(dict(steps_of_job), sweep.repetitions, delta=delta)
    evaluation = best_of(dict(steps_of_scores), sweep.repetitions, delta=delta)[0] if steps_of_scores else None
    text = _price_in_words(sweep.repetitions, epsilon, once, delta, evaluation)
    return Price(epsilon, once, delta, evaluation, text)


def release(sweep: Sweep, workdir: Path, jobs: Sequence[Job]) -> Path | None:
    """Writes the folder of the winner; all jobs have to be finished.

    Args:
      sweep: the sweep, with `REPETITIONS`.
      workdir: its folder.
      jobs: all of its jobs, in order.

    Returns:
      The folder: the model (without its card, which has the epsilon of one run), `winner.json` (what the winner
      changed, and its score), `privacy.json` and `privacy.md`.
      None where the number of jobs came out as 0, or where no bound for the winner alone holds.
    """
    assert sweep.repetitions is not None
    arms = [arm for job in jobs for arm in arms_of(job.workdir)]
    runs = [run for job in jobs for run in spent_by(job.name, job.workdir)]
    choice = cost_of_choosing(runs, sweep.repetitions) if runs else None
    if choice is None or choice.rule != "repeat and select":
        return None
    scores = [arm.score(sweep.score) for arm in arms]
    ordered = [score if math.isfinite(score) else -math.inf for score in scores]
    best = ordered.index(max(ordered))
    winner, folder = arms[best], workdir / RELEASE
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    for name in ("model", "adapter"):
        if (winner.folder / name).exists():
            shutil.copytree(winner.folder / name, folder / name, ignore=shutil.ignore_patterns(CARD))
            for path in (folder / name, *(folder / name).rglob("*")):
                os.utime(path)  # the copies have the times of the originals, which tell which of the jobs it was
    record = {"changes": _changes(sweep, winner), sweep.score: scores[best] if math.isfinite(scores[best]) else None}
    write_atomically(folder / "winner.json", json.dumps(record, indent=1) + "\n")
    write_privacy(folder, _statement(winner.privacy, sweep.repetitions, choice, len(arms) // len(jobs)))
    return folder


def _check_seeds(job: str, settings: Settings) -> None:
    given = [name for name in ("sampling_seed", "noise_seed") if getattr(settings.privacy, name) is not None]
    if given:
        raise ValueError(
            f"job {job!r} gives config.privacy.{given[0]}: with REPETITIONS every job draws its own samples and "
            "its own noise, so leave the seeds out"
        )


def _changes(sweep: Sweep, winner: ArmFolder) -> dict[str, Any]:
    """What the winner's settings are, of what the sweep changes; the job's name would tell how many jobs there were."""
    keys = dict.fromkeys(key for changes in sweep.changes.values() for key in changes if not is_secret(key))
    return {**({"arm": winner.name} if winner.name else {}), **{key: winner.value(key) for key in keys}}


def _statement(
    privacy: Mapping[str, Any], repetitions: Repetitions, choice: Choice, arms_of_job: int
) -> PrivacyStatement:
    """The statement of the winner: that of its run, at the price of having been chosen.

    What holds of the run alone (privacy loss distributions, detection, an audit) is left out, and so are its date and
    its command, which tell which of the jobs it was.
    """
    own = PrivacyStatement.from_json(privacy)
    evaluation = own.evaluation_guarantee
    if evaluation is not None:
        _, delta, std, count = evaluation
        steps = {Step(std, sampling_probability=1.0): count * arms_of_job}
        evaluation = best_of(steps, repetitions, delta=delta)[0], delta, std, count
    return dataclasses.replace(
        own,
        epsilon=choice.epsilon,
        delta=choice.delta,
        target_epsilon=None,
        epsilon_pld=None,
        epsilon_rdp=None,
        delta_of_truncation=None,
        detection=(),
        audit=None,
        date=None,
        about=None if own.about is None else dataclasses.replace(own.about, command=None),
        nonprivate_metrics=False,
        texts_of=None,
        evaluation_guarantee=evaluation,
        selected_among=f"{name_of(repetitions)}, mean {repetitions.mean:g}",
    )


def _price_in_words(
    repetitions: Repetitions, epsilon: float, once: float, delta: float, evaluation: float | None
) -> str:
    scores = "Scores have no noise: the evaluation data has to be public. "
    if evaluation is not None:
        scores = f"Each row of the evaluation data has ε = {number(evaluation, 'up')}. "
    return (
        f"PRICE, before the first job: whoever publishes the best job alone has (ε = {number(epsilon, 'up')}, "
        f"δ = {number(delta, 'up')}) for each training example (or person, with config.data.user_column), whatever the "
        "number of jobs comes out as "
        f"({name_of(repetitions)}, mean {repetitions.mean:g}; Papernot & Steinke 2022). One job has "
        f"ε = {number(once, 'up')} by the same accountant. {scores}Keep the number, the table and the other models: "
        f"only WORKDIR/{RELEASE}/ may leave."
    )
