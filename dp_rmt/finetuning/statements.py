"""What an arm's ledger and privacy statement say, and the refusal to spend its data a second time by mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_rmt.mechanism import DPSGD
from dp_rmt.reporting import provenance
from dp_rmt.reporting.audit_bound import read_audit
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.reporting.privacy_text import FALSE_ALARMS
from dp_rmt.training.ledger import Entry, Ledger, now, ways_on
from dp_rmt.training.metrics import read_metrics
from dp_rmt.training.releases import Releases

if TYPE_CHECKING:
    from dp_rmt.finetuning.arms import Arm


def releases(arm: Arm, *, run: str, steps_done: int) -> Releases:
    """What the training loop tells of its updates, for the process that writes in the arm's folder.

    Args:
      arm: to be trained.
      run: id of the run, in its checkpoints.
      steps_done: at the checkpoint that it goes on from.

    Raises:
      FileExistsError: the folder has the ledger of another run.
    """
    return Releases(arm.workdir, _entry(arm, run, steps_done), statement_of(arm))


def statement_of(arm: Arm) -> Callable[[int], PrivacyStatement]:
    """``updates -> the statement after so many``, of all that does not depend on the run's moment."""
    mechanism, delta, privacy = arm.run.loop.mechanism, arm.run.delta, arm.settings.privacy
    is_private = mechanism.noise_multiplier > 0
    numbers: dict[str, Any] = {
        name: getattr(mechanism, name)
        for name in (
            "noise_multiplier",
            "l2_clip_norm",
            "clip",
            "sampling_probability",
            "expected_batch_size",
            "max_batch_size",
            "num_examples",
            "noise_std",
        )
    }
    prompts = arm.task.prompts

    def statement(updates: int) -> PrivacyStatement:
        by_accountant = mechanism.epsilon_by_accountant(updates, delta) if is_private else {}
        return PrivacyStatement(
            epsilon=mechanism.epsilon(updates, delta) if is_private else None,
            target_epsilon=privacy.epsilon if is_private else None,
            delta=delta,
            epsilon_pld=by_accountant.get("pld"),
            epsilon_rdp=by_accountant.get("rdp"),
            delta_of_truncation=mechanism.delta_of_truncation(updates) if is_private else None,
            num_steps=updates,
            seeds_from=_seeds_from(arm),
            nonprivate_metrics=privacy.nonprivate_metrics,
            evaluation_data=(*arm.task.evaluations, *((prompts.split,) if prompts else ())),
            audit=read_audit(arm.workdir),
            detection=_detection(mechanism, updates) if is_private else (),
            texts_of=prompts.split if prompts else None,
            **numbers,
        )

    return statement


def check_unspent(workdir: Path) -> None:
    """Refuses to begin a run in a folder where another has released something.

    Args:
      workdir: of an arm, without a checkpoint, and without the start of a run, to go on from.

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
        config = json.loads((workdir / "config.json").read_text())["privacy"]
        seeds_given = any(config[name] is not None for name in ("sampling_seed", "noise_seed"))
        raise FileExistsError(
            f"{workdir} has the results of a run ({', '.join(signs)}), but neither its checkpoints nor its ledger. "
            f"{ways_on(workdir, seeds_given=seeds_given)}"
        )


def privacy_record(workdir: Path) -> dict[str, Any]:
    """What privacy.json says, without folders of this machine, for a record that is published."""
    record = read_privacy(workdir)
    if record.get("about"):
        record["about"] |= {"command": None, "base_model": Path(record["about"]["base_model"] or "").name}
    return record


def _entry(arm: Arm, run: str, updates: int) -> Entry:
    mechanism, settings = arm.run.loop.mechanism, arm.settings
    train_data = str(arm.run.identity["train_data"])
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
        delta=arm.run.delta,
        seeds_from=_seeds_from(arm),
        train_data=train_data,
        about=provenance.of_this_process(
            base_model=arm.task.base_model,
            task=settings.data.task,
            tuning=settings.model.tuning,
            data_fingerprint=provenance.keyed_fingerprint(run, train_data),
        ),
        date=now(),
    )


def _seeds_from(arm: Arm) -> Any:
    given = arm.settings.privacy.sampling_seed, arm.settings.privacy.noise_seed
    return "os entropy" if given == (None, None) else "given in the config"


def _detection(mechanism: DPSGD, updates: int) -> tuple[tuple[float, float], ...]:
    return tuple((rate, mechanism.largest_true_positive_rate(updates, rate)) for rate in FALSE_ALARMS)
