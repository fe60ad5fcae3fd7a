"""What a run's ledger and privacy statement say, and the refusal to spend its data a second time by mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from dp_rmt.mechanism import DPSGD
from dp_rmt.reporting import provenance
from dp_rmt.reporting.audit_bound import read_audit
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.reporting.privacy_text import FALSE_ALARMS
from dp_rmt.training.ledger import Entry, Ledger, now, ways_on
from dp_rmt.training.metrics import read_metrics
from dp_rmt.training.private_scores import PrivateScores
from dp_rmt.training.releases import Releases
from dp_rmt.types import Unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What a run's statement says beside the numbers of its mechanism; every field may be left out.

    Attributes:
      base_model: folder or name of the pre-trained model.
      task: name of the training task.
      tuning: which part of the model trains, in a word.
      target_epsilon: what the noise was calibrated for; None if it was given.
      texts_of: name of the evaluation data whose rows will stand word for word in what the run writes.
      coordinates_from: the public rows from which the coordinates of clipping and updates were computed, in words; None
        if there are no such coordinates.
      compares_raw_losses: whether the run is one of those whose raw training losses are compared.
    """

    base_model: str | None = None
    task: str | None = None
    tuning: str | None = None
    target_epsilon: float | None = None
    texts_of: str | None = None
    coordinates_from: str | None = None
    compares_raw_losses: bool = False


NOTHING_MORE = About()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What a run promises and for what data; its ledger and its statement are made from it.

    Attributes:
      mechanism: the mechanism that is accounted for.
      delta: of the guarantee.
      train_data: fingerprint of the training data.
      seeds_given: whether the seeds of sampling or noise were given rather than drawn from the system's entropy.
      nonprivate_metrics: whether raw values are written to the metrics.
      evaluation_data: names of the data that the run is evaluated on.
      about: what else is known.
      private_scores: what the evaluation data's own guarantee is; None where it is public.
    """

    mechanism: DPSGD
    delta: float
    train_data: str
    seeds_given: bool
    nonprivate_metrics: bool
    evaluation_data: tuple[str, ...] = ()
    about: About = NOTHING_MORE
    private_scores: PrivateScores | None = None

    def releases(self, workdir: Path, *, run: str, steps_done: int) -> Releases:
        """The record to which the training loop announces its updates, for the one process that writes in the folder.

        Args:
          workdir: the run's folder.
          run: id of the run, in its checkpoints.
          steps_done: updates done at the checkpoint that the run goes on from.

        Raises:
          FileExistsError: the folder has the ledger of another run.
        """
        return Releases(workdir, self.entry(run, steps_done), lambda updates: self.statement(workdir, updates))

    def statement(self, workdir: Path, updates: int) -> PrivacyStatement:
        """The statement after so many updates, without what only the ledger knows (see `Releases`)."""
        mechanism, delta, texts_of = self.mechanism, self.delta, self.about.texts_of
        is_private, quantile = mechanism.noise_multiplier > 0, mechanism.clip_quantile
        scores = self.private_scores
        by_accountant = mechanism.epsilon_by_accountant(updates, delta) if is_private else {}
        return PrivacyStatement(
            epsilon=mechanism.epsilon(updates, delta) if is_private else None,
            target_epsilon=self.about.target_epsilon if is_private else None,
            delta=delta,
            epsilon_pld=by_accountant.get("pld"),
            epsilon_rdp=by_accountant.get("rdp"),
            delta_of_truncation=mechanism.delta_of_truncation(updates) if is_private else None,
            noise_multiplier=mechanism.noise_multiplier,
            l2_clip_norm=mechanism.l2_clip_norm,
            clip=mechanism.clip,
            clip_quantile=None if quantile is None else (quantile.quantile, quantile.share),
            noise_generator=mechanism.noise_generator,
            sampling_probability=mechanism.sampling_probability,
            expected_batch_size=mechanism.expected_batch_size,
            max_batch_size=mechanism.truncation.max_batch_size,
            num_steps=updates,
            num_examples=mechanism.num_examples,
            noise_std=mechanism.largest_noise_std,
            seeds_from=self._seeds_from,
            nonprivate_metrics=self.nonprivate_metrics,
            evaluation_data=(*self.evaluation_data, *((texts_of,) if texts_of else ())),
            audit=read_audit(workdir),
            detection=_detection(mechanism, updates) if is_private else (),
            texts_of=texts_of,
            coordinates_from=self.about.coordinates_from,
            unit=mechanism.unit,
            rows_per_user=mechanism.rows_per_user,
            noise_coefficients=None if mechanism.noise_strategy is None else mechanism.noise_strategy.coefficients,
            compares_raw_losses=self.about.compares_raw_losses,
            evaluation_guarantee=None
            if scores is None
            else (scores.epsilon, scores.delta, scores.noise_multiplier, len(scores.planned)),
        )

    def entry(self, run: str, updates: int) -> Entry:
        """The ledger's entry for so many updates, done by the run of this id."""
        mechanism, about = self.mechanism, self.about
        return Entry(
            run=run,
            updates=updates,
            is_exact=True,
            noise_multiplier=mechanism.noise_multiplier,
            l2_clip_norm=mechanism.l2_clip_norm if mechanism.noise_multiplier > 0 else None,
            sampling_probability=mechanism.sampling_probability,
            max_batch_size=mechanism.truncation.max_batch_size,
            num_examples=mechanism.num_examples,
            num_steps=mechanism.num_steps,
            delta=self.delta,
            seeds_from=self._seeds_from,
            train_data=self.train_data,
            about=provenance.of_this_process(
                base_model=about.base_model,
                task=about.task,
                tuning=about.tuning,
                data_fingerprint=provenance.keyed_fingerprint(run, self.train_data),
            ),
            date=now(),
            unit=mechanism.unit,
            noise_bands=mechanism.num_groups,
        )

    @property
    def _seeds_from(self) -> Literal["os entropy", "given in the config"]:
        return "given in the config" if self.seeds_given else "os entropy"


def check_unspent(workdir: Path, *, seeds_given: bool) -> None:
    """Refuses to begin a run in a folder where another has released something.

    Args:
      workdir: the folder of a run that has neither a checkpoint nor the start of a run to go on from.
      seeds_given: whether the seeds of the run were given, for the advice.

    Raises:
      FileExistsError: the ledger has updates, or what a run leaves is there; the message says what to do.
    """
    Ledger(workdir).check_run(None)
    signs = []
    if (workdir / "privacy.json").exists() and (updates := read_privacy(workdir).get("num_steps")):
        signs.append(f"privacy.json, of {updates:,} updates")
    if (workdir / "metrics.jsonl").exists() and any(line["step"] for line in read_metrics(workdir / "metrics.jsonl")):
        signs.append("metrics.jsonl")
    signs += [f"{name}/" for name in ("model", "adapter") if (workdir / name).exists()]
    if signs:
        raise FileExistsError(
            f"{workdir} has the results of a run ({', '.join(signs)}), but neither its checkpoints nor its ledger. "
            f"{ways_on(workdir, seeds_given=seeds_given)}"
        )


def check_delta(delta: float, num_examples: int, key: str = "delta", unit: Unit = "example") -> None:
    """Raises ValueError unless the delta of a private run is in (0, 1) and at most 1 / sqrt(N).

    A larger delta guarantees nothing.

    Args:
      delta: of the guarantee.
      num_examples: N, rows of the training data, or its users where these are the unit.
      key: what the user calls delta, for the message.
      unit: what N counts.
    """
    if not 0 < delta < 1:
        raise ValueError(f"{key} must be above 0 and below 1, got {delta}")
    if delta > num_examples**-0.5:
        raise ValueError(
            f"{key}={delta} is above 1 / sqrt(N) = {num_examples**-0.5:.3g} of the {num_examples} training {unit}s: a "
            f"mechanism that publishes {delta * num_examples:.0f} of them outright may have it, so it guarantees "
            f"nothing. Set {key} well below 1 / N = {1 / num_examples:.3g}, such as to N^-1.1 = "
            f"{num_examples**-1.1:.3g}"
        )


def _detection(mechanism: DPSGD, updates: int) -> tuple[tuple[float, float], ...]:
    return tuple((rate, mechanism.largest_true_positive_rate(updates, rate)) for rate in FALSE_ALARMS)
